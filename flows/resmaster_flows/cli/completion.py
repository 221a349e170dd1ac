"""`resmaster completion`: prints a script by which a shell completes the command line. Loads no model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import shtab
import yaml
from rich.console import Console

from resmaster_flows.home import EXAMPLES
from resmaster_stages.config.method import methods
from resmaster_stages.dataset.stages import STAGES

DESCRIPTION = (
    "Print a script that lets a shell complete verbs, options, their choices, methods, presets, models and files. For "
    'bash, put eval "$(resmaster completion bash)" into ~/.bashrc; for zsh, write it to a file _resmaster in a folder '
    "of $fpath; for fish, to ~/.config/fish/completions/resmaster.fish."
)
SHELLS = ("bash", "zsh", "fish")
CONFIGURATION = shtab.glob("*.yaml", "*.yml", "*.json")
BY_METAVAR = {
    **{"CONFIG": CONFIGURATION, "ROOT": shtab.DIRECTORY, "FOLDER": shtab.DIRECTORY, "URL": shtab.DIRECTORY},
    **dict.fromkeys(("FILE", "PATH", "KEYS", "INPUT", "OUTPUT"), shtab.FILE),
}
"""What an argument is called in the help -> how it is completed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"one of: {', '.join(SHELLS)}")


def run(args: argparse.Namespace, console: Console) -> int:
    """Print the script."""
    from resmaster_flows.cli.main import parser

    top = parser()
    for verb in _verbs(top):
        verb.fill()
        for action in verb._actions:
            _tell_choices(action)
    print(shtab.complete(top, args.shell))
    return 0


def _verbs(top: argparse.ArgumentParser) -> Iterator[Any]:
    """The parsers of the verbs."""
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def _tell_choices(action: argparse.Action) -> None:
    """Give an argument what it is completed with. Many arguments have no choices for argparse, because a
    configuration's own messages about them are better."""
    known = {
        "method": list(methods()),
        "methods": list(methods()),
        "preset": sorted({preset for method in methods().values() for preset in method.presets}),
        "model": known_models(),
        "captioner": ["picturebook", "attention"],
        "stages": list(STAGES),
    }
    if action.choices is None and action.option_strings and action.dest in known:
        action.choices = known[action.dest]
    elif action.choices is None and isinstance(action.metavar, str) and action.metavar in BY_METAVAR:
        action.complete = BY_METAVAR[action.metavar]  # type: ignore[attr-defined]


def known_models() -> list[str]:
    """The base models of the examples."""
    values = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(EXAMPLES.glob("*.yaml")))
    return sorted({each["model"]["id"] for each in values})
