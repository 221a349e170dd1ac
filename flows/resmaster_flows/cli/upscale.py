"""`resmaster upscale`: upscales images of the user's own, by the same functions as the stages."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from PIL import Image
from rich.console import Console

from resmaster_flows.cli.arguments import add_set
from resmaster_flows.cli.execute import hide_bars
from resmaster_flows.cli.image_files import QUALITY, Encoding, Job, OutputFormat, Wanted, check_size, jobs_of, write
from resmaster_flows.watch.images import Step, upscaling
from resmaster_flows.watch.progress import notes
from resmaster_flows.watch.terminal import say
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import Lines, apply_settings, load_config, parse_config, parse_setting
from resmaster_stages.config.method import ColourMatch, Method, methods, with_method
from resmaster_stages.config.model import SDXL
from resmaster_stages.dataset.labels import ALTERED, ENHANCED
from resmaster_stages.diffusion.views import target_size
from resmaster_stages.errors import SampleError, UserError
from resmaster_stages.library import open_image, read_image_file, single, upscale_as_configured
from resmaster_stages.methods.settings import Diffusion, Enlargement
from resmaster_stages.models.downloads import downloads_of
from resmaster_stages.models.places import at_hub
from resmaster_stages.progress import listening
from resmaster_stages.publish.card import spell_bytes, without_folders
from resmaster_stages.redaction import one_line
from resmaster_stages.storage.images import decode_alpha, decode_image
from resmaster_stages.storage.labels import Label, parameters
from resmaster_stages.storage.sources import MAX_FILE_BYTES

log = logging.getLogger(__name__)

DESCRIPTION = (
    "Upscale images. With ResMaster they keep their structure, and their detail is drawn anew. INPUT is an image file, "
    "a folder, a pattern in quotes ('photos/*.jpg'), or - for standard input. OUTPUT is a file for one image, - for "
    "standard output, or a folder. In a folder, results that are there already are kept, and the images they were made "
    "of are left out."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("input", metavar="INPUT", nargs="+", help="image file, folder, pattern, or - (standard input)")
    parser.add_argument(
        "output",
        metavar="OUTPUT",
        help="image file to write (.png, .webp, .avif, .jxl or .jpg), folder, or - (standard output)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite results that are there already")
    parser.add_argument(
        "--output-format",
        choices=get_args(OutputFormat),
        help="format of results (default: as the name of OUTPUT says; in a folder, that of INPUT, or png)",
    )
    parser.add_argument(
        "--quality",
        type=int,
        metavar="N",
        help=f"quality of webp, jpeg, avif and jxl, 1 to 100 (default: {QUALITY}); 100 loses nothing with webp and jxl",
    )
    parser.add_argument(
        "--suffix", default="", metavar="TEXT", help="for a folder: put this behind each name, as _4x in photo_4x.png"
    )
    parser.add_argument(
        "--bit-depth",
        type=int,
        choices=(8, 16),
        default=8,
        help="bits per channel (default: 8); 16: png with the computed values, which are not rounded to 256 levels",
    )
    parser.add_argument(
        "--alpha",
        choices=("drop", "keep"),
        default="drop",
        help="transparent places become white (drop), or stay transparent (keep) (default: drop)",
    )
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
    add_set(parser)


def settings(args: argparse.Namespace) -> DatasetConfig:
    """The configuration that the options of `resmaster upscale` describe."""
    added = [parse_setting(text) for text in args.settings]
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
    values = apply_settings({**base, "seed": args.seed, "upscale": upscale}, added)
    return parse_config(values, f"--scale {args.scale} --method {args.method}", Lines(None, settings=added))


def run(args: argparse.Namespace, console: Console) -> int:
    """Upscale each INPUT, and show how far it is. Returns 1 if one of several images could not be upscaled, else 0."""
    mask = [Path(args.detail_mask)] if args.detail_mask else []
    wanted = Wanted(tuple(args.input), args.output, args.suffix, encoding_of(args), args.force, tuple(mask))
    jobs, there = jobs_of(wanted)
    config = settings(args)
    log.debug("%d images, %s", len(jobs), {"seed": config.seed, **config.upscale.model_dump(mode="json")})
    if wanted.encoding.bits == 16:
        require_floats(config.upscale)
    if mask:
        config.upscale.require_detail_mask("--detail-mask gives")
    if there:
        say(console, f"{there} result{'s are' if there > 1 else ' is'} there already and kept; --force makes them anew")
    if not jobs:
        return 0
    work = Work(config, args.prompt, wanted.encoding, open_image(mask[0]) if mask else None, args.force)
    many = len(jobs) + there > 1
    first = None if many else work.read(jobs[0])  # an image that is unfit is said before anything is loaded
    if not (console.is_terminal and at_hub(config.model.id)):
        hide_bars()
    tell_downloads(config, console)
    with upscaling(console, len(jobs)) as begin, listening(notes(lambda line: say(console, f"  {line}"))):
        if first:
            say(console, work.do(jobs[0], first, begin(jobs[0].name, beginning(config))))
            return 0
        failed = each_of(jobs, work, begin, console)
    ok, bad = len(jobs) - failed, f", {failed} failed" if failed else ""
    say(console, f"{ok} of {len(jobs)} images upscaled{bad}", result=bool(failed))
    return 1 if failed else 0


def each_of(jobs: Sequence[Job], work: Work, begin: Callable[[str, str], Step], console: Console) -> int:
    """Upscale several images. Returns how many could not be upscaled, each of which is told. Raises ConfigError if a
    model cannot be loaded."""
    work.load()
    failed = 0
    for job in jobs:
        step = begin(job.name, beginning(work.config))
        try:
            done = work.do(job, work.read(job), step)
        except (UserError, SampleError) as error:
            failed += 1
            say(console, f"resmaster: {one_line(error)}", result=True)
        else:
            say(console, done)
    return failed


@dataclass(frozen=True)
class Input:
    """A decoded input."""

    image: Image.Image
    """Upright RGB, on white."""
    alpha: Image.Image | None
    """How opaque it is; None: throughout, or transparency is not kept."""


@dataclass(frozen=True)
class Work:
    """What is the same for all images of a command."""

    config: DatasetConfig
    prompt: str
    encoding: Encoding
    detail: Image.Image | None
    force: bool

    def load(self) -> None:
        """Load the models, so that one that cannot be loaded is said once. They stay loaded. Raises ConfigError."""
        from resmaster_stages.captions import load_writer
        from resmaster_stages.models.load import load_models

        if self.config.upscale.base_model:
            load_models(self.config.model)
            if captions_patches(self.config):
                load_writer(self.config)

    def read(self, job: Job) -> Input:
        """The image of a job. Raises UserError if it cannot be read, or its result could not be written."""
        data = read_standard_input() if job.source is None else read_image_file(job.source)
        try:
            image = decode_image(data, job.name)
            alpha = decode_alpha(data, job.name) if self.encoding.alpha else None
        except SampleError as error:
            raise UserError(str(error)) from None
        check_size(job, target_size(image.height, image.width, self.config.upscale.scale))
        return Input(image, alpha)

    def do(self, job: Job, given: Input, step: Step) -> str:
        """Upscale an image and write the result. Returns what was done, in one line. Raises UserError and
        SampleError."""
        image = given.image
        deep = self.encoding.bits == 16
        made = upscale_as_configured(self.config, image, self.prompt, detail=self.detail, progress=step, unrounded=deep)
        label = label_of(self.config, self.prompt, image.size)
        write(self.encoding.encode(made, given.alpha, job.format, label), job.target, self.force)
        there = "standard output" if job.target is None else job.target
        height, width = target_size(image.height, image.width, self.config.upscale.scale)
        return f"{job.name} ({image.width} x {image.height} px) -> {there} ({width} x {height} px)"


def read_standard_input() -> bytes:
    """An image file from standard input. Raises UserError."""
    if sys.stdin.isatty():
        raise UserError("- as INPUT: standard input is a terminal; lead an image file into it")
    data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise UserError(f"standard input: has more than {MAX_FILE_BYTES:,} bytes; compress the image, or scale it down")
    return data


def require_floats(method: Method) -> None:
    """Raise UserError if the method's results have 8 bits."""
    if method.colour_match != "none":
        raise UserError(f"--bit-depth 16: colours are matched in 8 bits; leave colour_match: {method.colour_match} out")
    if isinstance(method, Enlargement) and not method.in_floats:
        raise UserError(f"--bit-depth 16: method {method.method} computes in 8 bits; choose another method")


def encoding_of(args: argparse.Namespace) -> Encoding:
    """How results are written, by the options. Raises UserError."""
    if args.quality is not None and not 1 <= args.quality <= 100:
        raise UserError(f"--quality {args.quality}: give a number from 1 to 100")
    return Encoding(args.output_format, args.quality, args.bit_depth, args.alpha == "keep")


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
    return f"loading {config.model.id}{', captioning patches' if captions_patches(config) else ''}"


def captions_patches(config: DatasetConfig) -> bool:
    """Whether patches get captions of their own."""
    return config.upscale.uses("captions") and config.captions.source != "prompt"


def tell_downloads(config: DatasetConfig, console: Console) -> None:
    """Say which models are fetched first, which may take long and fill a disk."""
    found = downloads_of(config)
    for each in found:
        size = "size unknown" if each.bytes is None else f"some {spell_bytes(each.bytes)}"
        say(console, f"{each.model} is not on this machine yet, and is downloaded first ({size})")
    if found:
        say(console, "--model picturebook needs no download")
