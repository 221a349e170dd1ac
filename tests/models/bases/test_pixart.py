"""PixArt-alpha and PixArt-Sigma through the engine, beside diffusers' own pipelines."""

import pytest
from diffusers import DDIMScheduler

from resmaster_stages.models.parts import Models
from tests.models.bases.common import engine, relative, start
from tests.tiny_pixart import BETAS, make_pixart

PROMPTS = ("a cat", "a big house, red")
NEGATIVE = ("blurry", "")


def ddim():
    return DDIMScheduler(**BETAS, timestep_spacing="leading", steps_offset=1, clip_sample=False)


@pytest.fixture(scope="module", params=[False, True], ids=["sigma", "alpha"])
def pipe(request):
    return make_pixart(request.param)


def theirs(pipe, noise, steps, scale, **more):
    """What the pipeline draws from the same noise."""
    height, width = (side * 4 for side in noise.shape[-2:])
    values = {"height": height, "width": width, "num_inference_steps": steps, "guidance_scale": scale}
    values |= {"negative_prompt": list(NEGATIVE), "latents": noise, "output_type": "latent"}
    return pipe(list(PROMPTS), use_resolution_binning=False, max_sequence_length=48, **values | more).images


@pytest.mark.parametrize(("height", "width", "steps", "scale"), [(64, 64, 10, 4.5), (48, 64, 8, 1), (64, 40, 5, 3)])
def test_one_view_is_what_the_pipeline_draws(pipe, height, width, steps, scale):
    pipe.scheduler = ddim()
    models = Models.from_pipeline(pipe)
    noise = start(models, height, width, batch=2)
    ours = engine(models, noise, PROMPTS, NEGATIVE, steps=steps, guidance_scale=scale)
    error = relative(ours, theirs(pipe, noise, steps, scale))
    print("PARITY", height, width, steps, scale, error)
    assert error < 1e-5
