"""Methods of views run on anything that predicts noise: no layer of a UNet is looked at."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from resmaster_stages.diffusion.loop import CanvasNoise, denoise
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases.unet import SDXL
from tests.methods.common import plain, request, schedule, settings, some_image
from tests.tiny_models import with_base

MEAN, DEVIATION = 0.3, 0.5


class Gaussian:
    """The ideal denoiser of latents whose every element is drawn from N(MEAN, DEVIATION^2): it needs no neighbours."""

    dtype = torch.float32

    def __init__(self, steps):
        self.steps = {step.t: step for step in steps}
        self.shapes = []

    def __call__(self, sample, timestep, *, return_dict, encoder_hidden_states, added_cond_kwargs):
        assert not return_dict
        assert len(encoder_hidden_states) == len(sample)
        self.shapes.append(tuple(sample.shape))
        step = self.steps[int(timestep)]
        spread = (step.alpha * DEVIATION) ** 2 + step.sigma**2
        return (step.sigma / spread * (sample - step.alpha * MEAN),)


def drawn_by(denoiser):
    """A model of a family without any abilities."""
    return with_base(plain(), family=replace(SDXL, name="ideal", abilities=frozenset()), denoiser=denoiser)


def drawn(method, steps=20, **values):
    """The canvas of a method, and the one view of the whole canvas that the denoiser saw least once, in shapes."""
    models = drawn_by(Gaussian(schedule(steps)))
    asked = request(models, settings(method, steps=steps, **values))
    z, noise = None, CanvasNoise([3], 4, *asked.canvas_size, models.device)
    for stage in asked.config.passes(asked):
        path, draw = schedule(steps)[stage.first :], noise.resized(stage.height, stage.width)
        z, composition = stage.begin(z, draw, path[0])
        z = stage.finish(denoise(models, composition, path, z, draw, view_batch=16))
    return z, set(models.base.denoiser.shapes)


@pytest.mark.parametrize("method", ["multidiffusion", "resmaster"])
def test_without_neighbours_to_see_views_and_canvas_are_one(method):
    off = {"image_prompt": {"enabled": False}, "structure": {"enabled": False}}
    values = {**off, "preset": "exact"} if method == "resmaster" else {}
    whole, shapes = drawn("direct")
    assert shapes == {(2, 4, 32, 32)}
    views, shapes = drawn(method, **values)
    assert shapes == {(18, 4, 16, 16)}
    torch.testing.assert_close(views, whole, atol=1e-4, rtol=1e-4)


def test_the_ideal_denoiser_draws_what_it_is_ideal_for():
    canvas, _ = drawn("direct", steps=100, guidance_scale=1)
    assert float(canvas.mean()) == pytest.approx(MEAN, abs=0.05)
    assert float(canvas.std()) == pytest.approx(DEVIATION, rel=0.05)


def test_demofusion_runs_on_it_too():
    canvas, shapes = drawn("demofusion", scale=3)
    assert shapes == {(18, 4, 16, 16), (8, 4, 16, 16), (10, 4, 16, 16)}  # 9 and 25 local views; 4 and 9 dilated ones
    assert canvas.shape == (1, 4, 48, 48)
    assert torch.isfinite(canvas).all()


def test_images_come_out_of_it():
    models = drawn_by(Gaussian(schedule(3)))
    result = upscale_image(models, some_image(40, 56), "a cat", config=settings("multidiffusion", steps=3))
    assert result.size == (80, 112)
    assert len(np.unique(np.asarray(result))) > 10
    for method in ("scalecrafter", "fouriscale", "freescale", "c_upscale"):
        with pytest.raises(
            ConfigError, match=r"(convolutions|attention), which model pipeline \(ideal\) has not.*SDXL"
        ):
            upscale_image(models, some_image(), "a cat", config=settings(method))
    with pytest.raises(ConfigError, match=r"image_prompt.enabled: needs image prompts"):
        upscale_image(models, some_image(), "a cat", config=settings("resmaster"))
