"""The whole canvas at once, beyond the native size of a transformer with rotary positions."""

from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel

from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import Method
from resmaster_stages.diffusion.positions import Scaling, scaled_positions
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.models.bases.unet import SDXL
from tests.methods.common import difference, plain, settings, some_image
from tests.tiny_models import with_base


class Packed:
    """A tiny random FLUX transformer, called as the engine calls denoisers: it reads 2 x 2 latents as one token."""

    dtype = torch.float32

    def __init__(self):
        torch.manual_seed(0)
        self.network = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        )
        for value in self.network.parameters():
            value.data = torch.randn(value.shape) * (0.3 if value.ndim > 1 else 0.1)
        self.network.eval().requires_grad_(False)

    def __call__(self, sample, timestep, *, return_dict, encoder_hidden_states, added_cond_kwargs):
        rows, cols = (side // 2 for side in sample.shape[-2:])
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
        tokens = torch.nn.functional.pixel_unshuffle(sample, 2).flatten(2).transpose(1, 2)
        output = self.network(
            hidden_states=tokens,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=added_cond_kwargs["text_embeds"],
            timestep=timestep.expand(len(sample)) / 1000,
            txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3),
            img_ids=torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).float(),
            return_dict=False,
        )[0]
        return (torch.nn.functional.pixel_shuffle(output.transpose(1, 2).unflatten(2, (rows, cols)), 2),)


def transformer():
    family = replace(SDXL, name="packed", abilities=frozenset({"positions"}))
    return with_base(plain(), family=family, geometry=Geometry(64, 4, multiple=2), denoiser=Packed())


def make(models, scale=2, **values):
    config = settings("direct", scale=scale, steps=2, **values)
    return upscale_image(models, some_image(), "a cat", config=config)


CHOICES = [{"positions": "ntk"}, {"positions": "yarn"}, {"attention": "proportional"}]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_positions_are_those_of_the_canvas(choice):
    """64 px, which are 8 x 8 tokens, are native; 128 x 128 px are 16 x 16 tokens, beside 77 of text."""
    models = transformer()
    scaling = Scaling(choice.get("positions", "own"), choice.get("attention", "plain"), 16, 16, native=8, text=77)
    with scaled_positions(models.base.denoiser, scaling):
        expected = make(models)
    assert make(models, **choice).tobytes() == expected.tobytes()
    assert difference(make(models), expected) > 0
    assert difference(make(models, scale=1, **choice), make(models, scale=1)) <= 1


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_model_without_rotary_positions_is_refused_in_one_line(choice):
    (setting,) = choice
    with pytest.raises(ConfigError, match=rf"^upscale.{setting}: needs positions, which model .* has not"):
        make(plain(), **choice)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_older_datasets_keep_their_identity(choice):
    def identity(**values):
        return parse_config({"name": "d", "upscale": {"method": "direct", **values}}).upscale.identity()

    assert not {"positions", "attention"} & identity().keys()
    assert identity(**choice) == {**identity(), **choice}


def test_other_methods_do_not_have_them():
    with pytest.raises(ValueError, match="positions"):
        Method.model_validate({"method": "multidiffusion", "positions": "ntk"})
