"""The command line. Parses, calls, prints; a user's mistake is one line on stderr and exit status 2.

Exit status: 0 done, 1 some shards could not be finished, 2 bad input, 130 interrupted (143 by SIGTERM).
Heavy imports (torch, Prefect) happen inside the commands that need them, so that `status` answers at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from rich.console import Console

from resmaster_flows.cli.compare import compare
from resmaster_flows.cli.doctor import add_arguments as doctor_arguments
from resmaster_flows.cli.doctor import doctor
from resmaster_flows.cli.explain import explain
from resmaster_flows.cli.gc import add_arguments as gc_arguments
from resmaster_flows.cli.gc import gc
from resmaster_flows.cli.plan import plan
from resmaster_flows.cli.repair import repair
from resmaster_flows.cli.run import run
from resmaster_flows.cli.status import status
from resmaster_flows.cli.stop import MESSAGE, Terminated, exit_status, stoppable
from resmaster_flows.cli.upscale import upscale
from resmaster_flows.cli.verify import add_arguments as verify_arguments
from resmaster_flows.cli.verify import verify
from resmaster_stages.config.dataset import STAGES
from resmaster_stages.config.method import methods
from resmaster_stages.config.model import SDXL
from resmaster_stages.errors import ResMasterError, UserError
from resmaster_stages.redaction import one_line

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
        help=f"comma-separated, of: {', '.join(methods())}; with a method's parts and settings: resmaster+sg+tip (these parts "
        "only), resmaster-etp (without it), resmaster:stride=0.75:structure.preset=paper, demofusion:cosine_scale_1=3",
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
    sub.add_argument("--method", default="resmaster", help=f"one of: {', '.join(methods())} (default: resmaster)")
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


# ----------------------------------------------------------------------------------------------------------------------
# commands


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
