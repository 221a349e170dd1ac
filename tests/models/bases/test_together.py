"""What is true of every family of transformers, beside what each family's own tests say."""

import re

import pytest
from torch import nn

from resmaster_stages.diffusion.memory import weights_bytes
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.acceleration import has_blocks, takes_fp8
from resmaster_stages.models.bases import FAMILIES, family_of_pipeline
from resmaster_stages.models.bases.base import network_of
from resmaster_stages.models.parts import Models
from tests.methods.common import difference, settings, some_image
from tests.tiny_flux import make_chroma
from tests.tiny_flux2 import make_dev, make_klein
from tests.tiny_pixart import make_pixart
from tests.tiny_qwen_image import make_qwen_image
from tests.tiny_sd3 import make_sd3
from tests.tiny_transformers import make_flux
from tests.tiny_z_image import make_z_image

MAKERS = {
    "FLUX.1": make_flux,
    "Chroma": make_chroma,
    "FLUX.2": make_dev,
    "FLUX.2 klein": make_klein,
    "Qwen-Image": make_qwen_image,
    "Z-Image": make_z_image,
    "Stable Diffusion 3": make_sd3,
    "PixArt-Sigma": make_pixart,
    "PixArt-alpha": lambda: make_pixart(alpha=True),
}
ROTARY = ("FLUX.1", "Chroma", "FLUX.2", "FLUX.2 klein", "Qwen-Image", "Z-Image")


def enlarged(pipe, scale, **values):
    models = Models.from_pipeline(pipe)
    own = {"guidance_scale": models.base.sampling.guidance_scale, "scale": scale, **values}
    return upscale_image(models, some_image(), "a cat", config=settings("direct", **own), seed=1)


def test_every_family_of_transformers_is_here():
    unets = {"SDXL", "Stable Diffusion 1.x and 2.x"}
    named = {family.name for family in FAMILIES if not family.name.startswith("picturebook")}
    assert named - unets == MAKERS.keys()
    for name, make in MAKERS.items():
        assert family_of_pipeline(make(), "pipeline").name == name


@pytest.mark.parametrize("name", MAKERS)
def test_its_network_is_found_inside_the_denoiser(name):
    models = Models.from_pipeline(MAKERS[name]())
    denoiser = models.base.denoiser
    assert isinstance(network_of(denoiser), nn.Module)
    assert has_blocks(denoiser)
    assert weights_bytes(models) > 4 * sum(weight.numel() for weight in network_of(denoiser).parameters())
    layers = {layer for layer, module in network_of(denoiser).named_modules() if takes_fp8(module, layer, 1)}
    assert layers, "some layers may compute in 8 bits"
    assert not any(re.search(r"embed|norm|modulation", layer) or "." not in layer for layer in layers)


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("values", [{"positions": "ntk"}, {"positions": "yarn"}, {"attention": "proportional"}])
def test_scaled_positions_change_large_canvases_alone(name, values):
    pipe = MAKERS[name]()
    assert enlarged(pipe, 1, **values).tobytes() == enlarged(pipe, 1).tobytes()
    assert difference(enlarged(pipe, 2, **values), enlarged(pipe, 2)) > 0


@pytest.mark.parametrize("name", ["PixArt-Sigma", "Stable Diffusion 3"])
def test_positions_from_a_table_cannot_be_scaled(name):
    with pytest.raises(ConfigError, match=r"upscale\.positions: needs positions, which model .* has not; .*FLUX\.1"):
        enlarged(MAKERS[name](), 2, positions="ntk")
