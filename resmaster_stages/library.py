"""The public functions for scripts and notebooks that no room has in this form: `import resmaster_stages as rm`.

A public face: it may use every room below the flows, and no room uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps, UnidentifiedImageError

from resmaster_stages.config.dataset import DatasetConfig, LowResConfig, QualityConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import DEFAULT, with_method
from resmaster_stages.config.model import SDXL, ModelConfig
from resmaster_stages.errors import ConfigError, SampleError, UserError
from resmaster_stages.models.identity import PICTUREBOOK

if TYPE_CHECKING:
    from resmaster_stages.dataset.dataset import Dataset
    from resmaster_stages.dataset.sample import Sample
    from resmaster_stages.models.parts import Models

Progress = Callable[[int, int], None]
"""Hears (steps done, steps in all), of each pass."""

PICTUREBOOK_UPSCALE: Mapping[str, Any] = {
    "steps": 20,
    "guidance_scale": 4.0,
    "negative_prompt": "",
    "micro_conditioning": "native",
}
"""What suits the embedded pack, as in deployments/datasets/picturebook.yaml."""


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
    """`image`, a file or a PIL image of any size, re-imagined at `scale` (4) times its size, in RGB.

    model: `picturebook` (the embedded model, for its own small world), a hub id such as
    `stabilityai/stable-diffusion-xl-base-1.0`, a folder, a diffusers pipeline that you have loaded, or what
    `load_models` gave. captions: one per view, row-major; or, for a model that is given by name, a captioner that
    writes them (`picturebook`, a hub id, a folder); `prompt`: all views have the prompt; `auto`: picturebook has its
    own captioner, other models have the prompt. settings: keys of the part `upscale` of a configuration
    (docs/configuration.md), such as scale, method, preset, steps.

    Raises UserError, in one line that says what to do (no such image, an unknown setting, a model that cannot be
    loaded), and SampleError if the model produced nothing that can be seen.
    """
    low_res = open_image(image)
    models = None if isinstance(model, str | Path) else as_models(model)
    name = models.identity.partition("@")[0] if models else str(model)
    captioner = captions if isinstance(captions, str) else "prompt"
    if models and name != PICTUREBOOK and captioner not in ("auto", "prompt"):
        raise ConfigError(
            f"captions: the captioner {captioner!r} needs a model that is given by name; give one caption per view "
            "instead"
        )
    base = single(name, captioner, adapter=models is not None and models.base.image_adapter() is not None)
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
    """An image of the model's native size for each prompt; the seeds are `seed`, `seed` + 1 and so on.

    model: as of `upscale`. settings: keys of the part `low_res` of a configuration, such as steps, guidance_scale,
    height. Raises UserError for bad input, and SampleError for a prompt from which no image can be made.
    """
    from resmaster_stages.methods.generate import generate as images_of

    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    low_res: LowResConfig = parse_config({"name": "single", "low_res": settings}, "generate()").low_res
    models = as_models(model)
    made = images_of(
        models,
        texts,
        [low_res.negative_prompt] * len(texts),
        [seed + number for number in range(len(texts))],
        low_res.height or models.geometry.native_px,
        low_res.width or models.geometry.native_px,
        low_res.steps,
        low_res.guidance_scale,
        low_res.batch_size,
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
    """The metrics of an image and its enlargement, by name, with the flags that the default thresholds raise.

    model: hub id or folder of the model that enlarged; its native size says where view borders are looked at. clip: a
    CLIP model for the CLIP score of `prompt`; None leaves the score out (docs/evaluation-protocol.md says what they
    mean). Raises UserError.
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
    """The finished samples of a dataset, in the plan's order, each with its row of the quality table.

    `sample.low_res.open()` and `sample.high_res.open()` are PIL images; `sample.captions` are rows of the captions
    table. Every object is checked against its commit record. Raises PlanError if there is no plan yet, ShardError if an
    object is gone or damaged.
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
    """`image` enlarged by `config.upscale`, with the captions that the configuration's captioner writes.

    models: None loads those of `config.model`. captions: one per view; None asks the captioner. detail: a mask of where
    more detail is drawn. Raises UserError and SampleError.
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


def single(model: str, captioner: str = "auto", adapter: bool = False) -> dict[str, Any]:
    """The configuration of one image by `model`, as a user would write it: what suits the model, and the captioner.

    captioner: as `captions` of `upscale`. adapter: whether a model that is loaded already brings an IP-Adapter.
    """
    picturebook, sdxl = model == PICTUREBOOK, model == SDXL["id"]
    if captioner == "auto":
        captioner = PICTUREBOOK if picturebook else "prompt"
    upscale = dict(PICTUREBOOK_UPSCALE) if picturebook else {}
    if not (picturebook or sdxl or adapter):
        upscale["image_prompt"] = {"enabled": False}  # a bare checkpoint brings no adapter
    return {
        "name": "single",
        "model": SDXL if sdxl else {"id": model},
        "captions": {"source": "prompt"} if captioner == "prompt" else {"source": "model", "model": captioner},
        "upscale": upscale,
    }


def as_models(model: Any) -> Models:
    """The loaded parts of a model that is given by name, as a pipeline, or loaded already. Raises ConfigError."""
    from resmaster_stages.models.load import load_models
    from resmaster_stages.models.parts import Models

    if isinstance(model, str | Path):
        return load_models(parse_config(single(str(model)), "model").model)
    return model if isinstance(model, Models) else Models.from_pipeline(model)


def open_image(image: str | Path | Image.Image) -> Image.Image:
    """An image, upright and in RGB, from a file or as PIL has it. Raises UserError."""
    if not isinstance(image, str | Path | Image.Image):
        raise UserError(f"an image is a path or a PIL image, not {type(image).__name__}; give one of these")
    try:
        with Image.open(image) if isinstance(image, str | Path) else image.copy() as opened:
            opened.load()
            return ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{image}: no such image file") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{image}: not an image that can be read ({error}); convert it to PNG or JPEG first") from None


def _good(made: Image.Image | SampleError) -> Image.Image:
    if isinstance(made, SampleError):
        raise made
    return made
