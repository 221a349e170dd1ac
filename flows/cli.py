"""The command line. Parses, calls, prints; a user's mistake is one line on stderr and exit status 2.

Exit status: 0 done, 1 some shards could not be finished, 2 bad input, 130 interrupted (143 by SIGTERM).
Heavy imports (torch, Prefect) happen inside the commands that need them, so that `status` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.doctor import add_arguments as doctor_arguments
from flows.doctor import doctor
from flows.gc import add_arguments as gc_arguments
from flows.gc import gc
from flows.selection import parse_numbers, parse_stages
from flows.stop import MESSAGE, Terminated, exit_status, stoppable
from flows.verify import add_arguments as verify_arguments
from flows.verify import verify
from resmaster_stages.config import METHODS, SDXL, STAGES, DatasetConfig, Stage, load_config
from resmaster_stages.disclosure import one_line
from resmaster_stages.errors import ResMasterError, UserError

if TYPE_CHECKING:
    from flows.build import BuildResult
    from resmaster_stages.standing import Status
    from resmaster_stages.storage.dataset import Dataset

ENVIRONMENT = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # Errors are told by the command line itself; run logs still reach the Prefect UI.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}
"""Set where the user has not set them: quiet libraries, no analytics."""


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(
        prog="resmaster",
        description="High-resolution image datasets from prompts or from your own images: ResMaster and its peers, "
        "training-free, as durable stages on WebDataset shards.",
        epilog="Start here: resmaster run deployments/datasets/picturebook.yaml",
    )
    top.add_argument("--traceback", action="store_true", help="show Python tracebacks (for reporting a bug)")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=description)

    def add_source(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("config", metavar="CONFIG", help="YAML file; examples: deployments/datasets/")
        sub.add_argument(
            "--root", metavar="URL", help="folder or s3://bucket/prefix to build under, instead of CONFIG's"
        )
        sub.add_argument("--prompts", metavar="FILE", help="prompts (.txt .csv .jsonl .parquet), instead of CONFIG's")
        sub.add_argument("--images", metavar="PATH", help="your own low-res images: a folder or WebDataset .tar shards")
        sub.add_argument("--limit", metavar="N", type=int, help="only the first N prompts or images")
        sub.add_argument(
            "--allow-overwriting-store",
            action="store_true",
            help="build on a store that lets two writers both win (see doctor); run one process at a time then",
        )

    def add_selection(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--shards", metavar="LIST", help="only these shards, e.g. 1,4-7")
        sub.add_argument("--stages", metavar="LIST", help=f"only these stages, of: {','.join(STAGES)}")

    sub = add(
        "run",
        "build a dataset, or go on with it",
        "Build the dataset that CONFIG describes. Safe to stop at any moment and to run again: committed shards are "
        "never redone, and the result is the same to the byte.",
    )
    add_source(sub)
    sub.add_argument(
        "--executor",
        choices=("dask", "ray"),
        help="do the shards on a cluster that is there already (DASK_SCHEDULER_ADDRESS or RAY_ADDRESS)",
    )

    sub = add(
        "plan",
        "say what `run` would do; change nothing",
        "Read the prompts or images and the dataset at the root, and print per stage what would be done and what would "
        "be skipped because it is committed. Writes nothing.",
    )
    add_source(sub)
    sub.add_argument(
        "--estimate",
        action="store_true",
        help="say how long it would take, what it would cost, how much it would write",
    )
    sub.add_argument("--workers", metavar="N", type=int, default=1, help="with --estimate: workers, one device each")
    sub.add_argument("--price", metavar="X", type=float, help="with --estimate: the price of one worker's hour")

    sub = add(
        "status",
        "what is committed, pending, failed",
        "Print, per stage, how many shards are committed, pending and failed, and how many samples are ok or failed. "
        "Reads the dataset only; needs no Prefect.",
    )
    sub.add_argument("root", metavar="ROOT", help="the dataset's folder or URL (or a root that holds just one)")
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--openmetrics", action="store_true", help="print OpenMetrics text, for Prometheus and its kin")

    sub = add(
        "explain",
        "all that is known of one sample",
        "Print what a sample was made from, by what and when, why it failed if it did, and where its bytes lie, with a "
        "command to fetch each file. Reads the dataset only; needs no Prefect.",
    )
    sub.add_argument("root", metavar="ROOT", help="the dataset's folder or URL (or a root that holds just one)")
    sub.add_argument("key", metavar="KEY", help="the sample's key, or the beginning of it; the report shows keys")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = add(
        "repair",
        "do only what is missing, failed or damaged",
        "Re-run what is not committed: failed, interrupted or deleted shards; and put back what `verify` found damaged, with "
        "the same bytes. Committed shards that are whole are left alone.",
    )
    sub.add_argument("root", metavar="ROOT", help="the dataset's folder or URL (or a root that holds just one)")
    add_selection(sub)
    sub.add_argument(
        "--retry-errors",
        action="store_true",
        help="give the failed samples of committed shards another attempt; what becomes good is added in shards of its own",
    )
    sub.add_argument(
        "--replace",
        action="store_true",
        help="make damaged shards anew, and all that was made from them, where the same bytes cannot be made any more",
    )

    sub = add(
        "verify",
        "read everything back, and say what is damaged",
        "Hash every object that the commits and the plan name, and list what is gone, cut off or changed: by shard, stage and, in "
        "tars, sample. Marks damaged shards for `repair`. Exit status 1 if something is damaged.",
    )
    verify_arguments(sub)

    sub = add(
        "gc",
        "remove what no commit names",
        "Remove leftovers of interrupted and losing attempts, probes, temporary files and caches of finished shards, if they are "
        "older than a grace period. Nothing that a commit or the plan names is touched, no record, no ledger.",
    )
    gc_arguments(sub)

    sub = add(
        "doctor",
        "say whether a store is fit for builds",
        "Try at ROOT what builds need of a store: create a name once, also when writers race, list, read and delete at once, "
        "large objects; and look at the clock and the free disk. Leaves nothing behind. Exit status 1 if something failed.",
    )
    doctor_arguments(sub)

    sub = add(
        "compare",
        "build the same samples by several methods, and measure them",
        "Build one dataset per method and scale, with the same prompts, seeds and low-res images, and measure them "
        "together. Safe to stop and to run again: each of them is a dataset.",
    )
    add_source(sub)
    sub.add_argument("--n", dest="limit", metavar="N", type=int, help="the same as --limit")
    sub.add_argument(
        "--methods",
        required=True,
        metavar="LIST",
        help="comma-separated: direct, multidiffusion, resmaster, resmaster+sg+tip (these parts only), resmaster-etp "
        "(without it), resmaster:stride=0.75:structure.preset=paper (other settings)",
    )
    sub.add_argument(
        "--scales",
        default="4x4",
        metavar="LIST",
        help="height x width in native sizes, e.g. 2x2,2x4,4x4 (default: 4x4)",
    )
    sub.add_argument(
        "--reference",
        metavar="PATH",
        help="real images for FID and KID: a folder, WebDataset .tar shards, or picturebook: its prompts drawn by vectors "
        "at the target size (default: the low-res images)",
    )
    sub.add_argument(
        "--low-res",
        choices=("generated", "drawn"),
        default="generated",
        help="drawn: picturebook's prompts drawn by vectors at the low-res size, so the true enlargement is known and the "
        "distance from it is measured (default: generated)",
    )

    sub = add(
        "upscale",
        "upscale one image of your own",
        "Upscale one image. With ResMaster it keeps the image's structure and regenerates its detail.",
    )
    sub.add_argument("input", metavar="INPUT", help="image file")
    sub.add_argument("output", metavar="OUTPUT", help="image file to write (.png, .webp or .jpg)")
    sub.add_argument("--scale", type=float, default=4.0, help="target size over input size (default: 4)")
    sub.add_argument("--method", default="resmaster", help=f"one of: {', '.join(METHODS)} (default: resmaster)")
    sub.add_argument(
        "--preset",
        help="settings of the method: default, faithful (what its authors published), or exact (resmaster: what its default leaves out)",
    )
    sub.add_argument("--prompt", default="", metavar="TEXT", help="what the image shows")
    sub.add_argument(
        "--detail-mask", metavar="FILE", help="method freescale: where this image is white, more detail is drawn anew"
    )
    sub.add_argument(
        "--model", default=SDXL["id"], metavar="ID", help=f"picturebook, a hub id, or a folder (default: {SDXL['id']})"
    )
    sub.add_argument(
        "--captioner", metavar="ID", help="caption each patch with this model (default: picturebook's own, else none)"
    )
    sub.add_argument("--config", metavar="CONFIG", help="take model, captioner and settings from this file instead")
    sub.add_argument("--steps", type=int, help="denoising steps")
    sub.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    return top


# ----------------------------------------------------------------------------------------------------------------------
# reading arguments


def config_of(args: argparse.Namespace) -> DatasetConfig:
    """CONFIG with the command line's overrides; relative paths given on the command line become absolute."""
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: give a number of at least 1")
    if args.prompts and args.images:
        raise UserError(
            "--prompts and --images exclude each other: give one; prompts for your images go beside them as .txt"
        )

    def absolute(path: str | None) -> str | None:
        return path if path is None or "://" in path else str(Path(path).resolve())

    return load_config(
        args.config,
        root=args.root,
        prompts=absolute(args.prompts),
        images=absolute(args.images),
        limit=args.limit,
        allow_overwriting_store=args.allow_overwriting_store or None,
    )


# ----------------------------------------------------------------------------------------------------------------------
# commands


def _finished(console: Console, result: BuildResult) -> int:
    for shard, error in result.errors.items():
        console.print(
            f"[red]shard {int(shard):06d} not finished:[/red] {escape(error)}", highlight=False, soft_wrap=True
        )
    failed = f", {result.samples_failed} failed (see errors/)" if result.samples_failed else ""
    console.print(f"{result.samples} samples{failed} in {escape(result.dataset_url)}", highlight=False, soft_wrap=True)
    if result.errors:
        console.print(
            f"{len(result.errors)} shards are missing; try again with: resmaster repair {escape(result.dataset_url)}"
        )
    print(f"report: {result.report_url}")
    return 1 if result.errors else 0


def _no_bars(config: DatasetConfig) -> None:
    """No download bars where there is nothing to download: loading takes a second."""
    if config.model.id == "picturebook" or Path(config.model.id).is_dir():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _execute(
    console: Console,
    config: DatasetConfig,
    pending_samples: dict[Stage, int],
    shard_count: int,
    build: str,
    arguments: dict[str, object],
) -> int:
    """Run a flow of `flows.build` under the live display."""
    _no_bars(config)
    if config.dispatch.where == "dask" or config.dispatch.where == "ray":
        from flows.clusters import check

        check(config.dispatch.where)
    from flows.display import TerminalReporter
    from resmaster_stages.progress import reporting

    with TerminalReporter(pending_samples, shard_count, console) as reporter, reporting(reporter):
        import flows.build
        from flows.outcome import outcome
        from flows.server_runs import server_within_reach

        with server_within_reach():
            result: BuildResult = outcome(getattr(flows.build, build)(**arguments, return_state=True))
    return _finished(console, result)


def run(args: argparse.Namespace, console: Console) -> int:
    """`resmaster run`"""
    from resmaster_stages.preview import preview

    config = config_of(args)
    if args.executor:
        dispatch = config.dispatch.model_copy(update={"where": args.executor})
        config = config.model_copy(update={"dispatch": dispatch})
    look = preview(config)  # all that can be wrong with the input is found here, before anything starts
    console.print(escape(look.headline()), highlight=False, soft_wrap=True)
    return _execute(console, config, look.pending_samples(), look.shards, "build_dataset", {"config": config})


def plan(args: argparse.Namespace, console: Console) -> int:
    """`resmaster plan`"""
    from resmaster_stages.preview import preview

    look = preview(config_of(args))
    out = Console()
    out.print(escape(look.headline()), highlight=False, soft_wrap=True)
    table = Table("stage", "shards to do", "shards committed", "samples to do", box=None, pad_edge=False)
    for stage in look.stages:
        table.add_row(stage.stage, str(stage.shards_pending), str(stage.shards_committed), str(stage.samples_pending))
    out.print(table)
    for rejected in look.rejected[:10]:
        out.print(f"rejected: {rejected}", highlight=False, soft_wrap=True, markup=False)
    if len(look.rejected) > 10:
        out.print(f"... and {len(look.rejected) - 10} more rejected")
    if args.estimate:
        from flows.estimate import print_estimate
        from resmaster_stages.estimate import estimate

        print_estimate(estimate(look, workers=args.workers, price=args.price), out)
    elif args.workers != 1 or args.price is not None:
        raise UserError("--workers and --price are of --estimate; add --estimate")
    return 0


def _status_table(dataset: Dataset, found: Status) -> Table:
    table = Table("stage", "committed", "pending", "failed", "samples ok", "samples failed", box=None, pad_edge=False)
    for stage in found.stages:
        table.add_row(
            stage.stage,
            str(stage.committed),
            str(stage.pending),
            str(stage.failed),
            str(stage.samples_ok),
            str(stage.samples_failed),
        )
    return table


def status(args: argparse.Namespace, console: Console) -> int:
    """`resmaster status`"""
    from resmaster_stages.standing import status as read_status
    from resmaster_stages.storage.dataset import open_dataset

    dataset = open_dataset(args.root)
    if args.openmetrics:
        from resmaster_stages.openmetrics import openmetrics

        print(openmetrics(dataset), end="")
        return 0
    found = read_status(dataset)
    if args.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        out = Console()
        out.print(
            f"{escape(dataset.url)}: {found.shards} shards, {found.samples} samples", highlight=False, soft_wrap=True
        )
        out.print(_status_table(dataset, found))
        for stage in found.stages:
            if stage.damaged_shards:
                shards = ", ".join(map(str, stage.damaged_shards))
                out.print(
                    f"damaged: {stage.stage} of shards {shards}; put them back: resmaster repair {escape(dataset.url)}",
                    highlight=False,
                    soft_wrap=True,
                )
        added = f", prompts in {found.generations} generations" if found.generations > 1 else ""
        out.print(f"configuration: {found.config}{added}", highlight=False, soft_wrap=True)
        others = [(stage.stage, *other) for stage in found.stages for other in stage.others.items()]
        for name, namespace, count in others:
            out.print(f"kept of another one: {name}-{namespace}, {count} shards", highlight=False, soft_wrap=True)
    return 0


def explain(args: argparse.Namespace, console: Console) -> int:
    """`resmaster explain`"""
    from resmaster_stages.explain import explain as explain_sample
    from resmaster_stages.explain import spelled
    from resmaster_stages.storage.dataset import open_dataset

    found = explain_sample(open_dataset(args.root), args.key)
    print(json.dumps(found.to_json(), indent=2, ensure_ascii=False) if args.json else spelled(found))
    return 0


def repair(args: argparse.Namespace, console: Console) -> int:
    """`resmaster repair`"""
    from resmaster_stages.standing import pending, pending_samples
    from resmaster_stages.storage.dataset import open_dataset

    shards, stages = parse_numbers(args.shards), parse_stages(args.stages)
    dataset = open_dataset(args.root)
    if args.retry_errors:
        from resmaster_stages.supplements import request_retries

        asked = request_retries(dataset, shards=shards, stages=stages)
        console.print(f"{escape(dataset.url)}: {asked} failed samples to try again", highlight=False, soft_wrap=True)
    todo = pending(dataset, shards=shards, stages=stages)
    count = len({shard for missing in todo.values() for shard in missing})
    if not count:
        console.print(f"{escape(dataset.url)}: nothing to repair", highlight=False, soft_wrap=True)
        return 0
    return _execute(
        console,
        dataset.config,
        pending_samples(dataset, todo),
        count,
        "repair",
        {"dataset_url": dataset.url, "shards": args.shards, "stages": stages, "replace": args.replace},
    )


def compare(args: argparse.Namespace, console: Console) -> int:
    """`resmaster compare`"""
    from flows.compare import compare as compare_methods
    from resmaster_stages.preview import Preview

    def build(look: Preview) -> int:
        config = look.config
        return _execute(console, config, look.pending_samples(), look.shards, "build_dataset", {"config": config})

    config = config_of(args)
    _no_bars(config)
    return compare_methods(config, args, build, console)


def upscale(args: argparse.Namespace, console: Console) -> int:
    """`resmaster upscale`"""
    from flows.single import upscale_file

    upscale_file(args, console)
    return 0


COMMANDS = {
    "run": run,
    "plan": plan,
    "status": status,
    "explain": explain,
    "repair": repair,
    "compare": compare,
    "doctor": doctor,
    "verify": verify,
    "gc": gc,
    "upscale": upscale,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `resmaster` command. Returns the exit status."""
    args = parser().parse_args(argv)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # such an image is an error of its own, in one line
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    console = Console(stderr=True)
    try:
        with stoppable():
            status = COMMANDS[args.command](args, console)
            sys.stdout.flush()
            return status
    except (KeyboardInterrupt, Terminated) as stop:
        console.print(MESSAGE)
        return exit_status(signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
    except BrokenPipeError:  # the reader has seen enough (`| head`); what is still buffered must not raise at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1  # as Rich does for tables
    except (ResMasterError, ConnectionError) as error:
        if args.traceback:
            raise
        console.print(f"resmaster: {one_line(error)}", style=None, markup=False, highlight=False, soft_wrap=True)
        return 2 if isinstance(error, UserError) else 1


if __name__ == "__main__":
    sys.exit(main())
