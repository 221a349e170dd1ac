"""Stable Diffusion 3 and 3.5 through the engine, beside diffusers' own pipeline."""

import pytest

from resmaster_stages.models.parts import Models
from tests.models.bases.common import engine, relative, start
from tests.tiny_sd3 import make_sd3

PROMPTS = ("a cat", "a big house, red")
NEGATIVE = ("blurry", "")


@pytest.fixture(scope="module", params=[("3.5", True), ("3", True), ("3.5", False)], ids=["3.5", "3", "without-t5"])
def pipe(request):
    return make_sd3(*request.param)


def theirs(pipe, noise, steps, scale, **more):
    """What the pipeline draws from the same noise."""
    height, width = (side * 4 for side in noise.shape[-2:])
    values = {"height": height, "width": width, "num_inference_steps": steps, "guidance_scale": scale}
    values |= {"negative_prompt": list(NEGATIVE), "latents": noise, "output_type": "latent"}
    if pipe.text_encoder_3 is not None:
        values["max_sequence_length"] = 48
    return pipe(list(PROMPTS), **values | more).images


@pytest.mark.parametrize(("height", "width", "steps", "scale"), [(64, 64, 6, 5), (48, 64, 7, 1), (64, 40, 5, 7.5)])
def test_one_view_is_what_the_pipeline_draws(pipe, height, width, steps, scale):
    models = Models.from_pipeline(pipe)
    noise = start(models, height, width, batch=2)
    ours = engine(models, noise, PROMPTS, NEGATIVE, steps=steps, guidance_scale=scale)
    error = relative(ours, theirs(pipe, noise, steps, scale))
    print("PARITY", height, width, steps, scale, error)
    assert error < 1e-5
