"""The embedded UNet as a flow-matching model draws what the UNet draws, by every method and every rule of stepping."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

import resmaster_stages as rm
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.diffusion.loop import CanvasNoise, denoise
from resmaster_stages.errors import ConfigError
from resmaster_stages.evaluation.variants import variants
from resmaster_stages.library import single
from resmaster_stages.models.acceleration import has_blocks
from resmaster_stages.models.bases import family_of
from resmaster_stages.models.bases.as_flow import AsFlowPipeline, as_flow
from resmaster_stages.models.bases.base import Asked, Demand
from resmaster_stages.models.captioner import token_counter
from resmaster_stages.models.geometry import geometry_of
from resmaster_stages.models.identity import PICTUREBOOK_AS_FLOW, model_identity
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from resmaster_stages.models.schedule import Timing, course_of, even_course, make_schedule
from resmaster_stages.picturebook.truth import true_image
from resmaster_stages.planning.preview import preview
from resmaster_stages.planning.workload import denoising_of, high_res_work
from tests.methods.common import difference, forwards, request, settings
from tests.tiny_models import SCHEDULER, make_adapted_pipeline, make_pipeline, make_stable_diffusion

FLOW = ModelConfig(id=PICTUREBOOK_AS_FLOW, device="cpu")
PROMPT = "a red house beside a tree"
NATIVE = Timing(256)
PATH = {"_class_name": "EulerDiscreteScheduler", **SCHEDULER}


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Models, Models]]:
    """The embedded model as it is, and as a flow-matching model."""
    plain = load_models(ModelConfig(device="cpu"))
    yield plain, load_models(FLOW)
    load_models.cache_clear()


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return true_image(PROMPT, 96, 96, 0)


def drawn(models: Models, image: Image.Image, method: str, **values: Any) -> torch.Tensor:
    """The clean latents of an image's last pass."""
    config = settings(method, **{"steps": 5, "guidance_scale": 2.0, "negative_prompt": "", **values})
    asked, z = request(models, config, image, PROMPT), None
    noise = CanvasNoise([3], models.base.latent_channels, *asked.canvas_size, models.device)
    for each in config.passes(asked):
        path, draw = asked.path[each.first :], noise.resized(each.height, each.width)
        z, composition = each.begin(z, draw, path[0])
        z = each.finish(denoise(models, composition, path, z, draw, view_batch=16))
    return z


SHARP = 0.001
"""A blur of dilated views that changes nothing."""


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("direct", {}),
        ("multidiffusion", {}),
        ("multidiffusion", {"stepper": "ddim_keep"}),
        ("multidiffusion", {"stepper": "ddim_ancestral"}),
        ("multidiffusion", {"stepper": "dpmpp_2m", "shift": "every_step"}),
        ("resmaster", {}),
        ("resmaster", {"preset": "exact"}),
        ("resmaster", {"preset": "exact", "stepper": "dpmpp_2m", "structure": {"preset": "paper_decay"}}),
        ("resmaster", {"preset": "faithful"}),
        ("demofusion", {"sigma": SHARP}),
        ("demofusion", {"sigma": SHARP, "preset": "faithful", "stepper": "posterior", "refine": True}),
        ("c_upscale", {}),
        ("c_upscale", {"stepper": "posterior", "start": 0.3}),
        ("scalecrafter", {}),
        ("fouriscale", {}),
        ("freescale", {}),
        ("scalediff", {}),
        ("scalediff", {"start": 0.3, "stepper": "posterior"}),
    ],
    ids=str,
)
def test_the_same_is_drawn(both: tuple[Models, Models], image: Image.Image, method: str, values: dict) -> None:
    plain, flow = (drawn(models, image, method, **values) for models in both)
    assert float((plain - flow).abs().max() / plain.abs().max()) < 1e-5
    assert float(plain.std()) > 0.3


def test_the_same_images_come_out(both: tuple[Models, Models], image: Image.Image) -> None:
    values = {"steps": 5, "guidance_scale": 2.0, "captions": "prompt", "scale": 2, "seed": 7}
    plain, flow = (rm.upscale(image, PROMPT, model=models, **values) for models in both)
    assert difference(plain, flow) <= 1
    assert difference(plain, rm.upscale(image, PROMPT, model=both[1], **values, image_prompt={"enabled": False})) > 5
    (plain,), (flow,) = (rm.generate(PROMPT, model=models, steps=5, guidance_scale=2.0) for models in both)
    assert difference(plain, flow) <= 1
    assert forwards(both[1].base.denoiser) == {}


def test_other_latents_than_the_steps_are_read_otherwise(both: tuple[Models, Models], image: Image.Image) -> None:
    """Which DemoFusion's dilated views are, unless they are not blurred."""
    plain, flow = (drawn(models, image, "demofusion") for models in both)
    assert float((plain - flow).abs().max() / plain.abs().max()) > 0.1
    step, z, prepared, eps = make_schedule(PATH, 10)[3], *torch.randn(3, 1, 4, 8, 8).unbind(0)
    other = as_flow(step)
    scale = step.alpha + step.sigma  # from latents of the flow path to those of the UNet's
    x0, _ = step.split(scale * prepared, eps)
    velocity = eps - x0
    torch.testing.assert_close(step.split(scale * z, eps)[0] - x0, (z - prepared) * scale / step.alpha)
    torch.testing.assert_close(other.split(z, velocity)[0] - x0, z - prepared, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [PATH, {**PATH, "timestep_spacing": "trailing"}], ids=["leading", "trailing"])
@pytest.mark.parametrize("count", [1, 7, 50, 1000])
def test_the_path_has_the_levels_and_fractions_of_the_unets_own(config: dict, count: int) -> None:
    path = make_schedule(config, count)
    for step, flow in zip(path, map(as_flow, path)):
        assert flow.alpha / flow.sigma == pytest.approx(step.alpha / step.sigma)
        assert flow.alpha + flow.sigma == pytest.approx(1)
        assert (flow.done, flow.cosine, flow.index, flow.count) == (step.done, step.cosine, step.index, step.count)
        assert flow.t == pytest.approx(1000 * flow.sigma)
    assert (flow.alpha_next, flow.sigma_next) == (1, 0)
    courses = [replace(course_of(steps, guided=True), decay=()) for steps in (path, [as_flow(step) for step in path])]
    assert courses == [even_course(count)] * 2


def test_pure_noise_has_the_spread_that_it_has_for_the_unet() -> None:
    step, noise = make_schedule(PATH, 50)[0], torch.randn(2, 4, 8, 8)
    assert step.pure(noise) is noise
    torch.testing.assert_close(as_flow(step).pure(noise), noise / (step.alpha + step.sigma))


@pytest.mark.parametrize("count", [20, 1000])
def test_the_unet_sees_its_own_timesteps(both: tuple[Models, Models], count: int) -> None:
    plain, flow = (models.base for models in both)
    levels = torch.tensor([step.t for step in flow.path(count, NATIVE)]) / 1000
    assert [float(flow.denoiser.timestep(level)) for level in levels] == [step.t for step in plain.path(count, NATIVE)]


def test_levels_between_timesteps_are_between_them(both: tuple[Models, Models]) -> None:
    network = both[1].base.denoiser
    for index in (0, 300, 998):
        low, high = network.levels[index : index + 2]
        assert float(network.timestep((low + high) / 2)) == pytest.approx(index + 0.5, abs=0.02)
    assert float(network.timestep(torch.tensor(0.0))) == 0
    assert float(network.timestep(torch.tensor(1.0))) == 999


def test_a_loaded_pipeline_can_be_one() -> None:
    pipe = make_adapted_pipeline()
    models = Models.from_pipeline(AsFlowPipeline(pipe))
    assert models.base.image_adapter() is not None
    assert models.base.layers == "sdxl"
    assert models.base.row_bytes(16, 16) == Models.from_pipeline(pipe).base.row_bytes(16, 16)
    assert Models.from_pipeline(AsFlowPipeline(make_pipeline())).base.image_adapter() is None


def test_what_cannot_be_one_is_refused() -> None:
    pipe = make_pipeline()
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    with pytest.raises(ConfigError, match="its UNet predicts v_prediction; use it as it is"):
        Models.from_pipeline(AsFlowPipeline(pipe))
    with pytest.raises(ConfigError, match="SDXL refiner"):
        Models.from_pipeline(AsFlowPipeline(make_stable_diffusion()))


def test_it_is_named_measured_and_counted_as_the_pack() -> None:
    pack = ModelConfig()
    assert model_identity(FLOW) == model_identity(pack).replace("picturebook@", "picturebook-as-flow@")
    assert geometry_of(FLOW) == geometry_of(pack)
    assert token_counter(FLOW)(PROMPT) == token_counter(pack)(PROMPT)
    assert single(PICTUREBOOK_AS_FLOW) == {**single("picturebook"), "model": {"id": PICTUREBOOK_AS_FLOW}}
    (variant,) = variants(parse_config({"name": "demo", "model": {"id": FLOW.id}}), "direct", "2x2")
    assert variant.config.quality.features == "picturebook"


def test_it_is_planned_as_the_pack(tmp_path: Any) -> None:
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n")

    def look(**upscale: Any) -> Any:
        values = {"name": "d", "root": str(tmp_path / "root"), "prompts": str(tmp_path / "prompts.txt")}
        return preview(parse_config({**values, "model": {"id": PICTUREBOOK_AS_FLOW}, "upscale": upscale}))

    assert look().samples == 1
    for method in (
        "resmaster",
        "demofusion",
        "c_upscale",
        "scalecrafter",
        "fouriscale",
        "hidiffusion",
        "freescale",
        "scalediff",
    ):
        config = settings(method, scale=4, steps=10)
        assert high_res_work(config, denoising_of(FLOW), 128, 128) == high_res_work(
            config, denoising_of(ModelConfig()), 128, 128
        )


def test_a_time_shift_is_refused(both: tuple[Models, Models], image: Image.Image) -> None:
    for shift in (2.0, "sqrt"):
        with pytest.raises(ConfigError, match=r"upscale\.time_shift: this model has no time shift; leave it out"):
            drawn(both[1], image, "multidiffusion", time_shift=shift)
    asked = (Asked("upscale", 5, 2.0),)
    checks = dict(family_of(FLOW).checks(FLOW, Demand(True, asked, time_shift=True)))
    with pytest.raises(ConfigError, match=r"upscale\.time_shift: this model has no time shift"):
        checks["upscale.time_shift"]()
    assert "upscale.time_shift" not in dict(family_of(FLOW).checks(FLOW, Demand(True, asked)))
    views = request(both[1], settings("multidiffusion"), image).views()
    assert len(both[1].base.path(5, settings("multidiffusion").timing(views))) == 5


def test_its_blocks_can_be_compiled(both: tuple[Models, Models]) -> None:
    assert all(has_blocks(models.base.denoiser) for models in both)
