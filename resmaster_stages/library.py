"""Public functions for scripts and notebooks: `import resmaster_stages as rm`.

This module may import every package of `resmaster_stages`. No other module but the command line imports it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from resmaster_stages.config.dataset import DatasetConfig, LowResConfig, QualityConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import DEFAULT, with_method
from resmaster_stages.config.model import SDXL, ModelConfig
from resmaster_stages.errors import ConfigError, SampleError, UserError
from resmaster_stages.models.bases.base import Sampling
from resmaster_stages.models.identity import PACK_MODELS, PICTUREBOOK
from resmaster_stages.storage.filesystem import open_regular
from resmaster_stages.storage.images import convert_image, decode_image
from resmaster_stages.storage.sources import MAX_FILE_BYTES

if TYPE_CHECKING:
    from resmaster_stages.dataset.dataset import Dataset
    from resmaster_stages.dataset.sample import Sample
    from resmaster_stages.models.parts import Models

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in total) of each pass."""

PICTUREBOOK_UPSCALE: Mapping[str, Any] = {
    "steps": 20,
    "guidance_scale": 4.0,
    "negative_prompt": "",
    "micro_conditioning": "native",
}
"""Settings for the embedded model, as in deployments/datasets/picturebook.yaml."""

NO_CAPTIONER = ("attention", "prompt")
"""Sources of captions without a captioner that may stand in place of its name."""


def upscale(
    image: str | Path | Image.Image,
    prompt: str = "",
    *,
    model: Any = PICTUREBOOK,
    captions: str | Sequence[str] = "auto",
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> Image.Image:
    """Upscale `image`, a file or a PIL image of any size, by the setting `scale` (default 4). Returns an RGB image.

    model: `picturebook` (the embedded model, for its own small world), a hub id such as
    `stabilityai/stable-diffusion-xl-base-1.0`, a folder, a diffusers pipeline that you have loaded, or the result of
    `load_models`. captions: one text per view, row-major; or a captioner (`picturebook`, a hub id, a folder), if the
    model is given by name; or `attention`, in the same case: every view gets the words of the prompt that the image
    attends to there; or `prompt`: every view gets the prompt; or `auto`: picturebook uses its own captioner, and other
    models use the prompt. settings: keys of the part `upscale` of a configuration (docs/configuration.md), such as
    scale, method, preset, steps.

    Raises UserError with one line that says what to do (no such image, an unknown setting, a model that cannot be
    loaded), and SampleError if the model produced no visible image.
    """
    low_res = open_image(image)
    models = None if isinstance(model, str | Path) else as_models(model)
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
    config = parse_config({**base, "seed": seed, "upscale": values}, "upscale()")
    texts = None if isinstance(captions, str) else captions
    return upscale_as_configured(config, low_res, prompt, models=models, captions=texts, progress=progress)


def generate(
    prompts: str | Sequence[str],
    *,
    model: Any = PICTUREBOOK,
    seed: int = 0,
    **settings: Any,
) -> list[Image.Image]:
    """Generate one image per prompt, by default of the model's native size, with the seeds `seed`, `seed` + 1, ...

    model: as in `upscale`. settings: keys of the part `low_res` of a configuration, such as steps, guidance_scale,
    height. Raises UserError for bad input, and SampleError for a prompt from which no image can be made.
    """
    from resmaster_stages.methods.generate import generate as images_of

    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    models = as_models(model)
    values = {**recommended(models.base.sampling, steps=True), **settings}
    low_res: LowResConfig = parse_config({"name": "single", "low_res": values}, "generate()").low_res
    made = images_of(
        models,
        texts,
        [low_res.negative_prompt] * len(texts),
        [(seed + number) % 2**64 for number in range(len(texts))],
        low_res.height or models.geometry.native_px,
        low_res.width or models.geometry.native_px,
        low_res.steps,
        low_res.guidance_scale,
        low_res.batch_size,
        low_res.wrap,
    )
    return [_good(each) for each in made]


def measure(
    low_res: str | Path | Image.Image,
    high_res: str | Path | Image.Image,
    prompt: str = "",
    *,
    model: str = PICTUREBOOK,
    clip: str | None = None,
) -> dict[str, Any]:
    """Measure an image and its enlargement. Returns the metrics by name, and the flags at the default thresholds.

    model: hub id or folder of the model that enlarged; its native size says where view borders are measured. clip: a
    CLIP model for the CLIP score of `prompt`; None leaves the score out. docs/evaluation-protocol.md explains the
    metrics. Raises UserError.
    """
    from resmaster_stages.diffusion.views import view_grid
    from resmaster_stages.metrics.flags import flags
    from resmaster_stages.metrics.metric import Pair
    from resmaster_stages.models.geometry import geometry_of
    from resmaster_stages.quality import measure as row_of

    low, high = open_image(low_res), open_image(high_res)
    config = ModelConfig(id=model)
    scorer = None
    if clip is not None:
        from resmaster_stages.metrics.clip_score import load_clip

        scorer = load_clip(clip)
    grid = view_grid(geometry_of(config), high.height, high.width, 0.5)
    row = row_of(Pair(low, high, grid.pixel_boxes, prompt, scorer))
    return {**row, "flags": flags(row, QualityConfig())}


def read_samples(dataset: Dataset) -> Iterator[tuple[Sample, dict[str, Any]]]:
    """Iterate over the finished samples of a dataset, in the plan's order, each with its row of the quality table.

    `sample.low_res.open()` and `sample.high_res.open()` are PIL images. `sample.captions` are rows of the captions
    table. Every object is checked against its commit record. Raises PlanError if there is no plan yet, and ShardError
    if an object is gone or damaged.
    """
    from resmaster_stages.dataset.reading import shard_samples

    for shard in sorted(dataset.commits("quality").numbers()):
        with shard_samples(dataset, shard, tuple(dataset.hashes)) as samples:
            for sample in samples:
                yield sample, {"key": sample.key, **samples.rows("quality", sample.key)[0]}


def upscale_as_configured(
    config: DatasetConfig,
    image: Image.Image,
    prompt: str,
    *,
    models: Models | None = None,
    captions: Sequence[str] | None = None,
    detail: Image.Image | None = None,
    progress: Progress | None = None,
) -> Image.Image:
    """Upscale `image` by `config.upscale`.

    models: None loads the models of `config.model`. captions: one per view; None: the configured captioner writes
    them. detail: a mask of where more detail is drawn. Raises UserError and SampleError.
    """
    from resmaster_stages.diffusion.views import target_size
    from resmaster_stages.high_res import caption_views
    from resmaster_stages.methods.settings import Enlargement
    from resmaster_stages.methods.upscale import enlarge_image, upscale_image
    from resmaster_stages.models.load import load_models
    from resmaster_stages.models.places import resolve_device, resolve_dtype

    method = config.upscale
    if captions is not None and not method.uses("captions"):
        raise ConfigError(f"captions: method {method.method} reads none as it is set; leave them out")
    if detail is not None:
        method.require_detail_mask("there is")
    if isinstance(method, Enlargement):
        device = models.device if models else resolve_device(config.model.device)
        return enlarge_image(image, method, device, resolve_dtype(config.model.dtype, device), progress)
    models = models or load_models(config.model)
    asked = method.uses("captions") and config.captions.source != "prompt"
    caption = partial(caption_views, config, prompt) if asked else None
    if captions is None and caption:
        captions = caption(image, *target_size(image.height, image.width, method.way()[0].scale))
    return upscale_image(
        models,
        image,
        prompt,
        config=method,
        captions=captions,
        caption=caption,
        detail=detail,
        seed=config.seed,
        progress=progress,
    )


def single(model: str, captioner: str = "auto", models: Models | None = None) -> dict[str, Any]:
    """The configuration to upscale one image with `model`, as a user would write it: settings for model and captioner.

    captioner: as `captions` in `upscale`. models: the model, if it is already loaded. Raises ConfigError.
    """
    picturebook, sdxl = model in PACK_MODELS, model == SDXL["id"]
    if captioner == "auto":
        captioner = PICTUREBOOK if picturebook else "prompt"
    upscale = dict(PICTUREBOOK_UPSCALE) if picturebook else {}
    adapter = models is not None and models.base.image_adapter() is not None
    few_step = models is not None and models.base.sampling.steppers
    if not (picturebook or sdxl or adapter):
        upscale["image_prompt"] = {"enabled": False}  # a bare checkpoint has no adapter
        upscale |= recommended(models.base.sampling if models else sampling_of(model))
    if models and few_step:
        upscale |= {**recommended(models.base.sampling), "stepper": few_step[0]}
    return {
        "name": "single",
        "model": SDXL if sdxl else {"id": model},
        "captions": {"source": captioner} if captioner in NO_CAPTIONER else {"source": "model", "model": captioner},
        "upscale": upscale,
    }


def sampling_of(model: str) -> Sampling:
    """What can be asked of the sampling of the model with this name. Raises ConfigError."""
    from resmaster_stages.models.bases import family_of

    config = parse_config({"name": "single", "model": {"id": model}}).model
    return family_of(config).sampling(config)


def recommended(sampling: Sampling, steps: bool = False) -> dict[str, Any]:
    """The recommended settings, where this project's defaults do not fit. `steps`: with their number also where the
    default number is fit."""
    if sampling == Sampling():
        return {}
    values: dict[str, Any] = {"guidance_scale": sampling.guidance_scale}
    if steps or sampling.most_steps < Sampling().steps:
        values["steps"] = sampling.steps
    return values


def as_models(model: Any) -> Models:
    """The loaded models for a name, a diffusers pipeline, or models that are already loaded. Raises ConfigError."""
    from resmaster_stages.models.load import load_models
    from resmaster_stages.models.parts import Models

    if isinstance(model, str | Path):
        return load_models(parse_config(single(str(model)), "model").model)
    return model if isinstance(model, Models) else Models.from_pipeline(model)


def open_image(image: str | Path | Image.Image) -> Image.Image:
    """An image as `decode_image` gives it, from a file or a PIL image. Raises UserError."""
    if not isinstance(image, str | Path | Image.Image):
        raise UserError(f"an image is a path or a PIL image, not {type(image).__name__}; give one of these")
    try:
        if isinstance(image, Image.Image):
            return convert_image(image, "the image")
        return decode_image(read_image_file(Path(image)), str(image))
    except SampleError as error:
        raise UserError(str(error)) from None


def read_image_file(path: Path) -> bytes:
    """The content of an image file. Raises UserError. Only regular files are opened, because a FIFO could block."""
    try:
        with open_regular(str(path)) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise UserError(
                    f"{path}: has {size:,} bytes, more than {MAX_FILE_BYTES:,}; compress it, or scale it down"
                )
            return file.read()
    except FileNotFoundError:
        reason = "is a link to nothing; give an image file" if path.is_symlink() else "no such image file"
        raise UserError(f"{path}: {reason}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is None:  # a folder, or no regular file
            raise UserError(f"{path}: {error}; give an image file") from None
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read ({reason}); give an image file that you may read") from None


def _good(made: Image.Image | SampleError) -> Image.Image:
    if isinstance(made, SampleError):
        raise made
    return made
