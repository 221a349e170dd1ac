"""Structural guidance inside a method: its filters, and the reference that keeps pace with the canvas."""

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.structure import STRUCTURE_PRESETS, StructureConfig
from resmaster_stages.diffusion.composer import Composer
from resmaster_stages.diffusion.guidance import TEXT, ClassifierFree, DenoiserCall
from resmaster_stages.diffusion.loop import CanvasNoise, denoise
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.small_image import time_matched
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases.unet import Unet
from resmaster_stages.models.flow import flow_path
from resmaster_stages.models.parts import Models
from tests.methods.common import adapted, difference, plain, request, schedule, settings, some_image
from tests.tiny_models import counted, with_base

STEPS = 4
PATHS = {"epsilon": schedule(STEPS), "flow": flow_path([1.0, 0.9, 0.75, 0.5, 0.0])}
ALL_ONES = {"gaussian": {"cutoff": 1e4}, "butterworth": {"filter": "butterworth", "cutoff": 1e6}}
BARE = {"preset": "exact", "image_prompt": {"enabled": False}, "text_prompt": {"enabled": False}, "steps": STEPS}
SMALL = some_image(40, 48)  # 10 x 12 latents: other than a view, which has 16 x 16


class OnPath(Unet):
    """A base on a path of the test."""

    def path(self, steps, timing):
        return self.scheduler_config["path"]


class Knowing:
    """Predicts exactly, for latents of one shape that it knows; takes everything else for noise on zeros."""

    dtype = torch.float32

    def __init__(self, path):
        self.path, self.known = path, torch.zeros(0)

    def __call__(self, sample, timestep, *, return_dict, **arguments):
        step = min(self.path, key=lambda step: abs(step.t - float(timestep)))
        x0 = self.known if sample.shape[-2:] == self.known.shape[-2:] else torch.zeros_like(sample)
        eps = (sample - step.alpha * x0) / step.sigma
        return (eps - x0 if step.prediction_type == "flow" else eps,)


def knowing(kind) -> Models:
    base = with_base(plain(), denoiser=Knowing(PATHS[kind]), scheduler_config={"path": PATHS[kind]}).base
    models = plain()
    return Models(
        **{each.name: getattr(models, each.name) for each in fields(models) if each.name != "base"},
        base=OnPath(**{each.name: getattr(base, each.name) for each in fields(base)}),
    )


def drawn(models, asked):
    """The canvas of a method with one pass."""
    noise = CanvasNoise([3], 4, *asked.canvas_size, models.device)
    (only,) = asked.config.passes(asked)
    path = asked.path[only.first :]
    z, composition = only.begin(None, noise, path[0])
    return denoise(models, composition, path, z, noise, view_batch=16)


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("filter", ALL_ONES)
@pytest.mark.parametrize("anchor", ["final", "time_matched"])
@pytest.mark.parametrize("method", ["resmaster", "c_upscale"])
def test_a_filter_of_all_ones_at_every_step_returns_the_reference(kind, filter, anchor, method):
    """Of a model that knows the low-res image, the time-matched reference is the low-res image's latents, enlarged."""
    models = knowing(kind)
    structure = {"structure": {**ALL_ONES[filter], "cutoff_units": "hr_nyquist", "stop": 1.0, "anchor": anchor}}
    values = {"steps": STEPS, "share": 0.0, "start": 0.0} if method == "c_upscale" else BARE
    asked = request(models, settings(method, **values, **structure), SMALL)
    models.base.denoiser.known = asked.required_reference().small_latents
    assert models.base.denoiser.known.shape == (1, 4, 12, 10)
    expected = asked.required_reference().latents
    if anchor == "time_matched":
        expected = F.interpolate(models.base.denoiser.known, size=(24, 20), mode="bicubic")
    torch.testing.assert_close(drawn(models, asked), expected, atol=2e-4, rtol=1e-4)


def by_hand(models, asked, step, draw, scale):
    """The guided x0 of the low-res image, as plain SDXL predicts it, without the engine's loop."""
    base, small = models.base, asked.required_reference().small_latents
    z = step.alpha * small + step.sigma * draw
    outputs = []
    for text, negative in ((asked.negative_prompts[0], True), (asked.prompts[0], False)):
        encoded = base.encode([text], negative, models.device)
        added = {"text_embeds": encoded.pooled, "time_ids": torch.tensor([[48, 40, 0, 0, 48, 40.0]])}
        outputs.append(base.denoiser(z, torch.tensor(step.t), encoded.states, added_cond_kwargs=added).sample)
    eps = outputs[0] + scale * (outputs[1] - outputs[0])
    return (z - step.sigma * eps) / step.alpha


@torch.inference_mode()
def test_the_time_matched_reference_is_the_guided_prediction_of_the_plain_low_res_image():
    """Of a model with image prompts, too: a low-res image is generated without any."""
    step, draw = schedule()[20], torch.randn(1, 4, 12, 10, generator=torch.Generator().manual_seed(5))
    models = adapted()
    asked = request(models, settings("resmaster"), SMALL)
    with models.base.image_scale(0.8):
        ours = time_matched(asked, draw, ClassifierFree(7.5))(step)
    expected = by_hand(plain(), asked, step, draw, 7.5)
    torch.testing.assert_close(ours, F.interpolate(expected, size=(24, 20), mode="bicubic"), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_the_composer_of_attention_does_not_act_on_it():
    step, draw = schedule()[20], torch.randn(1, 4, 12, 10)
    models = plain()
    asked = request(models, settings("c_upscale"), SMALL)
    composer = Composer(asked.views(), (12, 10), 1.0, models.device)
    alone = time_matched(asked, draw, ClassifierFree(7.5))(step)
    with composer.patch(models.base.denoiser, DenoiserCall(step, (TEXT,))):
        beside = time_matched(asked, draw, ClassifierFree(7.5), composer.capturing)(step)
    assert torch.equal(beside, alone)


def test_the_low_res_image_is_predicted_once_at_each_step_of_the_swap():
    models = adapted()
    values = {"steps": 4, "guidance_stop": 0.25, "structure": {"preset": "hiflow", "stop": 0.5}}
    with counted(models.base.denoiser) as shapes:
        upscale_image(models, SMALL, "a cat", config=settings("resmaster", **{**BARE, **values}))
    assert shapes == [(8, 4, 16, 16), (2, 4, 12, 10), (4, 4, 16, 16), (1, 4, 12, 10), *[(4, 4, 16, 16)] * 2]


@pytest.mark.parametrize("method", ["resmaster", "c_upscale"])
def test_every_choice_changes_the_image_and_none_depends_on_the_batch(method):
    def make(structure, view_batch=16):
        captions = ["a dog", "tree", "sky", "sea"]
        config = settings(method, steps=3, structure={"stop": 1.0, **structure}, view_batch=view_batch)
        return upscale_image(adapted(), SMALL, "a cat", config=config, captions=captions)

    choices = (
        {},
        {"filter": "haar"},
        {"filter": "butterworth", "cutoff": 0.4},
        {"strength": 0.5},
        {"weight": "cosine_decay"},
        {"anchor": "time_matched"},
        {"preset": "hiflow"},
        {"preset": "imax"},
    )
    images = [make(choice) for choice in choices]
    assert len({image.tobytes() for image in images}) == len(choices)
    assert difference(images[-2], make(choices[-2], view_batch=1)) <= 1


def high_res_identity(**structure):
    config = parse_config({"name": "d", "upscale": {"structure": structure}})
    assert isinstance(config, DatasetConfig)
    return config.upscale.identity()["structure"]


def test_what_older_datasets_do_not_have_is_identity_only_where_it_is_used():
    before = {"enabled", "cutoff", "cutoff_units", "start", "stop", "weight"}
    assert high_res_identity().keys() == before
    assert high_res_identity(preset="paper_decay").keys() == before
    assert high_res_identity(preset="hiflow").keys() == before | {"filter", "anchor"}
    assert high_res_identity(strength=0.5)["strength"] == 0.5


def test_a_cutoff_that_would_not_be_read_is_refused():
    with pytest.raises(ConfigError, match="cutoff is set, but filter haar has none; drop it"):
        parse_config({"name": "d", "upscale": {"structure": {"filter": "haar", "cutoff": 0.3}}})
    with pytest.raises(ConfigError, match="cutoff_units is set"):
        parse_config({"name": "d", "upscale": {"structure": {"preset": "imax", "cutoff_units": "lr_nyquist"}}})
    config = parse_config({"name": "d", "upscale": {"method": "c_upscale", "structure": {"filter": "haar"}}})
    assert parse_config(config.model_dump(mode="json")) == config
    for preset in STRUCTURE_PRESETS:
        StructureConfig.model_validate({"preset": preset, "filter": "haar"})
