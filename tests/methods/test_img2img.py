"""img2img, whole and tiled: `direct` and `multidiffusion` with `init: noised_lr` against diffusers' own pipeline.

The embedded pack in float32. One thing is made equal: diffusers draws the latents from the VAE's distribution, the
engine takes its mode, so here `sample` is `mode`. Nothing assumes a number of latent channels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from resmaster_stages.diffusion.loop import CanvasNoise, denoise
from resmaster_stages.diffusion.reference import to_image
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.identity import pack_folder
from resmaster_stages.models.parts import Models
from resmaster_stages.models.schedule import even_course
from tests.methods.common import difference, request, settings, some_image

PROMPT, SEED, STEPS, GUIDANCE = "a red house on a green meadow under a blue sky", 7, 10, 4.0
STRENGTH = 0.4
PLAIN = {
    "steps": STEPS,
    "guidance_scale": GUIDANCE,
    "negative_prompt": "",
    "init": "noised_lr",
    "start": 1 - STRENGTH,
    "micro_conditioning": "canvas",
}


@pytest.fixture(scope="module")
def pipe():
    loaded = StableDiffusionXLImg2ImgPipeline.from_pretrained(pack_folder(), local_files_only=True).to(torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(autouse=True)
def mode_instead_of_a_sample(monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def theirs(pipe, pixels, seen=None, **more):
    """What diffusers' pipeline makes of `pixels` [1, 3, H, W] in [-1, 1]; `seen` hears the latents after every step."""

    def hear(pipe, number, timestep, values):
        if seen is not None:
            seen.append(values["latents"].clone())
        return {}

    return pipe(
        PROMPT,
        image=pixels / 2 + 0.5,
        strength=STRENGTH,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED),
        callback_on_step_end=hear,
        **more,
    ).images


def ours(models, asked, seen):
    """The engine's latents after every step, by the method that is asked for."""
    config = asked.config
    path = asked.path
    noise = CanvasNoise([SEED], models.base.latent_channels, *asked.canvas_size, models.device)
    (stage,) = config.passes(asked)
    z, composition = stage.begin(None, noise, path[stage.first])
    for step in path[stage.first :]:
        z = denoise(models, composition, [step], z, noise, view_batch=16)
        seen.append(z)
    return path[stage.first :]


@pytest.mark.parametrize(("scheduler", "more"), [(EulerDiscreteScheduler, {}), (DDIMScheduler, {"clip_sample": False})])
def test_every_step_of_direct_is_that_of_the_pipeline(pipe, scheduler, more):
    """256 px from 128: a canvas that is one view of twice the native size."""
    kept, pipe.scheduler = pipe.scheduler, scheduler.from_config(pipe.scheduler.config, **more)
    try:
        models = Models.from_pipeline(pipe)
        asked = request(models, settings("direct", **PLAIN), some_image(128, 128), PROMPT)
        reference = asked.required_reference()
        with torch.inference_mode():  # as diffusers encodes it: whole, where the engine takes native tiles
            whole = pipe.vae.encode(reference.pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
        reference.__dict__["latents"] = whole
        mine, expected = [], []
        path = ours(models, asked, mine)
        theirs(pipe, reference.pixels, expected, output_type="latent")
    finally:
        pipe.scheduler = kept
    assert len(mine) == len(expected) == len(path) == round(STEPS * STRENGTH)
    in_noise_units = scheduler is EulerDiscreteScheduler  # Euler's latents are x0 + noise * sigma / alpha
    errors = []
    for step, a, b in zip(path, mine, expected):
        scaled = b * step.alpha_next if in_noise_units else b
        errors.append(float((a - scaled).abs().max() / scaled.abs().max()))
    print("greatest error of each step, of the peak:", *(f"{error:.1e}" for error in errors))
    assert max(errors) < 1e-4
    assert float((mine[0] - mine[-1]).abs().max()) > 0.1, "the steps do something"


@pytest.mark.parametrize("method", ["direct", "multidiffusion"])
def test_one_native_tile_is_the_pipeline_s_image(pipe, method):
    """128 px: one view, one tile of the VAE, so whole canvas and tiles are one, and nothing else is made equal."""
    image = some_image(128, 128)
    views = {"stride": 0.75, "fuse": "linear"} if method == "multidiffusion" else {}
    config = settings(method, **{**PLAIN, "scale": 1, **views})
    models = Models.from_pipeline(pipe)
    asked = request(models, config, image, PROMPT)
    (expected,) = theirs(pipe, asked.required_reference().pixels, output_type="pt")
    made = upscale_image(models, image, PROMPT, config=config, seed=SEED)
    assert difference(made, to_image(expected * 2 - 1)) <= 1
    assert difference(made, image) > 20, "it is no copy of the image"


def test_the_start_is_what_diffusers_calls_one_less_the_strength(pipe):
    """As many steps are left as in diffusers where start x steps is a whole number; else one more."""
    for steps in (10, 20, 30, 50):
        pipe.scheduler.set_timesteps(steps)
        for first in range(steps):
            strength = (steps - first + 1e-9) / steps
            _, left = pipe.get_timesteps(steps, strength, "cpu")
            assert steps - even_course(steps).first(first / steps + 1e-9) == left, (steps, first)
    _, left = pipe.get_timesteps(10, 0.65, "cpu")
    assert (10 - even_course(10).first(0.35), left) == (7, 6)


def test_tiles_hear_the_whole_prompt_and_are_feathered_over_a_quarter(pipe):
    """The tiled form at 2x: tiles of the native size, three quarters of a tile apart, and an image that follows the
    image the more closely the later it starts."""
    models, image = Models.from_pipeline(pipe), some_image(128, 128)
    distances = []
    for start in (0.9, 0.4):
        config = settings("multidiffusion", **{**PLAIN, "start": start, "stride": 0.75, "fuse": "linear"})
        asked = request(models, config, image, PROMPT)
        made = np.asarray(upscale_image(models, image, PROMPT, config=config, seed=SEED), dtype=float)
        held = np.asarray(to_image(asked.required_reference().pixels[0]), dtype=float)
        distances.append(np.abs(made - held).mean())
    grid = asked.views()
    assert grid.rows == grid.cols == (0, 12, 16), "12 of 16 latents apart, the last pulled back to the border"
    assert distances[0] < distances[1]
