"""`resmaster init`: writes configurations and prompts to start from. Needs no Prefect and loads no model."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

from rich.console import Console

from resmaster_flows.home import EXAMPLES, PROMPTS
from resmaster_flows.watch.terminal import say
from resmaster_stages.config.commented import commented
from resmaster_stages.config.json_schema import json_schema
from resmaster_stages.config.part import UNFIT
from resmaster_stages.errors import UserError, has_extra, installation
from resmaster_stages.redaction import holds_credentials, quoted

DESCRIPTION = (
    "Write a configuration of the demo (picturebook.yaml), some for SDXL, FLUX.1 and other base models, a file of "
    "prompts, and the schema of configurations for editors. With --base, write one configuration in which every key is "
    "explained. Overwrites nothing."
)
CONFIGURATIONS = (
    "picturebook.yaml",
    "sdxl-2k.yaml",
    "sdxl-4k.yaml",
    "sdxl-few-step-4k.yaml",
    "sdxl-controlnet-4k.yaml",
    "flux-4k.yaml",
    "z-image-4k.yaml",
    "sd35-4k.yaml",
    "pixart-4k.yaml",
    "qwen-4k.yaml",
)
"""Those of the examples that a user starts from; the first one is the demo."""
PROMPTS_OF_EXAMPLES = f"../../resmaster_stages/picturebook/{PROMPTS.name}"
"""The prompts as the examples name them in a checkout."""


SCHEMA = "resmaster.schema.json"
"""The JSON schema beside the configurations."""
HEAD = f"# yaml-language-server: $schema={SCHEMA}\n"
"""The line by which editors find the schema."""
EXPLAINED = """\
# Keys that are not set stand as comments, with the value that they have now. To set a key, remove the "# " before it.
# Lines with ## say what the key below means.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "folder", metavar="FOLDER", nargs="?", default=".", help="folder to write them to (default: this one)"
    )
    parser.add_argument(
        "--base",
        choices=[Path(name).stem for name in CONFIGURATIONS],
        help="write the configuration of this base alone, with every key explained",
    )
    parser.add_argument("--prompts", metavar="FILE", help="with --base: your prompts (.txt .csv .jsonl .parquet)")
    parser.add_argument("--images", metavar="PATH", help="with --base: your own small images, instead of prompts")


def run(args: argparse.Namespace, console: Console) -> int:
    """Write the files, and say which command comes next."""
    folder = Path(args.folder)
    if args.base is None:
        if args.prompts is not None or args.images is not None:
            raise UserError(
                "--prompts and --images are for one configuration; name it with --base, e.g. --base sdxl-4k"
            )
        files, first = starter(), CONFIGURATIONS[0]
        write(folder, files)
    else:
        first = f"{args.base}.yaml"
        files = explained(first, source_of(args.prompts, args.images))
        beside = {name for name in files if name != first and os.path.lexists(folder / name)}  # of an earlier `init`
        files = {name: text for name, text in files.items() if name not in beside}
        write(folder, files)
    say(console, f"written to {folder}: {', '.join(files)}", result=True)
    before = "" if has_extra("pipeline") else f"{installation('pipeline')} && "
    say(console, f"next: {before}resmaster run {quoted(folder / first)}", result=True)
    return 0


def starter() -> dict[str, str]:
    """Name -> text of each file. The configurations are the examples, with the prompts beside them."""
    return {**{name: HEAD + example(name) for name in CONFIGURATIONS}, **_beside()}


def explained(name: str, source: str | None) -> dict[str, str]:
    """The files of one configuration in which every key is explained. source: its line for prompts or images, or None
    for the prompts of the demo."""
    text = example(name)
    if source is not None:
        text = re.sub(r"^prompts:.*$", lambda _: source, text, count=1, flags=re.MULTILINE)
    files = {name: HEAD + EXPLAINED + commented(text), **_beside()}
    if source is not None:
        del files[PROMPTS.name]
    return files


def source_of(prompts: str | None, images: str | None) -> str | None:
    """The line of a configuration for the user's prompts or images. Raises UserError."""
    if prompts is not None and images is not None:
        raise UserError("--prompts and --images exclude each other: give one")
    for key, value in (("prompts", prompts), ("images", images)):
        if value is None:
            continue
        if not value or UNFIT.search(value) or holds_credentials(value):
            raise UserError(f"--{key}: give a path or an s3:// URL without credentials")
        place = value if "://" in value else str(Path(os.path.expanduser(value)).resolve())
        return f"{key}: {json.dumps(place, ensure_ascii=False)}"
    return None


def example(name: str) -> str:
    """An example configuration, with the prompts beside it."""
    return (EXAMPLES / name).read_text(encoding="utf-8").replace(PROMPTS_OF_EXAMPLES, PROMPTS.name)


def _beside() -> dict[str, str]:
    schema = json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"
    return {PROMPTS.name: PROMPTS.read_text(encoding="utf-8"), SCHEMA: schema}


def write(folder: Path, files: dict[str, str]) -> None:
    """Write the files into `folder`, which is made where it is missing. Raises UserError, before anything is written,
    if one of them is there already."""
    for name in files:
        if os.path.lexists(folder / name):
            raise UserError(f"{folder / name}: is there already, and nothing was written; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with (folder / name).open("x", encoding="utf-8") as file:  # it may have appeared meanwhile
                file.write(text)
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: cannot be written ({reason}); give another folder") from None
