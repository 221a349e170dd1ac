"""`upscale` and `generate`: images in, images out, in the forms that scripts and other programs have.

Invariant: a list gives what its images give one by one. The model is loaded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, overload

from PIL import Image

from resmaster_stages.config.dataset import DatasetConfig, LowResConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import DEFAULT, with_method
from resmaster_stages.errors import ConfigError, UserError
from resmaster_stages.library.callbacks import Callback, Progress, Watch
from resmaster_stages.library.images import AnyImage, OneImage, OutputType, is_batch, open_image
from resmaster_stages.library.models import load, recommended, single
from resmaster_stages.models.identity import PACK_MODELS, PICTUREBOOK

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray
    from torch import Generator, Tensor

    from resmaster_stages.models.parts import Models

Several: TypeAlias = "Sequence[AnyImage]"
Texts: TypeAlias = "str | Sequence[str]"
Captions: TypeAlias = "str | Sequence[str] | Sequence[Sequence[str]]"


@overload
def upscale(
    image: OneImage, prompt: Texts = "", *, output_type: Literal["pil"] = "pil", **options: Any
) -> Image.Image: ...
@overload
def upscale(image: OneImage, prompt: Texts = "", *, output_type: Literal["np"], **options: Any) -> NDArray[float32]: ...
@overload
def upscale(image: OneImage, prompt: Texts = "", *, output_type: Literal["pt", "latent"], **options: Any) -> Tensor: ...
@overload
def upscale(
    image: Several, prompt: Texts = "", *, output_type: Literal["pil"] = "pil", **options: Any
) -> list[Image.Image]: ...
@overload
def upscale(
    image: Several, prompt: Texts = "", *, output_type: Literal["np"], **options: Any
) -> list[NDArray[float32]]: ...
@overload
def upscale(
    image: Several, prompt: Texts = "", *, output_type: Literal["pt", "latent"], **options: Any
) -> list[Tensor]: ...
@overload
def upscale(image: Any = None, prompt: Texts = "", *, output_type: OutputType = "pil", **options: Any) -> Any: ...
def upscale(
    image: Any = None,
    prompt: Texts = "",
    *,
    model: Any = PICTUREBOOK,
    captions: Captions = "auto",
    image_prompts: Sequence[Any] | None = None,
    seed: int = 0,
    generator: Generator | Sequence[Generator] | None = None,
    latents: Tensor | Sequence[Tensor] | None = None,
    output_type: OutputType = "pil",
    callback_on_step_end: Callback | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Any:
    """Upscale an image of any size by the setting `scale` (default 4), or each image of a list.

    image: a path; a PIL image; a numpy array [H, W, channels] or [H, W]; a torch tensor [channels, H, W]; or a list of
    these, or an array or tensor with one more axis. Numbers are bytes, or floats from 0 to 1. prompt: one text, or one
    per image.

    model: `picturebook` (the embedded model, for its own small world), a hub id such as
    `stabilityai/stable-diffusion-xl-base-1.0`, a folder, a diffusers pipeline that you have loaded, or the result of
    `load`. captions: one text per view, row-major, or a list of these per image; or a captioner (`picturebook`, a hub
    id, a folder), if the model is given by name; or `attention`, in the same case: every view gets the words of the
    prompt that the image attends to there; or `prompt`: every view gets the prompt; or `auto`: picturebook uses its own
    captioner, and other models use the prompt. image_prompts: one image per view, row-major, or a list of these per
    image, which the views are shown in place of their own crops (methods with image prompts: resmaster).

    seed: all noise of an image depends on it, and on nothing else. generator: in place of `seed`, a torch.Generator, or
    one per image, which the noise is drawn from: one that begins with `manual_seed(7)` gives the image of `seed=7`, and
    is changed by the call. latents: in place of `image`, the latents [C, h, w] of a low-res image, or several, as
    another pipeline of the same model gives them with `output_type="latent"`.

    output_type: pil, np ([H, W, 3], floats from 0 to 1), pt ([3, H, W], the same) or latent ([C, h, w]).
    callback_on_step_end: called after each denoising step with (canvas, step, timestep, {"latents": ...}), as in
    diffusers. `canvas.preview()` gives an image of what is drawn. If it sets `canvas.interrupt`, or returns False, no
    further step is computed, and the result is the image that the last step predicted; further images of a list are
    left out. progress: called with (steps done, steps in all). settings: keys of the part `upscale` of a configuration
    (docs/configuration.md), such as scale, method, preset, steps.

    Raises UserError with one line that says what to do (no such image, an unknown setting, a model that cannot be
    loaded), and SampleError if the model produced no visible image.
    """
    from resmaster_stages.library.engine import Subject, Wish, seeds_of, subject_of_latents, upscale_one

    several = is_batch(image if latents is None else latents)
    _check_output_type(output_type)
    watch = Watch(callback_on_step_end, progress)
    given = [] if latents is not None else [Subject(open_image(each)) for each in (image if several else [image])]
    models, config = _configured(model, captions, seed, settings)
    if latents is not None:
        if image is not None:
            raise UserError("there are an image and latents; give one of them, as latents stand for an image")
        models = models or load(config.model)
        wraps = config.upscale.wraps
        given = [subject_of_latents(models, each, wraps) for each in (latents if several else [latents])]
    texts, views = _each(prompt, len(given)), _captions(captions, len(given))
    shown = _shown(image_prompts, len(given))
    seeds = seeds_of(seed, generator, [seed] * len(given))
    made = []
    for watch.number, subject in enumerate(given):
        number = watch.number
        subject = replace(subject, prompt=texts[number], captions=views[number], image_prompts=shown[number])
        made.append(upscale_one(config, subject, models, Wish(output_type, seeds[number], watch)))
        if watch.interrupted:
            break
    return made if several else made[0]


@overload
def generate(prompts: Texts, *, output_type: Literal["pil"] = "pil", **options: Any) -> list[Image.Image]: ...
@overload
def generate(prompts: Texts, *, output_type: Literal["np"], **options: Any) -> list[NDArray[float32]]: ...
@overload
def generate(prompts: Texts, *, output_type: Literal["pt", "latent"], **options: Any) -> list[Tensor]: ...
@overload
def generate(prompts: Texts, *, output_type: OutputType = "pil", **options: Any) -> list[Any]: ...
def generate(
    prompts: Texts,
    *,
    model: Any = PICTUREBOOK,
    seed: int = 0,
    generator: Generator | Sequence[Generator] | None = None,
    output_type: OutputType = "pil",
    callback_on_step_end: Callback | None = None,
    **settings: Any,
) -> list[Any]:
    """Generate one image per prompt, by default of the model's native size, with the seeds `seed`, `seed` + 1, ...

    model, output_type, callback_on_step_end: as in `upscale`. `canvas.number` is the number of the first image of the
    batch that is drawn, and `canvas.preview(index)` shows its image `index`. generator: in place of `seed`, a
    torch.Generator, or one per image. settings: keys of the part `low_res` of a configuration, such as steps,
    guidance_scale, height, batch_size.

    Raises UserError for bad input, and SampleError for a prompt from which no image can be made.
    """
    from resmaster_stages.library.engine import forms, seeds_of
    from resmaster_stages.methods.generate import slots
    from resmaster_stages.methods.render import draw, good

    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    _check_output_type(output_type)
    watch = Watch(callback_on_step_end)
    models = load(model)
    values = {**recommended(models.base.sampling, steps=True), **settings}
    low_res: LowResConfig = parse_config({"name": "single", "low_res": values}, "generate()").low_res
    seeds = seeds_of(seed, generator, [(seed + number) % 2**64 for number in range(len(texts))])
    made: list[Any] = []
    for slot in slots(
        models,
        texts,
        [low_res.negative_prompt] * len(texts),
        low_res.height or models.geometry.native_px,
        low_res.width or models.geometry.native_px,
        low_res.steps,
        low_res.guidance_scale,
        low_res.batch_size,
        low_res.wrap,
    ):
        watch.number = len(made)
        drawn = draw(slot.request, seeds[slot.place], watch.on_step)
        made += [good(each) for each in slot.checked(forms(drawn, output_type))]
        if watch.interrupted:
            break
    return made


def upscale_as_configured(
    config: DatasetConfig,
    image: Image.Image,
    prompt: str,
    *,
    models: Models | None = None,
    captions: Sequence[str] | None = None,
    detail: Image.Image | None = None,
    progress: Progress | None = None,
    unrounded: bool = False,
) -> Any:
    """Upscale `image` by `config.upscale`. Returns an 8-bit RGB image.

    models: None loads the models of `config.model`. captions: one per view; None: the configured captioner writes
    them. detail: a mask of where more detail is drawn. unrounded: return the computed values instead,
    [H, W, 3] from 0 to 1. Raises UserError and SampleError.
    """
    from resmaster_stages.library.engine import Subject, Wish, upscale_one

    subject = Subject(image, prompt, captions=captions, detail=detail)
    form: OutputType = "np" if unrounded else "pil"
    return upscale_one(config, subject, models, Wish(form, config.seed, Watch(progress=progress), unrounded))


def _configured(
    model: Any, captions: Captions, seed: int, settings: Mapping[str, Any]
) -> tuple[Models | None, DatasetConfig]:
    """The model, if it is not given by name, and the configuration that a caller describes. Raises ConfigError."""
    models = None if isinstance(model, str | Path) else load(model)
    name = models.identity.partition("@")[0] if models else str(model)
    captioner = captions if isinstance(captions, str) else "prompt"
    if models and name not in PACK_MODELS and captioner not in ("auto", "prompt"):
        raise ConfigError(
            f"captions: the captioner {captioner!r} needs a model that is given by name; give one caption per view "
            "instead"
        )
    base = single(name, captioner, models)
    known = settings.get("method", DEFAULT)
    values = {**with_method(base["upscale"], known if isinstance(known, str) else DEFAULT), **settings}
    return models, parse_config({**base, "seed": seed, "upscale": values}, "upscale()")


def _check_output_type(output_type: str) -> None:
    if output_type not in get_args(OutputType):
        raise ConfigError(f"output_type: {output_type!r} is not known; give one of {', '.join(get_args(OutputType))}")


def _each(prompt: Texts, count: int) -> list[str]:
    """One prompt per image. Raises UserError for another number of prompts."""
    if isinstance(prompt, str):
        return [prompt] * count
    if len(prompt) != count:
        raise UserError(f"prompt: {len(prompt)} texts for {count} images; give one text, or one per image")
    return list(prompt)


def _captions(captions: Captions, count: int) -> list[Sequence[str] | None]:
    """The captions of each image, one per view. None: a captioner writes them, or there are none."""
    if isinstance(captions, str):
        return [None] * count
    if any(isinstance(each, str) for each in captions):
        return [captions] * count  # type: ignore[list-item]
    if len(captions) != count:
        raise UserError(f"captions: {len(captions)} lists for {count} images; give one list per image")
    return list(captions)


def _shown(images: Sequence[Any] | None, count: int) -> list[list[Image.Image] | None]:
    """The image prompts of each image, one per view. None: the views' own crops. Raises UserError."""
    if images is None:
        return [None] * count
    if not all(is_batch(each) for each in images):
        return [[open_image(each) for each in images]] * count
    if len(images) != count:
        raise UserError(f"image_prompts: {len(images)} lists for {count} images; give one list per image")
    return [[open_image(each) for each in views] for views in images]
