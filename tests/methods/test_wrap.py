"""Images that wrap: a low-res image that is rolled gives the large image, rolled."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resmaster_stages.config.dataset import LowResConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import Method, methods
from resmaster_stages.diffusion.cost import UnetWork, counting
from resmaster_stages.diffusion.loop import CanvasNoise
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.generate import generate
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.models.parts import Models
from resmaster_stages.planning.workload import Denoising, high_res_work
from tests.methods.common import adapted, difference, forwards, settings, some_image
from tests.tiny_transformers import make_flux

WRAPPING = tuple(name for name, each in methods().items() if "wrap" in each.model_fields)


def rolled(image: Image.Image, down: int, across: int) -> Image.Image:
    return Image.fromarray(np.roll(np.asarray(image), (down, across), (0, 1)))


@pytest.fixture
def roll_noise(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes all noise roll by these fractions of the canvas's height and width."""
    draw = CanvasNoise.__call__

    def by(down: float, across: float) -> None:
        def rolled_draw(noise: CanvasNoise) -> torch.Tensor:
            height, width = noise.shape[2:]
            return draw(noise).roll((round(down * height), round(across * width)), (2, 3))

        monkeypatch.setattr(CanvasNoise, "__call__", rolled_draw)

    return by


NATIVE: dict[str, Any] = {"micro_conditioning": "native", "steps": 3, "view_batch": 8}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("multidiffusion", {}),
    ("multidiffusion", {"fuse": "gaussian", "init": "noised_lr", "start": 0.3, "stepper": "ddim_ancestral"}),
    ("resmaster", {"preset": "exact"}),
    ("resmaster", {"preset": "faithful", "fuse": "cosine"}),
    ("resmaster", {"steps": 8, "shift_stride": 0.75}),
    ("resmaster", {"preset": "exact", "structure": {"preset": "imax"}}),
    ("resmaster", {"preset": "exact", "structure": {"preset": "hiflow"}}),
    ("c_upscale", {"steps": 6}),
    ("direct", {}),
    ("direct", {"init": "noised_lr", "start": 0.3}),
]


@pytest.mark.parametrize(("method", "values"), CASES, ids=str)
def test_rolling_the_low_res_image_rolls_the_result(method: str, values: dict[str, Any], roll_noise: Any) -> None:
    """By half the image, which has an even number of views and of the decoder's tiles along each axis."""
    config = settings(method, scale=4, wrap="both", **{**NATIVE, **values})
    image = some_image(48, 64)
    straight = upscale_image(adapted(), image, "a cat", config=config)
    roll_noise(0.5, 0.5)
    moved = upscale_image(adapted(), rolled(image, 32, 24), "a cat", config=config)
    assert difference(moved, rolled(straight, 128, 96)) <= 2
    assert difference(moved, straight) > 20


def test_without_wrapping_it_does_not(roll_noise: Any) -> None:
    config = settings("resmaster", scale=4, preset="exact", **NATIVE)
    image = some_image(48, 48)
    straight = upscale_image(adapted(), image, "a cat", config=config)
    roll_noise(0.5, 0.5)
    moved = upscale_image(adapted(), rolled(image, 24, 24), "a cat", config=config)
    assert difference(moved, rolled(straight, 96, 96)) > 20


@pytest.mark.parametrize(("wrap", "down", "across"), [("horizontal", 0, 0.5), ("vertical", 0.5, 0)])
def test_one_axis_may_wrap_alone(wrap: str, down: float, across: float, roll_noise: Any) -> None:
    config = settings("resmaster", scale=1.5, preset="exact", wrap=wrap, **NATIVE)
    height, width = (33, 128) if wrap == "horizontal" else (128, 33)  # 192 px wrap, and 50 px are padded
    image = some_image(width, height)
    straight = upscale_image(adapted(), image, "a cat", config=config)
    assert sorted(straight.size) == [50, 192]
    roll_noise(down, across)
    by = (round(down * height), round(across * width))
    moved = upscale_image(adapted(), rolled(image, *by), "a cat", config=config)
    there = rolled(straight, round(down * 192), round(across * 192))
    assert difference(moved, there) <= 2


def test_low_res_images_that_wrap_are_rolled_by_their_noise(roll_noise: Any) -> None:
    def drawn(wrap: Any) -> Image.Image:
        (image,) = generate(adapted(), ["a cat"], [""], [3], 64, 64, 3, 5.0, 1, wrap)
        assert isinstance(image, Image.Image)
        return image

    straight, unwrapped = drawn("both"), drawn("none")
    assert difference(straight, unwrapped) > 5
    roll_noise(0.5, 0.5)
    assert difference(drawn("both"), rolled(straight, 32, 32)) <= 2
    assert difference(drawn("none"), rolled(unwrapped, 32, 32)) > 5


@pytest.mark.parametrize("method", WRAPPING)
@pytest.mark.parametrize("wrap", ["horizontal", "vertical", "both"])
@pytest.mark.parametrize(("scale", "size"), [(4, (48, 32)), (1, (64, 64)), (2, (24, 80))])
def test_the_work_of_images_that_wrap_is_estimated(method: str, wrap: str, scale: float, size: tuple[int, int]) -> None:
    config = settings(method, scale=scale, wrap=wrap, view_batch=1)
    models = adapted()
    with counting() as counted:
        upscale_image(models, some_image(*size), "a cat", config=config)
    work = high_res_work(config, Denoising(models.geometry), size[1], size[0])
    assert sum(each.rows for each in work) == counted.rows
    assert sum(each.rows * each.area for each in work) == pytest.approx(counted.native_rows)


def test_views_of_sdxl_that_wrap() -> None:
    """8 columns of views instead of 7 at 4x, and none more while they move."""
    sizes = (Denoising(Geometry(1024, 8)), 1024, 1024)
    exact = settings("resmaster", preset="exact", scale=4, steps=50, wrap="both")
    assert high_res_work(exact, *sizes) == (UnetWork(50 * 2 * 64, 1.0),)
    rows = sum(each.rows for each in high_res_work(settings("resmaster", scale=4, steps=25, wrap="both"), *sizes))
    assert rows == 11 * 16 * 2 + 2 * 16 + 5 * 64


def test_existing_datasets_keep_their_identities() -> None:
    for method in WRAPPING:
        plain = Method.model_validate({"method": method})
        assert "wrap" not in plain.identity()
        assert plain.identity() == Method.model_validate({"method": method, "wrap": "none"}).identity()
        assert Method.model_validate({"method": method, "wrap": "both"}).identity()["wrap"] == "both"
        assert plain.wraps == (False, False)
    assert "wrap" not in LowResConfig().identity()


def test_layers_are_restored_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    models = adapted()
    before = forwards(models.base.denoiser)

    def stop(done: int, total: int) -> None:
        raise RuntimeError("stop")

    config = settings("direct", wrap="both")
    with pytest.raises(RuntimeError, match="stop"):
        upscale_image(models, some_image(32, 32), "a cat", config=config, progress=stop)
    assert forwards(models.base.denoiser) == before


# ----------------------------------------------------------------------------------------------- transformers and sizes


def flux() -> Models:
    return Models.from_pipeline(make_flux())


def test_the_views_of_a_transformer_wrap(roll_noise: Any) -> None:
    config = settings("multidiffusion", scale=4, wrap="both", init="noised_lr", start=0.2, steps=4, guidance_scale=1)
    models, image = flux(), some_image(48, 48)
    straight = upscale_image(models, image, "a cat", config=config)
    roll_noise(0.5, 0.5)
    moved = upscale_image(models, rolled(image, 24, 24), "a cat", config=config)
    assert difference(moved, rolled(straight, 96, 96)) <= 2


def test_a_transformer_cannot_draw_a_whole_canvas_that_wraps() -> None:
    with pytest.raises(ConfigError, match=r"upscale\.wrap: needs convolutions.*resmaster or multidiffusion"):
        upscale_image(flux(), some_image(), "a cat", config=settings("direct", wrap="both", guidance_scale=1))
    with pytest.raises(ConfigError, match=r"low_res\.wrap: needs convolutions.*images of your own"):
        list(generate(flux(), ["a cat"], [""], [0], 64, 64, 2, 1.0, 1, "horizontal"))


def test_an_image_whose_size_cannot_wrap_is_refused_in_one_line() -> None:
    config = settings("resmaster", scale=2, wrap="horizontal")
    with pytest.raises(ConfigError, match=r"upscale\.wrap: horizontal: width 66 px is no multiple of 4") as caught:
        upscale_image(adapted(), some_image(33, 32), "a cat", config=config)
    assert "\n" not in str(caught.value)
    assert upscale_image(adapted(), some_image(32, 33), "a cat", config=config).height == 66  # which does not wrap


def test_methods_that_cannot_wrap_do_not_know_the_setting() -> None:
    with pytest.raises(ConfigError, match="wrap"):
        parse_config({"name": "t", "upscale": {"method": "demofusion", "wrap": "both"}})
    assert set(WRAPPING) == {"direct", "multidiffusion", "resmaster", "c_upscale"}
