"""The pack in bfloat16 beside itself in float32: what the rounded weights of a VAE would draw is not drawn.

The model is the pack's own: random weights show none of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.diffusion import autoencoder
from resmaster_stages.diffusion.reference import upsample
from resmaster_stages.methods.generate import generate
from resmaster_stages.methods.resmaster import ResMaster
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.metrics.agreement import psnr
from resmaster_stages.models.load import load_pipeline
from resmaster_stages.models.parts import Models
from tests.tiny_models import with_base

PROMPT = "a yellow flower on the sand under a blue sky"


@lru_cache(maxsize=2)
def pack(dtype: str) -> Models:
    return Models.from_pipeline(load_pipeline(ModelConfig(dtype=dtype, device="cpu")))


@pytest.fixture(scope="module", autouse=True)
def forget() -> Iterator[None]:
    yield
    pack.cache_clear()


@pytest.fixture(scope="module")
def rounded() -> Models:
    """The pack in bfloat16, its VAE too."""
    whole = pack("bfloat16").base.vae
    vae = AutoencoderKL.from_config(whole.config)
    vae.load_state_dict(whole.state_dict())
    return with_base(pack("bfloat16"), vae=vae.to(torch.bfloat16).eval())


@pytest.fixture(scope="module")
def low() -> Image.Image:
    (image,) = generate(pack("float32"), [PROMPT], [""], [12], 128, 128, 8, 5.0, 1)
    assert isinstance(image, Image.Image)
    return image


def test_the_reference_has_the_same_latents_whatever_the_unets_precision(low, rounded):
    pixels = upsample(low, 256, 256)
    exact = autoencoder.encode(pack("float32"), pixels)
    assert pack("bfloat16").base.denoiser.dtype == torch.bfloat16
    assert torch.equal(autoencoder.encode(pack("bfloat16"), pixels), exact)
    shift = (autoencoder.encode(rounded, pixels) - exact).mean(dim=(0, 2, 3)) / exact.std()
    assert shift.abs().max() > 0.006  # 0.0097: what the exception is for
    rounded.base.vae.to(torch.float32)
    again = (autoencoder.encode(rounded, pixels) - exact).mean(dim=(0, 2, 3)) / exact.std()
    rounded.base.vae.to(torch.bfloat16)
    assert again.abs().max() > 0.006  # the weights are what was rounded: to compute in float32 is too late


def test_bfloat16_draws_the_float32_image_without_a_shift_of_colour(low, rounded):
    config = ResMaster(preset="exact", scale=2, steps=6, guidance_scale=4.0, micro_conditioning="native")

    def draw(models: Models) -> np.ndarray:
        return np.asarray(upscale_image(models, low, PROMPT, config=config, seed=1))

    def shift(image: np.ndarray) -> float:
        """Grey levels by which a colour's mean is off, the greatest of the three."""
        return float(np.abs((image.astype(float) - exact).mean(axis=(0, 1))).max())

    exact = draw(pack("float32"))
    ours, theirs = draw(pack("bfloat16")), draw(rounded)
    assert psnr(ours, exact) > 55.5  # 57.3
    assert psnr(ours, exact) > psnr(theirs, exact) + 0.8  # 55.5
    assert shift(ours) < 0.06  # 0.02
    assert shift(theirs) > 0.06  # 0.10
