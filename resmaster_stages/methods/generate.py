"""Generates images from prompts at the base resolution, for the low_res stage and the evaluation of the training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from resmaster_stages.config.wrap import Wrap
from resmaster_stages.diffusion.loop import Seed
from resmaster_stages.errors import ConfigError, SampleError
from resmaster_stages.methods.direct import Direct
from resmaster_stages.methods.render import render
from resmaster_stages.methods.request import Request
from resmaster_stages.methods.settings import needs_of_wrap
from resmaster_stages.models.bases import require
from resmaster_stages.models.bases.base import Asked, require_sampling
from resmaster_stages.models.parts import Models

T = TypeVar("T")


def check_size(height: int, width: int, multiple: int) -> None:
    """Raises ConfigError, naming the nearest good values, unless both are multiples of `multiple` px."""
    for name, value in (("height", height), ("width", width)):
        if value % multiple or value < multiple:
            below = max(multiple, value // multiple * multiple)
            raise ConfigError(
                f"low_res.{name}: {value} is no multiple of {multiple}; use {below} or {below + multiple}"
            )


def _is_text(prompt: str) -> bool:
    """Whether a prompt can be tokenised. A prompt with lone surrogates cannot."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def low_res_stepper(models: Models) -> Any:
    """The stepper that draws low-res images."""
    return next(iter(models.base.sampling.steppers), "ddim_keep")


def generate(
    models: Models,
    prompts: Sequence[str],
    negative_prompts: Sequence[str],
    seeds: Sequence[Seed],
    height: int,
    width: int,
    steps: int,
    guidance_scale: float,
    batch_size: int,
    wrap: Wrap = "none",
) -> Iterator[Image.Image | SampleError]:
    """Yield an image of `height` x `width` px for each prompt, in order, or a SampleError in its place.

    At the native size, the image is the one that the model's own pipeline in diffusers draws from the same noise with
    DDIM (eta = 0) or Euler. For UNets the noise is that of the same seed too (one CPU generator per image). wrap: along
    which axes the images continue at the opposite border. Raises ConfigError if a side is not a multiple of
    `Geometry.step_px`, or if the model cannot use the sampling, or cannot wrap.
    """
    for slot in slots(models, prompts, negative_prompts, height, width, steps, guidance_scale, batch_size, wrap):
        yield from slot.checked(render(slot.request, seeds[slot.place]))


@dataclass(frozen=True, eq=False)
class Slot:
    """Prompts that are drawn together."""

    place: slice
    """Which of all prompts they are."""
    request: Request
    readable: tuple[bool, ...]
    """Whether each prompt is valid text. Another one keeps its place, so that its neighbours stay the same."""

    def checked(self, made: Sequence[T | SampleError]) -> list[T | SampleError]:
        """What was made, with a SampleError for each prompt that is no text."""
        error = SampleError("the prompt is not valid Unicode text; remove the lone surrogates")
        return [each if ok else error for each, ok in zip(made, self.readable)]


def slots(
    models: Models,
    prompts: Sequence[str],
    negative_prompts: Sequence[str],
    height: int,
    width: int,
    steps: int,
    guidance_scale: float,
    batch_size: int,
    wrap: Wrap = "none",
) -> Iterator[Slot]:
    """What `generate` draws, slot by slot, with the same arguments. Raises the same errors."""
    check_size(height, width, models.geometry.step_px)
    sampling = models.base.sampling
    stepper = low_res_stepper(models)
    require_sampling(sampling, Asked("low_res", steps, guidance_scale, stepper=stepper), models.identity)
    require(models.base.family, models.identity, needs_of_wrap(wrap))
    config = Direct(steps=steps, guidance_scale=guidance_scale, stepper=stepper, view_batch=batch_size, wrap=wrap)
    for start in range(0, len(prompts), batch_size):
        place = slice(start, start + batch_size)
        good = [_is_text(p) and _is_text(n) for p, n in zip(prompts[place], negative_prompts[place])]
        request = Request(
            models=models,
            config=config,
            height=height,
            width=width,
            prompts=tuple(text if ok else "" for text, ok in zip(prompts[place], good)),
            negative_prompts=tuple(text if ok else "" for text, ok in zip(negative_prompts[place], good)),
        )
        yield Slot(place, request, tuple(good))
