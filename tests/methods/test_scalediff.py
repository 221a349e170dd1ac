"""ScaleDiff: a mixed reference, a pull that fades, attention to neighbourhoods, and passes of doubling sizes."""

import numpy as np
import pytest
import torch

from resmaster_stages.diffusion import autoencoder
from resmaster_stages.diffusion.cost import UnetWork, counting
from resmaster_stages.diffusion.frequency import resampled
from resmaster_stages.diffusion.loop import CanvasNoise
from resmaster_stages.diffusion.neighbourhood import Tiles, level
from resmaster_stages.diffusion.reference import pad_to_multiple, to_tensor, upsample
from resmaster_stages.diffusion.reference_guidance import fading_guidance
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.render import render
from resmaster_stages.methods.request import Reference, Request
from resmaster_stages.methods.scalediff import ScaleDiff
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.models.flow import flow_path
from resmaster_stages.models.parts import Models
from resmaster_stages.planning.workload import Denoising, high_res_work
from tests.methods.common import (
    adapted,
    calls_of,
    difference,
    forwards,
    plain,
    request,
    schedule,
    settings,
    some_image,
)
from tests.tiny_pixart import make_pixart
from tests.tiny_transformers import make_flux


def make(image=None, seed=0, models=None, **values):
    config = settings(**{"method": "scalediff", **values})
    return upscale_image(models or adapted(), image or some_image(), "a cat", config=config, seed=seed)


# ------------------------------------------------------------------------------------------------------- low-pass


def reduction(length: int, fraction: float) -> torch.Tensor:
    """Bilinear reduction as a matrix: each cell is a tent over the cells around it, cut at the border."""
    size = max(1, int(length * fraction))
    width = length / size
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * width
    tent = (1 - (torch.arange(length) + 0.5 - centre[:, None]).abs() / width).clamp(min=0)
    return tent / tent.sum(dim=1, keepdim=True)


def enlargement(size: int, length: int) -> torch.Tensor:
    """Bilinear enlargement as a matrix: each cell lies between two others, or beyond the last."""
    place = ((torch.arange(length, dtype=torch.float64) + 0.5) * size / length - 0.5).clamp(0, size - 1)
    return (1 - (place[:, None] - torch.arange(size)).abs()).clamp(min=0)


@pytest.mark.parametrize(
    ("height", "width", "fraction"), [(64, 64, 0.125), (40, 24, 0.25), (17, 9, 0.3), (5, 3, 0.125)]
)
def test_the_low_pass_is_two_linear_resizings(height, width, fraction):
    x = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(1))
    down, across = (
        enlargement(max(1, int(side * fraction)), side) @ reduction(side, fraction) for side in (height, width)
    )
    expected = down @ x.double() @ across.T
    torch.testing.assert_close(resampled(x, fraction).double(), expected, atol=1e-5, rtol=1e-4)


def test_constants_survive_the_low_pass():
    x = torch.full((1, 4, 24, 40), 0.7)
    torch.testing.assert_close(resampled(x, 0.125), x)


# ------------------------------------------------------------------------------------------------------- guidance


def test_the_pull_is_whole_at_the_first_step_and_fades_with_the_noise():
    """On SDXL at 50 steps: from t = 381, where it is 1, to t = 1, where it is 0.003."""
    path = schedule()[30:]
    assert path[0].t == 381
    x0, reference = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pull = fading_guidance(reference, lambda x: x, 1.0, path[0])
    torch.testing.assert_close(pull(x0, path[0]), reference)
    gammas = [float(((pull(x0, step) - x0) / (reference - x0)).mean()) for step in path]
    shares = [1 - step.alpha**2 for step in path]  # 1 - abar
    assert gammas == pytest.approx([share / shares[0] for share in shares], rel=1e-4)
    assert gammas[-1] == pytest.approx(0.003, abs=0.0005)
    half = fading_guidance(reference, lambda x: x, 0.5, path[0])
    torch.testing.assert_close(half(x0, path[0]), (x0 + reference) / 2)
    assert torch.equal(fading_guidance(reference, lambda x: x, 0.0, path[0])(x0, path[0]), x0)


def test_on_a_flow_path_the_pull_is_that_of_the_same_noise_level():
    x0, reference = torch.randn(2, 1, 4, 8, 8)
    even = schedule()[30:]
    flow = flow_path([*(step.sigma / (step.alpha + step.sigma) for step in even), 0.0])
    one, other = (fading_guidance(reference, lambda x: x, 1.0, path[0]) for path in (even, flow))
    for step, same in zip(even, flow):
        torch.testing.assert_close(one(x0, step), other(x0, same))


def test_low_frequencies_alone_are_pulled():
    x0, reference = torch.randn(2, 1, 4, 32, 32)
    step = schedule()[30]
    pulled = fading_guidance(reference, lambda x: resampled(x, 0.25), 1.0, step)(x0, step)
    torch.testing.assert_close(pulled, x0 + resampled(reference, 0.25) - resampled(x0, 0.25))


# ------------------------------------------------------------------------------------------------------ reference


def parts_of(scale=2, **values):
    asked = request(plain(), settings("scalediff", scale=scale, **values), some_image())
    config, size = asked.config, asked.canvas_size
    if config.enlargement() == "mixed":
        return config.mixed(asked, None, *size), asked
    return asked.latents_before(None, *size), asked


def test_the_reference_has_high_frequencies_of_pixels_and_low_ones_of_latents():
    mixed, asked = parts_of(mix_cutoff=0.25)
    pixels, latents = (parts_of(reference={"enlarge": each})[0] for each in ("image", "latent"))
    torch.testing.assert_close(pixels, asked.reference.latents)
    torch.testing.assert_close(
        latents, torch.nn.functional.interpolate(asked.reference.small_latents, scale_factor=2, mode="bicubic")
    )
    expected = pixels + resampled(latents, 0.25) - resampled(pixels, 0.25)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-4)
    assert (mixed - pixels).abs().max() > 1e-3


def test_two_routes_that_agree_mix_to_themselves():
    """At scale 1 nothing is enlarged."""
    mixed, asked = parts_of(scale=1)
    assert torch.equal(mixed, asked.reference.latents)


def test_a_later_pass_enlarges_the_one_before():
    config = settings("scalediff", scale=4)
    asked = request(plain(), config)
    first, second = config.passes(asked)
    assert [(each.height, each.width, each.first) for each in (first, second)] == [(32, 32, 1), (64, 64, 1)]
    before = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    z, _ = second.begin(before, CanvasNoise([0], 4, 64, 64, asked.models.device), schedule(2)[1])
    draw = CanvasNoise([0], 4, 64, 64, asked.models.device)()
    torch.testing.assert_close(z, schedule(2)[1].noised(config.mixed(asked, before, 64, 64), draw))
    image = autoencoder.decode(asked.models, before).clamp(-1, 1)
    large = torch.nn.functional.interpolate(image, scale_factor=2, mode="bicubic").clamp(-1, 1)
    pixels = autoencoder.encode(asked.models, large)
    latents = torch.nn.functional.interpolate(before, scale_factor=2, mode="bicubic")
    torch.testing.assert_close(config.mixed(asked, before, 64, 64), pixels + resampled(latents - pixels, 0.125))


# ----------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("preset", ScaleDiff.presets)
@pytest.mark.parametrize("size", [(64, 64), (48, 64)])
def test_without_its_parts_it_is_direct_inference_from_the_noised_reference(preset, size):
    """At the native size the neighbourhood is the canvas, and both routes of the reference are the image."""
    image, values = some_image(*size), {"scale": 1, "start": 0.3, "steps": 4}
    ours = make(image, preset=preset, structure_weight=0, **values)
    assert ours.tobytes() == make(image, method="direct", init="noised_lr", **values).tobytes()
    assert ours.tobytes() != make(image, preset=preset, **values).tobytes()


@pytest.mark.parametrize(
    ("values", "shapes"),
    [
        ({"steps": 10}, [(2, 4, 32, 32)] * 4),
        ({"scale": 4, "steps": 5}, [(2, 4, 32, 32)] * 2 + [(2, 4, 64, 64)] * 2),
        ({"scale": 4, "steps": 2, "phases": "last", "start": 0.5}, [(2, 4, 64, 64)]),
        ({"preset": "faithful", "steps": 5}, [(2, 4, 32, 32)] * 2),
        ({"scale": 1, "steps": 5}, [(2, 4, 16, 16)] * 2),
    ],
)
def test_unet_calls(values, shapes):
    assert calls_of("scalediff", **values) == shapes


@pytest.mark.parametrize(
    "change",
    [
        {"reference": {"enlarge": "image"}},
        {"reference": {"enlarge": "latent"}},
        {"reference": {"edge_noise": [0.5, 1.2]}},
        {"mix_cutoff": 0.5},
        {"structure_weight": 0.0},
        {"structure_cutoff": 0.5},
        {"jitter": False},
        {"start": 0.3},
        {"phases": "last"},
    ],
)
def test_every_knob_has_an_effect(change):
    base = {"scale": 4, "steps": 5}
    assert np.abs(np.asarray(make(**base)).astype(int) - np.asarray(make(**base, **change)).astype(int)).sum() > 0


@pytest.mark.parametrize(("micro", "expected"), [("canvas", 128), ("native", 64)])
def test_size_conditions_are_those_of_the_pass_or_of_the_low_res_image(micro, expected):
    asked = request(plain(), settings("scalediff", micro_conditioning=micro))
    (only,) = asked.config.passes(asked)
    step = schedule(2)[1]
    _, composition = only.begin(None, CanvasNoise([0], 4, 32, 32, asked.models.device), step)
    _, conditions = composition.groups[0].at(step)
    assert conditions.sizes.tolist() == [[expected, expected, 0, 0, expected, expected]]


@pytest.mark.parametrize("size", [(72, 40), (40, 112), (52, 60)])
def test_canvases_of_any_shape(size):
    assert make(some_image(*size), scale=2.5).size == (size[0] * 2.5, size[1] * 2.5)


def test_a_seed_decides_the_image_and_the_reference_is_followed():
    assert make(seed=1).tobytes() == make(seed=1).tobytes()
    assert difference(make(seed=1), make(seed=2)) > 0
    assert difference(make(some_image(seed=1)), make(some_image(seed=2))) > 10


def test_permuting_samples_permutes_the_images():
    models, images = plain(), [some_image(seed=seed) for seed in range(2)]
    config = settings("scalediff", steps=5, scale=2)

    def drawn(order):
        pixels = torch.cat([pad_to_multiple(upsample(images[i], 128, 128), 4) for i in order])
        low_res = torch.cat([to_tensor(images[i]) for i in order])
        prompts = tuple(("a cat", "a red dog")[i] for i in order)
        asked = Request(models, config, 128, 128, prompts, ("", ""), reference=Reference(models, pixels, 2.0, low_res))
        return render(asked, order)

    one, other = drawn([0, 1]), drawn([1, 0])
    assert difference(one[0], other[1]) <= 1
    assert difference(one[1], other[0]) <= 1
    assert difference(one[0], one[1]) > 10


def test_the_network_is_whole_after_an_exception():
    models = plain()
    asked = request(models, settings("scalediff", steps=5))
    with pytest.raises(RuntimeError, match="boom"):
        render(asked, [0], lambda canvas: (_ for _ in ()).throw(RuntimeError("boom")))
    assert forwards(models.base.denoiser) == {}


# ----------------------------------------------------------------------------------------------------------- cost


def test_the_papers_numbers():
    """4096 px from 1024 px: 20 of 50 steps at 2048 px and 20 at 4096 px, each with two rows."""
    sizes = (Denoising(Geometry(1024, 8)), 1024, 1024)
    for preset in ScaleDiff.presets:
        work = high_res_work(ScaleDiff(scale=4, preset=preset), *sizes)
        assert work == (UnetWork(40, 4.0), UnetWork(40, 16.0))
    assert sum(each.rows * each.area for each in work) == 800


@pytest.mark.parametrize(("side", "step", "still", "moving"), [(256, 1, 4.0, 6.25), (512, 1, 16.0, 20.25)])
def test_products_of_attention_grow_with_the_area_and_not_with_its_square(side, step, still, moving):
    """In units of a native view's: 4 at 2048 px and 16 at 4096 px, where attention to the canvas takes 16 and 256.

    Tiles that move are one more along each axis. On SDXL these products are 11 % of a native row.
    """
    for jitter, expected in ((False, still), (True, moving)):
        for factor in (2, 4):
            tokens, native = (side // factor) ** 2, (128 // factor) ** 2
            tiles = level(*Tiles(side, side, 128, jitter).axes(tokens, step), torch.device("cpu"))
            assert tiles.queries.numel() * tiles.keys.shape[1] / native**2 == expected


@pytest.mark.parametrize("values", [{}, {"guidance_stop": 0.8}, {"phases": "every"}, {"start": 0.9}], ids=str)
def test_the_work_is_what_is_counted(values):
    config = settings("scalediff", **{"scale": 3, "steps": 10, "view_batch": 1, **values})
    models = adapted()
    with counting() as counted_work:
        upscale_image(models, some_image(48, 32), "a cat", config=config)
    work = high_res_work(config, Denoising(models.geometry), 32, 48)
    assert sum(each.rows for each in work) == counted_work.rows
    assert sum(each.rows * each.area for each in work) == pytest.approx(counted_work.native_rows)


# ---------------------------------------------------------------------------------------------------------- bases


def test_a_transformer_without_the_layers_is_refused():
    with pytest.raises(ConfigError, match=r"method scalediff: needs attention.*SDXL"):
        make(models=Models.from_pipeline(make_flux()), guidance_scale=3.5)


def test_pixart_has_the_layers():
    models = Models.from_pipeline(make_pixart())
    image = make(models=models, scale=2, steps=3, guidance_scale=5.0)
    assert image.size == (128, 128)
    assert difference(image, make(models=models, scale=2, steps=3, guidance_scale=5.0, jitter=False)) > 0
    assert forwards(models.base.denoiser.network) == {}
