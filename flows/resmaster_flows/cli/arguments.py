"""Arguments that several verbs share: a source (CONFIG and its overrides) and the ROOT of a dataset."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from resmaster_stages.config.dataset import DatasetConfig, DispatchConfig
from resmaster_stages.config.load import load_config
from resmaster_stages.config.part import UNFIT
from resmaster_stages.errors import UserError

if TYPE_CHECKING:
    from resmaster_stages.inspection.key_lists import KeyList


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG and its overrides, which `config_of` reads."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file; `resmaster init` writes some to start from")
    parser.add_argument(
        "--root", metavar="URL", help="folder or s3://bucket/prefix to build under, instead of CONFIG's"
    )
    parser.add_argument("--prompts", metavar="FILE", help="prompts (.txt .csv .jsonl .parquet), instead of CONFIG's")
    parser.add_argument("--images", metavar="PATH", help="your own low-res images: a folder or WebDataset .tar shards")
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N prompts or images")
    parser.add_argument(
        "--allow-overwriting-store",
        action="store_true",
        help="build on a store that lets two writers both win (see doctor); run one process at a time then",
    )
    parser.add_argument(
        "--executor",
        choices=("dask", "ray"),
        help="do the shards on a cluster that is there already (DASK_SCHEDULER_ADDRESS or RAY_ADDRESS)",
    )
    add_set(parser)


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add `--set`, whose values `load_config` reads."""
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="set a key of the configuration, as upscale.steps=20 (may be repeated; counts more than CONFIG and the "
        "other options)",
    )


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Add the price and the limits of money and hours, which `limited` reads."""
    parser.add_argument("--price", metavar="X", type=float, help="the price of one worker's hour, in any currency")
    parser.add_argument(
        "--max-cost",
        metavar="X",
        type=float,
        help="begin no shard once the dataset has cost this much, earlier builds included (needs a price)",
    )
    parser.add_argument("--max-hours", metavar="H", type=float, help="begin no shard once this build has run so long")


def limited(config: DispatchConfig, args: argparse.Namespace) -> DispatchConfig:
    """`config` with the price and the limits of the command line. Raises UserError for a value that cannot be used."""
    names = ("price", "max_cost", "max_hours")
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    try:
        return DispatchConfig.model_validate(config.model_dump() | given) if given else config
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = "".join(f"--{str(name).replace('_', '-')} {given.get(str(name))}: " for name in first["loc"])
        raise UserError(f"{option}{first['msg'].removeprefix('Value error, ')}") from None


def add_exclude(parser: argparse.ArgumentParser) -> None:
    """Add `--exclude`, which `excluded_of` reads."""
    parser.add_argument(
        "--exclude",
        metavar="KEYS",
        help="never plan these samples: keys or their beginnings with commas between them, a .txt file of keys, or a "
        ".csv or .parquet file with a column `key` (of choices: the rejected ones); the dataset keeps the list",
    )


def excluded_of(args: argparse.Namespace) -> KeyList | None:
    """The list that `--exclude` gives, or None."""
    from resmaster_stages.inspection.key_lists import read_key_list

    return None if args.exclude is None else read_key_list(args.exclude, "--exclude")


def config_of(args: argparse.Namespace) -> DatasetConfig:
    """CONFIG with the command line's overrides. Relative paths in the overrides become absolute."""
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: give a number of at least 1")
    if "" in (args.prompts, args.images):
        raise UserError("--prompts and --images cannot be empty: give a path or an s3:// URL, or leave the option out")
    if args.prompts and args.images:
        raise UserError(
            "--prompts and --images exclude each other: give one; prompts for your images go beside them as .txt"
        )

    def absolute(path: str | None) -> str | None:
        if path is None or "://" in path or UNFIT.search(path):
            return path
        return str(Path(os.path.expanduser(path)).resolve())

    config = load_config(
        args.config,
        settings=args.settings,
        root=args.root,
        prompts=absolute(args.prompts),
        images=absolute(args.images),
        limit=args.limit,
        allow_overwriting_store=args.allow_overwriting_store or None,
    )
    dispatch = limited(config.dispatch, args)
    if args.executor is not None:
        dispatch = dispatch.model_copy(update={"where": args.executor})
    return config if dispatch is config.dispatch else config.model_copy(update={"dispatch": dispatch})


def add_root(parser: argparse.ArgumentParser) -> None:
    """Add ROOT, for verbs that work on an existing dataset."""
    parser.add_argument("root", metavar="ROOT", help="the dataset's folder or URL (or a root that holds just one)")
