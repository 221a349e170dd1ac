"""`resmaster init`: writes configurations and prompts to start from. Needs no Prefect and loads no model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console

from resmaster_flows.home import EXAMPLES, PROMPTS
from resmaster_flows.watch.terminal import say
from resmaster_stages.errors import UserError, has_extra, installation
from resmaster_stages.redaction import quoted

DESCRIPTION = (
    "Write a configuration of the demo (picturebook.yaml), some for SDXL, FLUX.1 and other base models, and a file of "
    "prompts, to be changed as you like. Overwrites nothing."
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "folder", metavar="FOLDER", nargs="?", default=".", help="folder to write them to (default: this one)"
    )


def run(args: argparse.Namespace, console: Console) -> int:
    """Write the files, and say which command comes next."""
    folder, files = Path(args.folder), starter()
    write(folder, files)
    say(console, f"written to {folder}: {', '.join(files)}")
    first = "" if has_extra("pipeline") else f"{installation('pipeline')} && "
    say(console, f"next: {first}resmaster run {quoted(folder / CONFIGURATIONS[0])}")
    return 0


def starter() -> dict[str, str]:
    """Name -> text of each file. The configurations are the examples, with the prompts beside them."""
    texts = {name: (EXAMPLES / name).read_text(encoding="utf-8") for name in CONFIGURATIONS}
    files = {name: text.replace(PROMPTS_OF_EXAMPLES, PROMPTS.name) for name, text in texts.items()}
    return {**files, PROMPTS.name: PROMPTS.read_text(encoding="utf-8")}


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
