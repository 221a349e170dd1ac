from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from resmaster_stages.diffusion import autoencoder
from resmaster_stages.models.parts import Models
from tests.tiny_models import make_pipeline, tiny, with_base


class BlockVae:
    """A VAE that is exact tile by tile: block means down, repetition up."""

    def __init__(self):
        self.config = SimpleNamespace(
            block_out_channels=(1, 1, 1), scaling_factor=0.5, force_upcast=False, latents_mean=None, latents_std=None
        )
        self.dtype = torch.float32
        self.shapes = []

    def encode(self, x):
        self.shapes.append(tuple(x.shape))
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: F.avg_pool2d(x, 4)))

    def decode(self, z, return_dict):
        self.shapes.append(tuple(z.shape))
        return (F.interpolate(z, scale_factor=4, mode="nearest"),)


def test_one_tile_is_what_diffusers_computes():
    ours = Models.from_pipeline(tiny())
    pixels = torch.rand(1, 3, 32, 96) * 2 - 1  # another shape, no more area than native
    with torch.inference_mode():
        expected = tiny().vae.encode(pixels).latent_dist.mode() * 0.13025
        assert torch.equal(autoencoder.encode(ours, pixels), expected)
        image = tiny().vae.decode(expected / 0.13025, return_dict=False)[0]
    assert torch.equal(autoencoder.decode(ours, expected), image)


@pytest.mark.parametrize("size", [(160, 160), (64, 200), (72, 100)])
def test_tiles_are_blended_without_a_trace_where_the_tiles_agree(size):
    vae = BlockVae()
    ours = with_base(Models.from_pipeline(tiny()), vae=vae)
    pixels = torch.rand(2, 3, *size)
    latents = autoencoder.encode(ours, pixels)
    torch.testing.assert_close(latents, F.avg_pool2d(pixels, 4) * 0.5, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        autoencoder.decode(ours, latents), F.interpolate(latents * 2, scale_factor=4), atol=1e-6, rtol=1e-5
    )
    assert len({shape[1:] for shape in vae.shapes}) == 2  # one shape in, one shape out
    assert max(shape[-1] for shape in vae.shapes) <= 64


def test_tiled_equals_untiled_away_from_what_tiles_cannot_know():
    ours = Models.from_pipeline(tiny())
    pixels = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tiled = autoencoder.encode(ours, pixels)
    with torch.inference_mode():
        whole = tiny().vae.encode(pixels).latent_dist.mode() * 0.13025
    # Group norms and attention see tiles rather than the canvas, so this is close, not equal.
    assert (tiled - whole).abs().mean() < 0.2 * whole.std()


def test_half_precision_vae_is_upcast_and_put_back_after_exceptions():
    pipe = make_pipeline()
    pipe.vae.to(torch.float16)
    ours = Models.from_pipeline(pipe)
    image = autoencoder.decode(ours, torch.randn(1, 4, 8, 8))
    assert image.dtype == torch.float32
    assert torch.isfinite(image).all()
    assert pipe.vae.dtype == torch.float16

    def boom(*args, **kwargs):
        assert pipe.vae.dtype == torch.float32
        raise RuntimeError("boom")

    pipe.vae.decode = boom
    with pytest.raises(RuntimeError, match="boom"):
        autoencoder.decode(ours, torch.randn(1, 4, 8, 8))
    assert pipe.vae.dtype == torch.float16


@pytest.mark.parametrize(("at_once", "calls"), [(1, [1] * 6), (2, [2, 2, 2]), (4, [3, 3]), (5, [3, 3]), (6, [6])])
def test_a_row_of_tiles_goes_through_the_vae_in_even_calls_and_comes_out_the_same(monkeypatch, at_once, calls):
    vae = BlockVae()
    latents = torch.randn(2, 3, 16, 40)  # one row of 3 tiles per sample
    ours = with_base(Models.from_pipeline(tiny()), vae=vae)
    expected = autoencoder.decode(ours, latents)
    vae.shapes.clear()
    monkeypatch.setattr(autoencoder, "px_at_once", lambda device: at_once * 64 * 64)
    torch.testing.assert_close(autoencoder.decode(ours, latents), expected)
    assert [shape[0] for shape in vae.shapes] == calls


@pytest.mark.parametrize(("gib", "tiles"), [(8, 1), (24, 1), (44.5, 2), (79.1, 4), (139, 4)])
def test_a_large_gpu_takes_several_native_tiles_per_call(monkeypatch, gib, tiles):
    memory = SimpleNamespace(total_memory=int(gib * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    assert autoencoder.px_at_once(torch.device("cuda")) == tiles * 1024**2
    assert autoencoder.px_at_once(torch.device("cpu")) == 1024**2


def test_configured_latent_statistics_are_undone():
    vae = BlockVae()
    vae.config.latents_mean, vae.config.latents_std = [1.0, 2.0, 3.0], [2.0, 4.0, 8.0]
    ours = with_base(Models.from_pipeline(tiny()), vae=vae)
    pixels = torch.rand(1, 3, 32, 32)
    latents = autoencoder.encode(ours, pixels)
    means = F.avg_pool2d(pixels, 4)
    torch.testing.assert_close(latents[:, 1], (means[:, 1] - 2) * 0.5 / 4)
    torch.testing.assert_close(autoencoder.decode(ours, latents), F.interpolate(means, scale_factor=4))
