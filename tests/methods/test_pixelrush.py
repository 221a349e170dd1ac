"""PixelRush: partial inversion, noise that is turned on a sphere, and two evaluations of a view per doubling."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import with_method
from resmaster_stages.diffusion import autoencoder
from resmaster_stages.diffusion.cost import counting
from resmaster_stages.diffusion.loop import CanvasNoise, denoise
from resmaster_stages.diffusion.reference import enlarged
from resmaster_stages.diffusion.steppers import STEPPERS
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.direct import whole_canvas_composition
from resmaster_stages.methods.pixelrush import Rushed, slerp
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.models.parts import Models
from resmaster_stages.planning.checks import Findings, checks_of, notes_of
from resmaster_stages.planning.workload import Denoising, high_res_work
from tests.methods.common import forwards, plain, request, schedule, settings, some_image
from tests.tiny_models import with_base
from tests.tiny_qwen_image import make_qwen_image
from tests.tiny_transformers import make_flux

NOISE = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=NOISE)


class Always:
    """Predicts the same noise whatever the latents and the timestep."""

    dtype = torch.float32

    def __call__(self, sample, timestep, *, return_dict, **arguments):
        return (torch.full_like(sample, 0.3),)


def run(models: Models, config, low_res=None):
    """The clean latents of the only pass, and the latents that it began with."""
    asked = request(models, config, low_res)
    (only,) = asked.config.passes(asked)
    noise = CanvasNoise([3], models.base.latent_channels, only.height, only.width, models.device)
    begun, composition = only.begin(None, noise, only.path[0])
    return denoise(models, composition, only.path, begun, noise, view_batch=4), begun


def test_noise_that_is_kept_and_constant_gives_back_the_enlarged_image() -> None:
    """Inverted, and then undone."""
    made, begun = run(with_base(plain(), denoiser=Always()), settings("pixelrush", steps=1, keep=1.0))
    torch.testing.assert_close(made, begun, atol=1e-5, rtol=1e-5)
    assert begun.abs().max() > 0.1


@pytest.mark.parametrize("noised_to", [1, 9])
def test_there_are_no_more_steps_than_timesteps(noised_to):
    config = settings("pixelrush", noised_to=noised_to, steps=noised_to + 1)
    assert upscale_image(plain(), some_image(), "a cat", config=config).size == (128, 128)
    with pytest.raises(ValueError, match=f"more than the {noised_to + 1} timesteps"):
        settings("pixelrush", noised_to=noised_to, steps=noised_to + 2)


def test_random_noise_brings_detail_and_more_of_it_with_less_kept() -> None:
    models = with_base(plain(), denoiser=Always())
    added = []
    for keep in (0.95, 0.5):
        made, begun = run(models, settings("pixelrush", steps=1, keep=keep))
        added.append(float((made - begun).std()))
    assert 0.02 < added[0] < 0.15 < added[1]


def test_the_inverting_step_is_the_closed_form() -> None:
    asked = request(plain(), settings("pixelrush", steps=1))
    up, down = asked.config.path(asked)
    (at,) = plain().base.path(1, replace(asked.config.timing(asked.views()), timesteps=(249,)))
    z0, eps = random(2, 4, 6, 6), random(2, 4, 6, 6)
    x0, said = up.split(z0, eps)
    assert torch.equal(x0, z0)
    assert torch.equal(said, eps)
    stepped = Rushed(0.95, STEPPERS["ddim_keep"])(z0, x0, said, up, lambda: pytest.fail("it draws no noise"))
    assert torch.equal(stepped, at.alpha * z0 + at.sigma * eps)
    assert (down.t, down.alpha, down.sigma, down.alpha_next, down.sigma_next) == (249, at.alpha, at.sigma, 1.0, 0.0)
    assert [(step.index, step.count, step.t) for step in (up, down)] == [(0, 2, 0), (1, 2, 249)]


@pytest.mark.parametrize(
    ("values", "times"),
    [({}, [0, 249]), ({"steps": 2}, [0, 249, 124]), ({"noised_to": 499, "steps": 4}, [0, 499, 374, 249, 124])],
    ids=str,
)
def test_more_steps_are_evenly_spaced(values: dict, times: list[int]) -> None:
    asked = request(plain(), settings("pixelrush", **{"steps": 1, **values}))
    path = asked.config.path(asked)
    assert [step.t for step in path] == times
    assert (path[-1].alpha_next, path[-1].sigma_next) == (1.0, 0.0)
    assert all((a.alpha_next, a.sigma_next) == (b.alpha, b.sigma) for a, b in pairwise(path))


def test_slerp_keeps_the_length_of_orthogonal_tensors_of_one_length() -> None:
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    a[:, 0], b[:, 1] = 2.0, 2.0
    for share in (0.1, 0.5, 0.95):
        mixed = slerp(a, b, share)
        torch.testing.assert_close(mixed.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
    torch.testing.assert_close(slerp(a, b, 0.5), (a + b) / 2**0.5)


def test_slerp_begins_and_ends_at_its_tensors() -> None:
    noise, eps = random(2, 4, 8, 8), random(2, 4, 8, 8)
    torch.testing.assert_close(slerp(noise, eps, 1.0), eps)
    torch.testing.assert_close(slerp(noise, eps, 0.0), noise)


def test_slerp_is_straight_between_tensors_of_one_direction_and_between_zeros() -> None:
    eps = random(1, 4, 8, 8)
    torch.testing.assert_close(slerp(2 * eps, eps, 0.25), 1.75 * eps)
    zeros = torch.zeros(1, 4, 2, 2)
    assert torch.equal(slerp(zeros, zeros, 0.95), zeros)


def test_the_angle_is_that_of_each_sample() -> None:
    noise, eps = random(2, 4, 8, 8), random(2, 4, 8, 8)
    noise[1] = eps[1]
    both = slerp(noise, eps, 0.7)
    for i in (0, 1):
        torch.testing.assert_close(both[i : i + 1], slerp(noise[i : i + 1], eps[i : i + 1], 0.7))


def test_more_noise_than_the_step_takes_away_would_be_added_if_the_share_were_of_the_random_noise() -> None:
    """Why `keep` is the share of the predicted noise: the error of x0, in standard deviations of latents."""
    step = next(each for each in schedule(1000) if each.t == 249)
    eps, noise = random(1, 4, 64, 64), random(1, 4, 64, 64)
    added = [float((step.sigma / step.alpha * (slerp(noise, eps, keep) - eps)).std()) for keep in (0.95, 0.05)]
    assert added == pytest.approx([0.054, 0.94], abs=0.03)


def test_4096_px_take_116_evaluations() -> None:
    """Two doublings of 1024 px, of 9 and 49 views, each twice."""
    sizes = (Denoising(Geometry(1024, 8)), 1024, 1024)
    work = high_res_work(settings("pixelrush", scale=4), *sizes)
    assert [each.rows for each in work] == [2 * 9, 2 * 49]
    assert sum(each.rows for each in high_res_work(settings("pixelrush", steps=2, scale=4), *sizes)) == 3 * (9 + 49)


def test_at_the_native_size_it_is_direct_on_the_same_path() -> None:
    models = plain()
    config = settings("pixelrush", steps=2, scale=1, keep=1.0, stepper="ddim_keep")
    ours, begun = run(models, config)
    asked = request(models, config)
    pixels = enlarged(asked.image_before(None), asked.height, asked.width)
    assert torch.equal(begun, autoencoder.encode(models, pixels))
    whole = replace(asked, config=settings("direct", scale=1, stepper="ddim_keep", guidance_scale=1.0))
    composition = whole_canvas_composition(whole, whole.config.guidance(models))
    noise = CanvasNoise([3], 4, *begun.shape[-2:], models.device)
    assert torch.equal(ours, denoise(models, composition, config.path(asked), begun, noise, view_batch=4))


def test_samples_do_not_know_of_each_other() -> None:
    models, config = plain(), settings("pixelrush", steps=1, scale=1.5)
    alone = [request(models, config, some_image(seed=seed), prompt) for seed, prompt in ((0, "a cat"), (1, "a dog"))]

    def made(order: tuple[int, ...]) -> torch.Tensor:
        pixels = torch.cat([alone[i].reference.pixels for i in order])
        small = torch.cat([alone[i].reference.low_res for i in order])
        asked = replace(
            alone[0],
            prompts=tuple(alone[i].prompts[0] for i in order),
            negative_prompts=("",) * len(order),
            reference=replace(alone[0].reference, pixels=pixels, low_res=small),
        )
        (only,) = config.passes(asked)
        noise = CanvasNoise(order, 4, only.height, only.width, models.device)
        z, composition = only.begin(None, noise, only.path[0])
        return denoise(models, composition, only.path, z, noise, view_batch=1)

    torch.testing.assert_close(made((0, 1)), made((1, 0)).flip(0))
    torch.testing.assert_close(made((1, 0))[:1], made((1,)))


def test_transformers_take_it_too() -> None:
    models = Models.from_pipeline(make_flux())
    config = settings("pixelrush", steps=2, scale=2, view_batch=1)
    with counting() as counted:
        made = upscale_image(models, some_image(64, 64), "a cat", config=config, seed=1)
    assert made.size == (128, 128)
    assert counted.rows == 3 * 9
    assert made.tobytes() != upscale_image(models, some_image(64, 64), "a cat", config=config, seed=2).tobytes()
    assert forwards(models.base.denoiser.network) == {}


def test_the_plan_says_that_few_step_weights_are_missing() -> None:
    def notes(**model: object) -> list[str]:
        values = {"name": "d", "model": model, "upscale": {"method": "pixelrush"}}
        return [note for note in notes_of(parse_config(values)) if "pixelrush" in note]

    assert len(notes()) == 1
    assert "model.few_step names no few-step weights" in notes()[0]
    weights = {"id": "ByteDance/SDXL-Lightning", "weight_name": "sdxl_lightning_4step_lora.safetensors"}
    assert notes(few_step=weights) == []


def test_there_is_no_guidance() -> None:
    with pytest.raises(ConfigError, match="guidance_scale"):
        parse_config({"name": "d", "upscale": {"method": "pixelrush", "guidance_scale": 5}})


def test_steps_and_guidance_of_another_method_are_not_taken_over() -> None:
    """They count a whole path."""
    before = {"method": "resmaster", "steps": 20, "guidance_scale": 4.0, "micro_conditioning": "native"}
    assert with_method(before, "pixelrush") == {"method": "pixelrush", "micro_conditioning": "native"}
    assert with_method({**before, "method": "pixelrush", "steps": 1, "guidance_scale": 1}, "resmaster") == {
        "method": "resmaster",
        "micro_conditioning": "native",
    }


@pytest.mark.parametrize("name", ["qwen_image", "flux"])
def test_the_plan_takes_its_own_steps_on_transformers(name: str, tmp_path: Path) -> None:
    """Also where the model's own path needs two steps."""
    make = {"qwen_image": make_qwen_image, "flux": make_flux}[name]
    make().save_pretrained(tmp_path / name)
    values = {"name": "d", "model": {"id": str(tmp_path / name)}, "upscale": {"method": "pixelrush", "scale": 2}}
    config = parse_config({**values, "low_res": {"steps": 4, "guidance_scale": 1}, "quality": {"clip": None}})
    mistakes = Findings()
    mistakes.look(checks_of(config, ("high_res",), here=False))
    mistakes.tell()
