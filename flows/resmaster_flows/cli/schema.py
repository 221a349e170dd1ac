"""`resmaster schema`: prints the JSON schema of configurations, for editors. Needs no Prefect and loads no model."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from resmaster_stages.config.json_schema import json_schema

DESCRIPTION = (
    "Print the JSON schema (draft 2020-12) of configurations: every key with its meaning, kind and choices, those of "
    "methods from plugins included. An editor that has it completes keys and marks mistakes. `resmaster init` writes "
    "it beside its configurations."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb has no arguments of its own."""


def run(args: argparse.Namespace, console: Console) -> int:
    """Print the schema."""
    print(json.dumps(json_schema(), indent=1))
    return 0
