"""`resmaster explain`: prints all that is known of one sample or shard."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from resmaster_flows.cli.arguments import add_root
from resmaster_stages.redaction import printable_json, printable_lines

DESCRIPTION = (
    "Print what a sample was made from, by what and when, why it failed if it did, and where its bytes lie, with a "
    "command to fetch each file. Of a shard: its stages, why each attempt at it failed, and its samples. Reads the "
    "dataset only; needs no Prefect."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_root(parser)
    parser.add_argument(
        "key",
        metavar="KEY|SHARD",
        help="the sample's key, or the beginning of it; the report shows keys; or the number of a shard",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace, console: Console) -> int:
    """Print the explanation, as text or JSON."""
    from resmaster_stages.dataset.dataset import open_dataset
    from resmaster_stages.inspection.explain import explain, explain_shard, shard_of, spelled

    dataset = open_dataset(args.root)
    shard = shard_of(dataset, args.key)
    found = explain(dataset, args.key) if shard is None else explain_shard(dataset, shard)
    if args.json:
        print(printable_json(json.dumps(found.to_json(), indent=2, ensure_ascii=False)))
    else:
        print(printable_lines(spelled(found)))
    return 0
