"""`callback_on_step_end`: every step is seen, a stopped drawing computes nothing more, and nothing is done unasked."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import resmaster_stages as rm
from resmaster_stages.diffusion import autoencoder, canvas
from resmaster_stages.diffusion.canvas import Canvas
from resmaster_stages.diffusion.cost import counting
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.parts import Models
from tests.methods.common import DIFFUSION_METHODS, adapted, plain, some_image
from tests.methods.test_efficiency import Waits
from tests.tiny_models import counted

FAST: dict[str, Any] = {"scale": 2, "steps": 4, "method": "multidiffusion"}
IMAGE = some_image(32, 24)


@pytest.fixture(scope="module")
def models() -> Models:
    return plain()


@pytest.fixture(scope="module")
def house() -> Image.Image:
    return rm.generate("a red house on a green meadow", steps=20)[0]


@pytest.mark.parametrize("method", DIFFUSION_METHODS)
def test_every_step_of_every_method_is_seen_once_and_changes_nothing(method: str) -> None:
    seen: list[tuple[int, int, float]] = []
    told: list[tuple[int, int]] = []
    settings: dict[str, Any] = {"scale": 2, "steps": 3, "method": method}

    def callback(canvas: Canvas, step: int, timestep: float, given: dict[str, Any]) -> dict[str, Any]:
        assert given["latents"] is canvas.latents
        assert canvas.x0.shape == canvas.latents.shape
        seen.append((step, canvas.steps, timestep))
        return given

    own = adapted()
    with counting() as cost:
        watched = rm.upscale(
            IMAGE,
            "a",
            model=own,
            callback_on_step_end=callback,
            progress=lambda *numbers: told.append(numbers),
            **settings,
        )
    with counting() as plain_cost:
        unwatched = rm.upscale(IMAGE, "a", model=own, **settings)
    steps = seen[0][1]
    assert [step for step, _, _ in seen] == list(range(steps))
    assert told == [(step + 1, steps) for step in range(steps)]
    assert all(0 <= timestep <= 1000 for _, _, timestep in seen)
    assert watched.tobytes() == unwatched.tobytes()
    assert cost == plain_cost


@pytest.mark.parametrize(
    ("method", "by"),
    [*((method, "answer") for method in DIFFUSION_METHODS), ("multidiffusion", "interrupt"), ("direct", "_interrupt")],
)
def test_after_an_interruption_nothing_more_is_computed(method: str, by: str) -> None:
    rows: list[int] = []
    shown: list[Image.Image] = []

    def callback(canvas: Canvas, step: int, timestep: float, given: dict[str, Any]) -> Any:
        rows.append(len(calls))
        shown.append(canvas.image())
        if step == 1:
            if by == "answer":
                return False
            setattr(canvas, by, True)
        return given

    own = adapted()
    with counted(own.base.denoiser) as calls:
        made = rm.upscale(IMAGE, "a", model=own, scale=2, steps=6, method=method, callback_on_step_end=callback)
    assert len(rows) == 2
    assert len(calls) == rows[-1], "no call of the denoiser after the second step"
    assert made.size == (64, 48)
    if shown[-1].size == made.size:
        assert made.tobytes() == shown[-1].tobytes(), "the image is what the last step predicted"
    else:
        assert method in ("demofusion", "freescale", "scalediff", "pixelrush"), "the first phase is smaller"


def test_an_interruption_ends_a_list_and_the_scales_that_were_to_follow(models: Models) -> None:
    numbers: list[int] = []

    def stop(canvas: Canvas, step: int, timestep: float, given: dict[str, Any]) -> Any:
        numbers.append(canvas.number)
        return canvas.number != 1

    made = rm.upscale([IMAGE] * 3, "a", model=models, callback_on_step_end=stop, **FAST)
    assert numbers == [0] * 4 + [1]
    assert len(made) == 2
    assert made[0].tobytes() == rm.upscale(IMAGE, "a", model=models, **FAST).tobytes()
    via = rm.upscale(
        IMAGE, "a", model=models, callback_on_step_end=lambda *_: False, **{**FAST, "scale": 4, "via": [2]}
    )
    assert via.size == (128, 96)
    latents = rm.upscale(IMAGE, "a", model=models, callback_on_step_end=lambda *_: False, output_type="latent", **FAST)
    assert latents.shape == (4, 12, 16)


def test_generate_stops_between_its_batches(models: Models) -> None:
    numbers: list[int] = []

    def stop(canvas: Canvas, step: int, timestep: float, given: dict[str, Any]) -> bool:
        numbers.append(canvas.number)
        assert canvas.preview(len(canvas.latents) - 1).size == (16, 16)
        return canvas.number == 0

    made = rm.generate(["a", "b", "c"], model=models, steps=2, batch_size=1, callback_on_step_end=stop)
    assert numbers == [0, 0, 1]
    assert len(made) == 2
    together = rm.generate(["a", "b", "c"], model=models, steps=2, batch_size=2, callback_on_step_end=lambda *_: None)
    assert [each.tobytes() for each in together] == [
        each.tobytes() for each in rm.generate(["a", "b", "c"], model=models, steps=2, batch_size=2)
    ]


def test_latents_of_the_answer_are_gone_on_from(models: Models) -> None:
    """The last step's latents are the result, so latents put in their place there are the result, too."""
    other = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(1))

    def replace(canvas: Canvas, step: int, timestep: float, given: dict[str, Any]) -> dict[str, Any]:
        return {"latents": other} if step == canvas.steps - 1 else given

    made = rm.upscale(IMAGE, "a", model=models, callback_on_step_end=replace, output_type="latent", **FAST)
    assert torch.equal(made, other[0])
    with pytest.raises(ConfigError, match=r"gave latents of \[1\] for \[1, 4, 12, 16\]; keep their shape"):
        rm.upscale(IMAGE, "a", model=models, callback_on_step_end=lambda *_: {"latents": torch.zeros(1)}, **FAST)


def test_a_callback_of_diffusers_that_needs_other_tensors_is_refused(models: Models) -> None:
    from diffusers.callbacks import SDXLCFGCutoffCallback

    with pytest.raises(ConfigError, match=r"SDXLCFGCutoffCallback wants prompt_embeds, .*use the method's settings"):
        rm.upscale(IMAGE, "a", model=models, callback_on_step_end=SDXLCFGCutoffCallback(cutoff_step_ratio=0.5), **FAST)


def test_patches_are_undone_after_an_interruption() -> None:
    own = adapted()
    rm.upscale(IMAGE, "a", model=own, scale=2, steps=3, method="scalecrafter", callback_on_step_end=lambda *_: False)
    assert not [name for name, module in own.base.denoiser.named_modules() if "forward" in module.__dict__]


def test_without_a_question_nothing_waits_for_the_device_and_nothing_is_coded(
    models: Models,
) -> None:
    """With a callback that asks for nothing, the loop's operations are those without one, in number and order."""

    class Operations(Waits):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            every.append(function.overloadpacket.__name__)
            return super().__torch_dispatch__(function, types, args, kwargs)

    counts = []
    rm.upscale(IMAGE, "a", model=models, output_type="latent", **FAST)  # fills caches
    for callback in (None, lambda *_: None):
        every: list[str] = []
        with Operations() as waits:
            rm.upscale(IMAGE, "a", model=models, callback_on_step_end=callback, output_type="latent", **FAST)
        counts.append((every, list(waits.found)))
    assert counts[0] == counts[1]
    assert len(counts[0][0]) > 100


def test_a_preview_is_the_image_in_small_without_the_vae(house: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with the decoded x0, reduced to one px per latent: the same place has the same colour, about."""
    errors: list[float] = []
    wrong: list[float] = []
    decoded: list[int] = []
    own = autoencoder.decode
    monkeypatch.setattr(autoencoder, "decode", lambda *args: decoded.append(1) or own(*args))

    def look(canvas: Canvas, step: int, timestep: float, given: dict[str, Any]) -> None:
        before = len(decoded)
        small = canvas.preview()
        assert len(decoded) == before
        large = canvas.image()
        assert large.size == (256, 256)
        assert small.size == (32, 32)
        reduced = np.asarray(large.resize(small.size, Image.Resampling.BOX)).astype(float)
        errors.append(np.abs(np.asarray(small) - reduced).mean())
        wrong.append(np.abs(np.asarray(small)[::-1] - reduced).mean())

    rm.upscale(house, "a red house", scale=2, steps=5, captions="prompt", callback_on_step_end=look)
    assert max(errors) < 16
    assert min(wrong) > 2 * max(errors)


def test_colours_are_fitted_once_per_model_and_not_kept_for_longer() -> None:
    import gc

    own = plain()
    rm.generate("a", model=own, steps=2, callback_on_step_end=lambda canvas, *_: canvas.preview() and None)
    assert own in canvas._colours
    assert canvas.colours(own) is canvas.colours(own)
    count = len(canvas._colours)
    del own
    gc.collect()
    assert len(canvas._colours) == count - 1
