"""Stable Diffusion 1.5 and 2.1 through the same engine: one text encoder, no size conditions, epsilon or v."""

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.diffusion.loop import CanvasNoise, denoise
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.generate import generate
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.models.geometry import geometry_of
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from resmaster_stages.models.schedule import Timing, make_schedule
from tests.methods.common import DIFFUSION_METHODS, difference, forwards, request, settings, some_image
from tests.tiny_models import SCHEDULER, counted, make_pipeline, make_stable_diffusion

KINDS = ("epsilon", "v_prediction")


@pytest.fixture(scope="module", params=KINDS)
def pipe(request):
    return make_stable_diffusion(request.param)


@pytest.mark.parametrize(("negative", "guidance"), [("", 7.5), ("ugly", 7.5), ("", 1.0)])
def test_one_view_is_what_the_pipeline_draws(pipe, negative, guidance):
    expected = pipe(
        ["a cat", "a big house"],
        negative_prompt=[negative] * 2,
        num_inference_steps=6,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        height=64,
        width=48,
    ).images
    models = Models.from_pipeline(pipe)
    ours = list(generate(models, ["a cat", "a big house"], [negative] * 2, [5, 6], 64, 48, 6, guidance, 2))
    for mine, theirs in zip(ours, expected):
        assert difference(mine, theirs) <= 1
    assert difference(ours[0], ours[1]) > 10


def test_its_sizes_and_parts(pipe):
    models = Models.from_pipeline(pipe)
    assert (models.geometry.native_px, models.geometry.latent_factor, len(models.base.text_encoders)) == (64, 4, 1)
    assert not models.base.told_sizes
    assert models.base.image_adapter() is None
    assert Models.from_pipeline(make_pipeline()).base.told_sizes


def test_latents_are_scaled_as_the_vae_says(pipe):
    from resmaster_stages.diffusion import autoencoder

    models, pixels = Models.from_pipeline(pipe), torch.rand(1, 3, 64, 64) * 2 - 1
    expected = pipe.vae.encode(pixels).latent_dist.mode() * 0.18215
    torch.testing.assert_close(autoencoder.encode(models, pixels), expected)


@pytest.mark.parametrize("method", DIFFUSION_METHODS)
def test_every_method_runs_and_leaves_the_model_as_it_was(pipe, method):
    models = Models.from_pipeline(pipe)
    values = {"image_prompt": {"enabled": False}} if method == "resmaster" else {}
    with counted(models.base.denoiser) as shapes:
        result = upscale_image(models, some_image(60, 72), "a cat", config=settings(method, scale=2.2, **values))
    assert result.size == (132, 158)
    assert shapes
    assert forwards(models.base.denoiser) == {}
    assert len(np.unique(np.asarray(result))) > 10


def test_v_and_epsilon_of_one_network_lead_to_the_same_canvas():
    """A network whose v is computed from another's epsilon draws the other's canvas, through views and every
    stepper."""
    teller = Models.from_pipeline(make_stable_diffusion())
    path = {kind: make_schedule({**SCHEDULER, "prediction_type": kind}, 5) for kind in KINDS}
    plain = teller.base.denoiser.forward

    def as_v(sample, timestep, *args, **kwargs):
        step = next(step for step in path["epsilon"] if step.t == int(timestep))
        (eps,) = plain(sample, timestep, *args, **kwargs)
        x0 = (sample - step.sigma * eps) / step.alpha
        return (step.alpha * eps - step.sigma * x0,)

    for stepper in ("ddim_keep", "ddim_implied", "posterior", "ddim_ancestral"):
        asked = request(teller, settings("multidiffusion", stepper=stepper))
        results = []
        for kind in KINDS:
            teller.base.denoiser.forward = plain if kind == "epsilon" else as_v
            noise = CanvasNoise([3], 4, 32, 32, teller.device)
            composition = asked.config.compose(asked)
            results.append(denoise(teller, composition, path[kind], noise(), noise, view_batch=16))
        del teller.base.denoiser.forward
        torch.testing.assert_close(*results, atol=2e-3, rtol=1e-3)


def test_image_prompts_say_what_they_need():
    with pytest.raises(ConfigError, match="IP-Adapter"):
        upscale_image(
            Models.from_pipeline(make_stable_diffusion()), some_image(), "a cat", config=settings("resmaster")
        )


def test_a_folder_of_it_loads(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pipe = make_stable_diffusion("v_prediction")
    pipe.scheduler = PNDMScheduler(**SCHEDULER, skip_prk_steps=True, prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path / "sd")
    config = ModelConfig(id=str(tmp_path / "sd"), device="cpu")
    models = load_models(config)
    load_models.cache_clear()
    assert geometry_of(config) == Geometry(64, 4) == models.geometry
    last = models.base.path(20, Timing(256))[-1]
    assert last.prediction_type == "v_prediction"
    assert last.alpha_next == pytest.approx(float(pipe.scheduler.final_alpha_cumprod) ** 0.5)
