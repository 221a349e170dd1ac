"""A family of base models from outside.

A plain torch module on a flow-matching path, taken from a folder to an image.
"""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from resmaster_stages.config.load import parse_config
from resmaster_stages.config.model import IpAdapterConfig, ModelConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.generate import generate
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models import bases, load
from resmaster_stages.models.bases.base import Family, Geometry, Sampling, Texts, guide
from resmaster_stages.models.captioner import token_counter
from resmaster_stages.models.flow import flow_path
from resmaster_stages.models.geometry import geometry_of
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from resmaster_stages.models.places import ModelFiles, location
from resmaster_stages.models.schedule import course_of
from resmaster_stages.planning.preview import preview
from tests.methods.common import difference, settings, some_image

TOKENS = 6


def straight_path(steps):
    """z = (1 - sigma) x0 + sigma eps; the denoiser predicts eps - x0."""
    return flow_path([1 - index / steps for index in range(steps + 1)])


class Velocity(nn.Module):
    """The ideal velocity of latents around a mean that the prompt moves: it needs no neighbours."""

    def __init__(self, mean, deviation):
        super().__init__()
        self.mean, self.deviation = nn.Parameter(mean, False), nn.Parameter(deviation, False)

    @property
    def dtype(self):
        return self.mean.dtype

    def forward(self, sample, timestep, *, return_dict, letters):
        assert not return_dict
        sigma = timestep / 1000
        mean = self.mean + letters.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        pull = (sample - (1 - sigma) * mean) / (((1 - sigma) * self.deviation) ** 2 + sigma**2)
        return (sigma * pull - mean - (1 - sigma) * self.deviation**2 * pull,)


class Blocks(nn.Module):
    """A VAE whose latents are means of 2 x 2 pixels."""

    dtype, config = torch.float32, SimpleNamespace(force_upcast=False)

    def encode(self, pixels):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: F.avg_pool2d(pixels, 2)))

    def decode(self, latents, return_dict):
        return (F.interpolate(latents, scale_factor=2),)


class TinyFlowPipeline:
    device = "cpu"

    def __init__(self, denoiser):
        self.denoiser = denoiser

    def to(self, device):
        self.denoiser.to(device)


@dataclass(frozen=True)
class TinyFlow:
    denoiser: Velocity
    vae = Blocks()
    geometry = Geometry(native_px=16, latent_factor=2)
    latent_channels = 3
    text_encoders, image_encoder, layers, tokens = (), None, None, TOKENS

    @property
    def family(self):
        return FAMILY

    sampling = Sampling()

    def path(self, steps, timing):
        return straight_path(steps)

    def guide(self, unconditional, conditional, scale):
        return guide(unconditional, conditional, scale)

    def count(self, prompts):
        return [len(prompt) for prompt in prompts]

    def encode(self, prompts, negative, device):
        codes = [[ord(letter) / 256 for letter in prompt.ljust(TOKENS)[:TOKENS]] for prompt in prompts]
        return Texts(torch.tensor(codes, device=device)[..., None], torch.zeros(len(prompts), 0))

    def arguments(self, rows):
        return {"letters": rows.states}

    def to_canvas(self, latents):
        return (latents - 0.25) * 2

    def from_canvas(self, latents):
        return latents / 2 + 0.25

    def image_adapter(self):
        return None

    def image_scale(self, scale):
        return torch.no_grad()

    def row_bytes(self, height, width):
        return None


def read(config, dtype):
    state = load_file(f"{location(config.id)}/weights.safetensors")
    return TinyFlowPipeline(Velocity(**state).to(dtype))


FAMILY = Family(
    name="tiny flow",
    pipelines="TinyFlow.*",
    abilities=frozenset(),
    geometry=lambda config: Geometry(ModelFiles(config.id).json("flow.json")["native"], 2),
    token_counter=lambda config: len,
    load=read,
    base=lambda pipe, config: TinyFlow(pipe.denoiser),
    course=lambda config, steps, timing: course_of(straight_path(steps), guided=True),
)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "TinyFlowPipeline"}')
    (tmp_path / "flow.json").write_text(json.dumps({"native": 16}))
    save_file({"mean": torch.tensor(-0.4), "deviation": torch.tensor(0.3)}, tmp_path / "weights.safetensors")
    yield ModelConfig(id=str(tmp_path), device="cpu")
    load_models.cache_clear()


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(bases, "FAMILIES", (*bases.FAMILIES, FAMILY))


def test_an_unknown_family_is_refused_by_the_names_of_the_known_ones(config, monkeypatch):
    for call in (geometry_of, load_models):
        with pytest.raises(
            ConfigError, match=r"is a TinyFlowPipeline.* are SDXL, Stable Diffusion 1\.x and 2\.x, .*; give"
        ):
            call(config)
    monkeypatch.setattr(bases, "FAMILIES", (FAMILY,))
    with pytest.raises(ConfigError, match=r"is a StableDiffusionXLPipeline, and .* are tiny flow"):
        geometry_of(ModelConfig())


@pytest.mark.usefixtures("registered")
def test_a_folder_is_measured_and_loaded(config):
    assert geometry_of(config) == Geometry(16, 2)
    assert token_counter(config)("a cat") == 5
    models = load_models(config)
    assert models.base.family is FAMILY
    assert models.dtype == torch.float32
    assert models.identity.startswith(config.id.rpartition("/")[2] + "@")
    assert Models.from_pipeline(TinyFlowPipeline(models.base.denoiser)).geometry == models.geometry


@pytest.mark.usefixtures("registered")
def test_images_come_out_of_it_and_follow_the_prompt(config):
    models, image = load_models(config), some_image(20, 12)

    def draw(method, prompt, **values):
        return upscale_image(models, image, prompt, config=settings(method, steps=8, scale=3, **values), seed=4)

    views = draw("multidiffusion", "a cat")
    assert views.size == (60, 36)
    assert difference(views, draw("direct", "a cat")) <= 1  # there are no neighbours to see
    assert np.asarray(draw("direct", "zzzzzz")).mean() > np.asarray(views).mean() + 10
    following = draw("resmaster", "a cat", image_prompt={"enabled": False})
    assert difference(following, views) > 10
    (low_res,) = generate(models, ["a cat"], [""], [1], 16, 16, 40, 1.0, 1)
    level = np.asarray(low_res).mean() / 127.5 - 1  # 0.25 more than half of the latents' mean
    letters = np.mean([ord(letter) / 256 for letter in "a cat "])
    assert level == pytest.approx(0.25 + (-0.4 + letters) / 2, abs=0.05)


@pytest.mark.usefixtures("registered")
def test_what_it_cannot_do_is_refused_before_anything_is_drawn(config):
    models = load_models(config)
    for method in ("scalecrafter", "fouriscale", "hidiffusion", "freescale"):
        with pytest.raises(ConfigError, match=rf"method {method}: needs convolutions.*\(tiny flow\).*of: SDXL, Stable"):
            upscale_image(models, some_image(), "a cat", config=settings(method))
    with pytest.raises(ConfigError, match=r"upscale.share: needs attention"):
        upscale_image(models, some_image(), "a cat", config=settings("c_upscale"))
    with pytest.raises(ConfigError, match=r"image_prompt.enabled: needs image prompts"):
        upscale_image(models, some_image(), "a cat", config=settings("resmaster"))
    adapter = IpAdapterConfig(id=config.id, weight_name="x.safetensors")
    with pytest.raises(ConfigError, match=r"model.ip_adapter.*tiny flow.*null"):
        load_models(config.model_copy(update={"ip_adapter": adapter}))


@pytest.mark.usefixtures("registered")
def test_what_it_cannot_do_is_refused_at_plan_in_the_same_words(config, tmp_path, monkeypatch):
    def plan(**upscale):
        values = {"name": "d", "root": str(tmp_path / "root"), "prompts": str(tmp_path / "prompts.txt")}
        return preview(parse_config({**values, "model": {"id": config.id}, "upscale": upscale}))

    (tmp_path / "prompts.txt").write_text("a cat\n")
    monkeypatch.setattr(load, "load_pipeline", lambda config: pytest.fail("weights were loaded"))
    for method in ("scalecrafter", "fouriscale", "hidiffusion", "freescale"):
        with pytest.raises(ConfigError, match=rf"method {method}: needs convolutions.*\(tiny flow\).*of: SDXL, Stable"):
            plan(method=method)
    with pytest.raises(ConfigError, match=r"upscale.share: needs attention"):
        plan(method="c_upscale")
    with pytest.raises(ConfigError, match=r"image_prompt.enabled: needs image prompts"):
        plan(method="resmaster")
    for upscale in (
        {"method": "c_upscale", "share": 0},
        {"method": "resmaster", "image_prompt": {"enabled": False}},
        {"method": "resmaster", "image_prompt": {"scale": 0}},
        {"method": "direct"},
        {"method": "lanczos"},
    ):
        assert plan(**upscale).samples == 1
