"""`resmaster upscale`: upscales one image of the user's own, by the same functions as the stages."""

from __future__ import annotations

import argparse
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image
from rich.console import Console

from resmaster_flows.cli.execute import hide_bars
from resmaster_flows.watch.progress import notes
from resmaster_flows.watch.terminal import say, steps
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.image_format import ImageFormat
from resmaster_stages.config.load import load_config, parse_config
from resmaster_stages.config.method import ColourMatch, methods, with_method
from resmaster_stages.config.model import SDXL, ModelConfig
from resmaster_stages.dataset.labels import ALTERED, ENHANCED
from resmaster_stages.diffusion.views import target_size
from resmaster_stages.errors import ConfigError, UserError
from resmaster_stages.library import open_image, single, upscale_as_configured
from resmaster_stages.methods.settings import Diffusion
from resmaster_stages.models.places import at_hub, to_be_downloaded
from resmaster_stages.progress import listening
from resmaster_stages.publish.card import without_folders
from resmaster_stages.storage.images import LONGEST_PX, encoder_options, require_writable
from resmaster_stages.storage.labels import Label, label_options, parameters

DESCRIPTION = "Upscale one image. With ResMaster it keeps the image's structure and regenerates its detail."

SDXL_GB = 17
"""What is downloaded for `SDXL`: UNet 10.3 GB, text encoders 3.3, image encoder 2.5, IP-Adapter 0.7, VAE 0.3."""

FORMATS = {".png": "PNG", ".webp": "WEBP", ".avif": "AVIF", ".jxl": "JXL", ".jpg": "JPEG", ".jpeg": "JPEG"}
_FURTHER: dict[str, ImageFormat] = {".avif": "avif", ".jxl": "jxl"}
LABELLED: dict[str, ImageFormat | Literal["jpeg"]] = {
    **{".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"},
    **_FURTHER,
}
"""Suffix of an output -> its format, as labels know it."""
"""Suffixes of the formats that are written as in a dataset."""
QUALITY = 95
"""The quality of formats that have one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("input", metavar="INPUT", help="image file")
    parser.add_argument("output", metavar="OUTPUT", help="image file to write (.png, .webp, .avif, .jxl or .jpg)")
    parser.add_argument("--force", action="store_true", help="overwrite OUTPUT if it is there already")
    parser.add_argument("--scale", type=float, default=4.0, help="target size over input size (default: 4)")
    parser.add_argument("--method", default="resmaster", help=f"one of: {', '.join(methods())} (default: resmaster)")
    parser.add_argument(
        "--preset",
        help="settings of the method: default, faithful (what its authors published), or exact (resmaster: what its "
        "default leaves out)",
    )
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what the image shows")
    parser.add_argument(
        "--detail-mask", metavar="FILE", help="method freescale: where this image is white, more detail is drawn anew"
    )
    parser.add_argument(
        "--model", default=SDXL["id"], metavar="ID", help=f"picturebook, a hub id, or a folder (default: {SDXL['id']})"
    )
    parser.add_argument(
        "--captioner",
        metavar="ID",
        help="caption each patch with this model, or with the words of the prompt that are seen there: attention "
        "(default: picturebook's own, else none)",
    )
    parser.add_argument("--config", metavar="CONFIG", help="take model, captioner and settings from this file instead")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument(
        "--colour-match",
        choices=get_args(ColourMatch),
        help="give the result the colours of INPUT: mean_std (over the whole image) or wavelet (place by place)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")


def settings(args: argparse.Namespace) -> DatasetConfig:
    """The configuration that the options of `resmaster upscale` describe."""
    if args.config:
        base = load_config(args.config).model_dump(mode="json", exclude_unset=True)
    else:
        base = single(args.model, args.captioner or "auto")
    upscale: dict[str, Any] = {**with_method(base.get("upscale", {}), args.method), "scale": args.scale}
    if args.preset is not None:
        upscale["preset"] = args.preset
    if args.steps is not None:
        upscale["steps"] = args.steps
    if args.colour_match is not None:
        upscale["colour_match"] = args.colour_match
    return parse_config({**base, "seed": args.seed, "upscale": upscale}, f"--scale {args.scale} --method {args.method}")


def check_output(path: Path, inputs: Sequence[Path], force: bool) -> None:
    """Raise UserError for an output file that cannot be written or must not be overwritten, before minutes of work.

    inputs: files that are never overwritten, by whatever name.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: unknown image format {path.suffix!r}; use one of {', '.join(FORMATS)}")
    if name := _FURTHER.get(path.suffix.lower()):
        try:
            require_writable(name)
        except ConfigError as error:
            raise UserError(f"{path}: {error}") from None
    if not os.path.isdir(path.parent):
        raise UserError(f"{path}: there is no folder {path.parent}; make it first")
    there = os.path.exists(path)
    if any(there and os.path.exists(each) and path.samefile(each) for each in inputs):
        raise UserError(f"{path}: is the input itself, which is never overwritten; choose another output file")
    if (there and not path.is_file()) or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: cannot be written; choose another output file")
    try:
        path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another output file") from None
    if not force:
        raise UserError(f"{path}: is there already; choose another output file, or overwrite it with --force")


def check_size(path: Path, size: tuple[int, int]) -> None:
    """Raise UserError for an image of `size` px that is too large for the format of the output file."""
    limit = LONGEST_PX.get(FORMATS[path.suffix.lower()])
    if limit is not None and max(size) > limit:
        raise UserError(f"{path}: the format holds at most {limit} px a side, not {max(size)}; write a .png file")


def run(args: argparse.Namespace, console: Console) -> int:
    """Upscale INPUT to OUTPUT, and show how far it is."""
    source, target = Path(args.input), Path(args.output)
    mask = [Path(args.detail_mask)] if args.detail_mask else []
    check_output(target, [source, *mask], args.force)
    config = settings(args)
    if mask:
        config.upscale.require_detail_mask("--detail-mask gives")
    image = open_image(source)
    detail = open_image(mask[0]) if mask else None
    check_size(target, target_size(image.height, image.width, config.upscale.scale))
    if config.upscale.base_model:
        tell_download(config, console)
    if not (console.is_terminal and at_hub(config.model.id)):
        hide_bars()
    with steps(console, beginning(config)) as progress, listening(notes(lambda line: say(console, f"  {line}"))):
        result = upscale_as_configured(config, image, args.prompt, detail=detail, progress=progress)
    save(result, target, args.force, label_of(config, args.prompt, image.size))
    say(console, f"{source} ({image.width} x {image.height} px) -> {target} ({result.width} x {result.height} px)")
    return 0


def label_of(config: DatasetConfig, prompt: str, size: tuple[int, int]) -> Label | None:
    """What the result says of itself, by `image_metadata`. size: (width, height) of INPUT, in px."""
    upscale = config.upscale
    if config.image_metadata == "none":
        return None
    if not isinstance(upscale, Diffusion):
        return Label(ALTERED if upscale.networks() else ENHANCED)
    model = without_folders(config.model.id)
    if config.image_metadata == "source":
        return Label(ALTERED, model)
    settings: dict[str, object] = {
        "Steps": upscale.steps,
        "CFG scale": f"{upscale.guidance_scale:g}",
        "Seed": config.seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": model,
        "Hires upscale": f"{upscale.scale:g}",
        "Hires upscaler": upscale.method,
    }
    return Label(ALTERED, model, prompt, parameters(prompt, upscale.negative_prompt, settings))


def beginning(config: DatasetConfig) -> str:
    """What is done before the first step."""
    if not config.upscale.base_model:
        return "starting"
    captions = config.upscale.uses("captions") and config.captions.source != "prompt"
    return f"loading {config.model.id}{', captioning patches' if captions else ''}"


def tell_download(config: DatasetConfig, console: Console) -> None:
    """Say it if the model is downloaded first, which may take long and fill a disk."""
    if to_be_downloaded(config.model):
        size = f" (some {SDXL_GB} GB)" if config.model == ModelConfig(**SDXL) else ""
        line = f"{config.model.id} is not on this machine yet, and is downloaded first{size}"
        say(console, f"{line}; --model picturebook needs no download")


def save(image: Image.Image, path: Path, force: bool, label: Label | None = None) -> None:
    """Write `image` under a temporary name first, so that the final name never holds a half-written file.

    Raises UserError. Without `force`, a file that has appeared under the final name meanwhile is kept, and so is the
    result.
    """
    part = path.with_name(f"resmaster-{uuid.uuid4().hex[:8]}{path.suffix}")
    suffix = path.suffix.lower()
    options = encoder_options(_FURTHER[suffix], QUALITY) if suffix in _FURTHER else {"quality": QUALITY}
    if label:
        options = options | label_options(label, LABELLED[suffix])
    try:
        with part.open("xb") as file:
            image.save(file, format=FORMATS[suffix], **options)
        _rename(part, path, force)
    except FileExistsError:
        raise UserError(f"{path}: has appeared meanwhile, and is kept; the result is in {part}") from None
    except BaseException as error:
        part.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another output file") from None


def _rename(part: Path, path: Path, force: bool) -> None:
    """Rename `part` to `path`. Raises FileExistsError if `path` exists, unless `force` is set.

    The name is taken by an empty file first: a hard link would do both at once, and some disks have none.
    """
    if not force:
        path.touch(exist_ok=False)
    try:
        os.replace(part, path)
    except BaseException:
        if not force:
            path.unlink()
        raise
