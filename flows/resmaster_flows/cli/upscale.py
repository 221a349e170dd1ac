"""`resmaster upscale`: upscales one image of the user's own, by the same functions as the stages."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import Progress

from resmaster_flows.watch.progress import notes
from resmaster_flows.watch.terminal import say
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import load_config, parse_config
from resmaster_stages.config.method import methods, with_method
from resmaster_stages.config.model import SDXL
from resmaster_stages.errors import UserError
from resmaster_stages.library import open_image, single, upscale_as_configured
from resmaster_stages.progress import listening

HELP = "upscale one image of your own"
DESCRIPTION = "Upscale one image. With ResMaster it keeps the image's structure and regenerates its detail."

FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("input", metavar="INPUT", help="image file")
    parser.add_argument("output", metavar="OUTPUT", help="image file to write (.png, .webp or .jpg)")
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
        "--captioner", metavar="ID", help="caption each patch with this model (default: picturebook's own, else none)"
    )
    parser.add_argument("--config", metavar="CONFIG", help="take model, captioner and settings from this file instead")
    parser.add_argument("--steps", type=int, help="denoising steps")
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
    return parse_config({**base, "seed": args.seed, "upscale": upscale}, f"--scale {args.scale} --method {args.method}")


def check_output(path: Path) -> None:
    """Raise UserError for an output file that cannot be written, before minutes of work."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: unknown image format {path.suffix!r}; use one of {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it first")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: cannot be written; choose another output file")


def run(args: argparse.Namespace, console: Console) -> int:
    """Upscale INPUT to OUTPUT, with a progress bar."""
    source, target = Path(args.input), Path(args.output)
    check_output(target)
    config = settings(args)
    if args.detail_mask:
        config.upscale.require_detail_mask("--detail-mask gives")
    image = open_image(source)
    detail = open_image(args.detail_mask) if args.detail_mask else None
    bars = Progress(console=console, transient=True, disable=not console.is_terminal)
    with bars as progress, listening(notes(lambda line: say(console, f"  {line}"))):
        bar = progress.add_task("loading models, captioning patches", total=None)

        def step(done: int, total: int) -> None:
            progress.update(bar, description="upscaling", completed=done, total=total)

        result = upscale_as_configured(config, image, args.prompt, detail=detail, progress=step)
    save(result, target)
    say(console, f"{source} ({image.width} x {image.height} px) -> {target} ({result.width} x {result.height} px)")
    return 0


def save(image: Image.Image, path: Path) -> None:
    """Write `image` under a temporary name and rename it, so that the final name never holds a half-written file."""
    part = path.with_name(path.name + ".part")
    try:
        image.save(part, format=FORMATS[path.suffix.lower()], quality=95)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another output file") from None
    finally:
        part.unlink(missing_ok=True)
