"""FLUX.1 through the engine, beside diffusers' own pipeline."""

import pytest
import torch

from resmaster_stages.models.bases.transformer import packed, unpacked
from resmaster_stages.models.parts import Models
from tests.models.bases.common import engine, relative, start
from tests.tiny_transformers import make_flux


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def pipe(request):
    return make_flux(request.param)


def theirs(pipe, noise, prompts, steps, scale):
    """The latents of the pipeline from the same noise, unpacked."""
    height, width = (side * 4 for side in noise.shape[-2:])
    made = pipe(
        list(prompts),
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=scale,
        latents=packed(noise),
        max_sequence_length=48,
        output_type="latent",
    ).images
    return unpacked(made, *noise.shape[-2:])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 64)])
def test_one_view_is_what_the_pipeline_draws(pipe, height, width):
    models, prompts = Models.from_pipeline(pipe), ("a cat", "a big house, red")
    noise = start(models, height, width, batch=2)
    expected = theirs(pipe, noise, prompts, 6, 3.5)
    ours = engine(models, noise, prompts, steps=6, guidance_scale=3.5)
    assert relative(ours, expected) < 1e-5


def test_packing_is_undone():
    latents = torch.randn(2, 16, 6, 10)
    assert torch.equal(unpacked(packed(latents), 6, 10), latents)
