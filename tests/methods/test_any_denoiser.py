"""Methods of views run on anything that predicts noise or a velocity: no layer of a UNet is looked at."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from resmaster_stages.diffusion.loop import CanvasNoise, denoise
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases.unet import SDXL
from resmaster_stages.models.flow import SCHEDULER, flow_schedule
from resmaster_stages.models.schedule import Timing
from tests.methods.common import plain, request, schedule, settings, some_image
from tests.tiny_models import with_base

MEAN, DEVIATION = 0.3, 0.5


class Gaussian:
    """The ideal denoiser of latents whose every element is drawn from N(MEAN, DEVIATION^2): it needs no neighbours."""

    dtype = torch.float32

    def __init__(self, steps):
        self.steps = {float(torch.tensor(float(step.t))): step for step in steps}
        self.shapes = []

    def __call__(self, sample, timestep, *, return_dict, encoder_hidden_states, added_cond_kwargs):
        assert not return_dict
        assert len(encoder_hidden_states) == len(sample)
        self.shapes.append(tuple(sample.shape))
        step = self.steps[float(timestep)]
        spread = (step.alpha * DEVIATION) ** 2 + step.sigma**2
        return (step.sigma / spread * (sample - step.alpha * MEAN),)


class GaussianVelocity(Gaussian):
    """The same on a flow path: it predicts the velocity, eps - x0."""

    def __call__(self, sample, timestep, **conditions):
        (eps,) = super().__call__(sample, timestep, **conditions)
        sigma = float(timestep) / 1000
        distance = (sample - (1 - sigma) * MEAN) / (((1 - sigma) * DEVIATION) ** 2 + sigma**2)
        return (eps - (MEAN + (1 - sigma) * DEVIATION**2 * distance),)


def shifted(steps):
    """A flow path with the time shift of Stable Diffusion 3."""
    return flow_schedule({"_class_name": SCHEDULER, "shift": 3.0}, steps, Timing(256))


def drawn_by(denoiser):
    """A model of a family without any abilities."""
    return with_base(plain(), family=replace(SDXL, name="ideal", abilities=frozenset()), denoiser=denoiser)


def drawn(method, steps=20, kind=Gaussian, size=64, **values):
    """The canvas of a method, and the one view of the whole canvas that the denoiser saw least once, in shapes."""
    whole = schedule(steps) if kind is Gaussian else shifted(steps)
    models = drawn_by(kind(whole))
    asked = request(models, settings(method, steps=steps, **values), some_image(size, size))
    asked.__dict__["path"] = whole  # a cached property
    z, noise = None, CanvasNoise([3], 4, *asked.canvas_size, models.device)
    for stage in asked.config.passes(asked):
        path, draw = whole[stage.first :], noise.resized(stage.height, stage.width)
        z, composition = stage.begin(z, draw, path[0])
        z = stage.finish(denoise(models, composition, path, z, draw, view_batch=16))
    return z, set(models.base.denoiser.shapes)


@pytest.mark.parametrize("kind", [Gaussian, GaussianVelocity])
@pytest.mark.parametrize("method", ["multidiffusion", "resmaster"])
def test_without_neighbours_to_see_views_and_canvas_are_one(method, kind):
    off = {"image_prompt": {"enabled": False}, "structure": {"enabled": False}}
    values = {**off, "preset": "exact"} if method == "resmaster" else {}
    whole, shapes = drawn("direct", kind=kind)
    assert shapes == {(2, 4, 32, 32)}
    views, shapes = drawn(method, kind=kind, **values)
    assert shapes == {(18, 4, 16, 16)}
    torch.testing.assert_close(views, whole, atol=1e-4, rtol=1e-4)


def test_the_ideal_denoiser_draws_what_it_is_ideal_for():
    canvas, _ = drawn("direct", steps=100, guidance_scale=1)
    assert float(canvas.mean()) == pytest.approx(MEAN, abs=0.05)
    assert float(canvas.std()) == pytest.approx(DEVIATION, rel=0.05)


@pytest.mark.parametrize(
    ("stepper", "steps"),
    [("ddim_keep", 100), ("ddim_implied", 100), ("posterior", 400), ("ddim_ancestral", 400), ("dpmpp_2m", 20)],
)
def test_the_ideal_velocity_draws_what_it_is_ideal_for(stepper, steps):
    canvas, _ = drawn("direct", steps, GaussianVelocity, 128, guidance_scale=1, stepper=stepper)
    assert float(canvas.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(canvas.std()) == pytest.approx(DEVIATION, rel=0.05)


@pytest.mark.parametrize("kind", [Gaussian, GaussianVelocity])
def test_demofusion_runs_on_it_too(kind):
    canvas, shapes = drawn("demofusion", kind=kind, scale=3)
    assert shapes == {(18, 4, 16, 16), (8, 4, 16, 16), (10, 4, 16, 16)}  # 9 and 25 local views; 4 and 9 dilated ones
    assert canvas.shape == (1, 4, 48, 48)
    assert torch.isfinite(canvas).all()


def test_images_come_out_of_it():
    models = drawn_by(Gaussian(schedule(3)))
    result = upscale_image(models, some_image(40, 56), "a cat", config=settings("multidiffusion", steps=3))
    assert result.size == (80, 112)
    assert len(np.unique(np.asarray(result))) > 10
    for method in ("scalecrafter", "fouriscale", "hidiffusion", "freescale", "scalediff", "c_upscale"):
        with pytest.raises(
            ConfigError, match=r"(convolutions|attention), which model pipeline \(ideal\) has not.*SDXL"
        ):
            upscale_image(models, some_image(), "a cat", config=settings(method))
    with pytest.raises(ConfigError, match=r"image_prompt.enabled: needs image prompts"):
        upscale_image(models, some_image(), "a cat", config=settings("resmaster"))
