"""Images go into the library, and come out of it, in every form; a list gives what its images give one by one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import resmaster_stages as rm
from resmaster_stages.diffusion import autoencoder
from resmaster_stages.diffusion.reference import to_image
from resmaster_stages.errors import ConfigError, UserError
from resmaster_stages.library.images import open_image
from resmaster_stages.models.parts import Models
from tests.methods.common import difference, plain, some_image
from tests.tiny_models import counted

FAST: dict[str, Any] = {"scale": 2, "steps": 3, "method": "multidiffusion"}
IMAGE = some_image(32, 24)


@pytest.fixture(scope="module")
def models() -> Models:
    return plain()


@contextmanager
def coded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The calls of the VAE within the block."""
    calls: list[str] = []
    with monkeypatch.context() as within:
        for name in ("encode", "decode"):
            own = getattr(autoencoder, name)
            within.setattr(autoencoder, name, lambda *args, own=own, name=name: calls.append(name) or own(*args))
        yield calls


def as_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


GREY = IMAGE.convert("L")
CLEAR = IMAGE.copy()
CLEAR.putalpha(some_image(32, 24, seed=1).convert("L"))
WHITE = Image.alpha_composite(Image.new("RGBA", IMAGE.size, "white"), CLEAR).convert("RGB")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (as_array(IMAGE), IMAGE),
        (as_array(IMAGE) / 255, IMAGE),
        ((as_array(IMAGE) / 255).astype(np.float16), IMAGE),
        (as_array(GREY), GREY.convert("RGB")),
        (as_array(GREY)[:, :, None], GREY.convert("RGB")),
        (as_array(CLEAR), WHITE),
        (as_tensor(IMAGE), IMAGE),
        (as_tensor(IMAGE) / 255, IMAGE),
        ((as_tensor(IMAGE) / 255).to(torch.bfloat16), IMAGE),
        (as_tensor(CLEAR) / 255, WHITE),
        (as_tensor(IMAGE)[:1], Image.fromarray(as_array(IMAGE)[:, :, 0]).convert("RGB")),
    ],
)
def test_each_form_is_the_same_image(given: Any, expected: Image.Image) -> None:
    found = open_image(given)
    assert found.mode == "RGB"
    coarse = getattr(given, "dtype", None) == torch.bfloat16 or given.shape[-1] == 4 or given.shape[0] == 4
    assert difference(found, expected) <= (1 if coarse else 0)  # bfloat16 has 8 bits; alpha is blended in 8 bits


MISTAKES: list[tuple[Any, str]] = [
    (np.zeros((4, 4, 2)), "array of shape [4, 4, 2]; give [H, W] or [H, W, channels] with 1, 3 or 4 channels"),
    (torch.zeros(5, 6, 2), "tensor of shape [5, 6, 2]; give [channels, H, W] with 1, 3 or 4 channels"),
    (torch.zeros(4, 4), "tensor of shape [4, 4]; give [channels, H, W]"),
    (np.zeros((0, 4, 3), np.uint8), "array of shape [0, 4, 3]"),
    (np.full((4, 4, 3), 128.0), "floats from 128 to 128; floats go from 0 to 1, so give x / 255"),
    (np.linspace(-1, 1, 48).reshape(4, 4, 3), "floats from -1 to 1; floats go from 0 to 1, so give (x + 1) / 2"),
    (np.full((4, 4, 3), np.nan), "floats from nan to nan"),
    (np.zeros((4, 4, 3), np.uint16), "array of uint16; give uint8 from 0 to 255, or floats from 0 to 1"),
    (torch.zeros(3, 4, 4, dtype=torch.bool), "tensor of bool; give uint8"),
    ([[as_array(IMAGE)]], "a path, a PIL image, a numpy array, a torch tensor, or a list of these, not list"),
    (b"\x89PNG", "not bytes; give one of these"),
]


@pytest.mark.parametrize(("given", "message"), MISTAKES)
def test_what_is_no_image_is_told_in_one_line(given: Any, message: str) -> None:
    with pytest.raises(UserError) as raised:
        rm.upscale(given, method="lanczos")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("settings", [FAST, {**FAST, "colour_match": "wavelet"}, {"method": "lanczos", "scale": 2}])
def test_every_output_is_the_same_image(models: Models, settings: dict[str, Any]) -> None:
    pil = rm.upscale(IMAGE, "a cat", model=models, **settings)
    array = rm.upscale(IMAGE, "a cat", model=models, output_type="np", **settings)
    tensor = rm.upscale(IMAGE, "a cat", model=models, output_type="pt", **settings)
    assert array.dtype == np.float32
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, 48, 64)
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), array)
    assert array.min() >= 0
    assert array.max() <= 1
    assert difference(Image.fromarray((array * 255).round().astype(np.uint8)), pil) == 0
    rounded = bool(np.array_equal((array * 255).round() / 255, array.astype(np.float64)) or settings is not FAST)
    assert rounded is (settings is not FAST), "floats of the decoder are not rounded to 8 bits"
    tensor += 1  # not a tensor of inference mode


def test_latents_are_those_that_the_image_is_decoded_from(models: Models) -> None:
    latents = rm.upscale(IMAGE, "a cat", model=models, output_type="latent", **FAST)
    assert latents.shape == (4, 12, 16)
    decoded = to_image(autoencoder.decode(models, latents[None])[0])
    assert decoded.tobytes() == rm.upscale(IMAGE, "a cat", model=models, **FAST).tobytes()
    drawn = rm.generate(["a cat", "b"], model=models, steps=2, output_type="latent")
    shown = rm.generate(["a cat", "b"], model=models, steps=2)
    decoded = autoencoder.decode(models, torch.stack(drawn))
    assert [to_image(each).tobytes() for each in decoded] == [image.tobytes() for image in shown]


def test_latents_are_not_decoded_where_nobody_asks(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    with coded(monkeypatch) as calls:
        rm.generate("a cat", model=models, steps=1, output_type="latent")
    assert calls == []


def test_latents_stand_for_the_image_that_they_decode_to(models: Models) -> None:
    """Where a method reads the image's pixels alone, the result has the same bytes."""
    (z,) = rm.generate("a cat", model=models, steps=2, output_type="latent")
    (image,) = rm.generate("a cat", model=models, steps=2)
    settings: dict[str, Any] = {**FAST, "init": "noised_lr", "reference": {"enlarge": "image"}}
    expected = rm.upscale(image, "a cat", model=models, **settings).tobytes()
    assert rm.upscale(latents=z, prompt="a cat", model=models, **settings).tobytes() == expected
    several = rm.upscale(latents=torch.stack([z, z]), prompt="a cat", model=models, **settings)
    assert [each.tobytes() for each in several] == [expected] * 2


def test_a_method_that_follows_latents_gets_the_given_ones(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents that no image encodes to show it: nothing is encoded, and the canvas begins with them."""
    settings: dict[str, Any] = {**FAST, "init": "noised_lr", "reference": {"enlarge": "latent"}}
    z = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(5))
    with coded(monkeypatch) as calls:
        given = rm.upscale(latents=z, prompt="a cat", model=models, **settings)
    assert calls == ["decode"] or calls.count("encode") == 0
    image = to_image(autoencoder.decode(models, z[None])[0])
    encoded = rm.upscale(image, "a cat", model=models, **settings)
    assert given.tobytes() != encoded.tobytes()
    exact = autoencoder.encode(models, autoencoder.decode(models, z[None]))
    assert (exact - z).abs().max() > 0.1, "the tiny VAE is no identity, so the two must differ"


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(3, 8, 8), "latents: [3, 8, 8]; give a tensor [4, h, w] of this model"),
        (torch.zeros(1, 64, 64), "packed latents of a transformer must be unpacked first"),
        ("z", "latents: str; give a tensor [4, h, w]"),
        (torch.full((4, 8, 8), torch.nan), "some are NaN or infinite"),
    ],
)
def test_latents_that_the_model_cannot_have_are_told(models: Models, latents: Any, message: str) -> None:
    with pytest.raises(UserError) as raised:
        rm.upscale(latents=latents, model=models, **FAST)
    assert message in str(raised.value)


def test_an_image_and_latents_exclude_each_other(models: Models) -> None:
    with pytest.raises(UserError, match="give one of them"):
        rm.upscale(IMAGE, latents=torch.zeros(4, 8, 8), model=models, **FAST)


def test_a_list_is_what_its_images_are_one_by_one(models: Models) -> None:
    images = [IMAGE, as_array(some_image(20, 20)), as_tensor(some_image(24, 16, seed=3)) / 255]
    prompts = ["a cat", "b", "c"]
    together = rm.upscale(images, prompts, model=models, **FAST)
    alone = [rm.upscale(each, prompt, model=models, **FAST) for each, prompt in zip(images, prompts)]
    assert [each.tobytes() for each in together] == [each.tobytes() for each in alone]
    batch = np.stack([as_array(IMAGE)] * 2)
    as_batch = rm.upscale(batch, "a cat", model=models, **FAST)
    assert [each.tobytes() for each in as_batch] == [alone[0].tobytes()] * 2
    assert rm.upscale([], model=models, **FAST) == []


def test_a_list_loads_its_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from resmaster_stages.models import load

    load.load_models.cache_clear()
    rm.upscale([IMAGE, IMAGE], "a house", captions="prompt", **FAST)
    assert load.load_models.cache_info().misses == 1


def test_captions_are_for_every_image_or_one_list_for_each(models: Models) -> None:
    settings: dict[str, Any] = {"method": "c_upscale", "scale": 2, "steps": 2}
    views = len(_views(models))
    one, two = ["a"] * views, ["z"] * views
    expected = [rm.upscale(IMAGE, "a", model=models, captions=each, **settings).tobytes() for each in (one, two)]
    found = rm.upscale([IMAGE, IMAGE], "a", model=models, captions=[one, two], **settings)
    assert [each.tobytes() for each in found] == expected
    found = rm.upscale([IMAGE, IMAGE], "a", model=models, captions=two, **settings)
    assert [each.tobytes() for each in found] == [expected[1]] * 2


def _views(models: Models) -> Any:
    from resmaster_stages.diffusion.views import view_grid

    return view_grid(models.geometry, 48, 64, 0.5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "settings", [FAST, {**FAST, "stepper": "ddim_ancestral"}, {"scale": 2, "steps": 2, "method": "demofusion"}]
)
def test_a_generator_begun_with_a_seed_gives_the_image_of_the_seed(models: Models, settings: dict[str, Any]) -> None:
    seeded = rm.upscale(IMAGE, "a cat", model=models, seed=7, **settings).tobytes()
    given = generator(7)
    assert rm.upscale(IMAGE, "a cat", model=models, generator=given, **settings).tobytes() == seeded
    assert rm.upscale(IMAGE, "a cat", model=models, generator=given, **settings).tobytes() != seeded, "it went on"
    own = rm.upscale([IMAGE] * 2, "a cat", model=models, generator=[generator(7), generator(7)], **settings)
    assert [each.tobytes() for each in own] == [seeded] * 2
    first, second = rm.upscale([IMAGE] * 2, "a cat", model=models, generator=generator(7), **settings)
    assert first.tobytes() == seeded
    assert second.tobytes() != seeded


def test_generate_takes_generators_too(models: Models) -> None:
    seeded = [image.tobytes() for image in rm.generate(["a cat", "b"], model=models, steps=2, seed=3)]
    given = rm.generate(["a cat", "b"], model=models, steps=2, generator=[generator(3), generator(4)])
    assert [image.tobytes() for image in given] == seeded
    arrays = rm.generate(["a cat", "b"], model=models, steps=2, seed=3, output_type="np")
    assert [Image.fromarray((each * 255).round().astype(np.uint8)).tobytes() for each in arrays] == seeded


def test_via_goes_on_with_the_generator_that_began(models: Models) -> None:
    settings: dict[str, Any] = {**FAST, "scale": 4, "via": [2]}
    first, again = (rm.upscale(IMAGE, "a", model=models, generator=generator(1), **settings) for _ in range(2))
    assert first.tobytes() == again.tobytes()


CALLS: list[tuple[Callable[[Models], object], type[UserError], str]] = [
    (
        lambda m: rm.upscale([IMAGE] * 2, ["a"] * 3, model=m, **FAST),
        UserError,
        "prompt: 3 texts for 2 images; give one text, or one per image",
    ),
    (
        lambda m: rm.upscale([IMAGE] * 2, captions=[["a"]] * 3, model=m, **FAST),
        UserError,
        "captions: 3 lists for 2 images",
    ),
    (
        lambda m: rm.upscale([IMAGE] * 2, generator=[generator()], model=m, **FAST),
        UserError,
        "generator: 1 generators for 2 images; give one, or one per image",
    ),
    (lambda m: rm.upscale(IMAGE, generator=7, model=m, **FAST), UserError, "generator: give a torch.Generator"),
    (lambda m: rm.upscale(IMAGE, seed=1, generator=generator(), model=m, **FAST), UserError, "give one of them"),
    (lambda m: rm.upscale(IMAGE, output_type="png", model=m), ConfigError, "give one of pil, np, pt, latent"),
    (
        lambda m: rm.upscale(IMAGE, output_type="latent", model=m, method="lanczos"),
        ConfigError,
        'method lanczos draws pixels, and no latents; give "pil", "np" or "pt"',
    ),
    (
        lambda m: rm.upscale(IMAGE, output_type="latent", model=m, colour_match="wavelet", **FAST),
        ConfigError,
        "colour_match changes pixels",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS)
def test_a_mistake_is_told_before_anything_is_drawn(
    models: Models, call: Callable[[Models], object], error: type[UserError], message: str
) -> None:
    with counted(models.base.denoiser) as calls, pytest.raises(error) as raised:
        call(models)
    assert message in str(raised.value)
    assert calls == []
