"""Builds that are killed, stopped and failed at random, many times; each result must be that of an undisturbed build.

    python -m benchmarks.soak [--minutes 10 | --kills 1000 | --rounds N] [--seed N] [--scenes A,B] [--on folder,s3]

The scenes take turns. Each round says in a line what was done to it. At its end, a process that is left in peace
finishes the dataset, and all that a reader can see must be equal, to the byte, to an undisturbed build's; no sample may
be there twice or be missing. The first difference ends the soak with exit status 1, and its files stay. After an error
that nobody foresaw, the soak goes on, and ends with exit status 1. Counts are in a JSON file that is written after
every round.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.soak.processes import Difference
from benchmarks.soak.scenes import SCENES, Calms, Round
from benchmarks.soak.tally import Tally

PLACES = ("folder", "s3")
FOREIGN = ("AWS_", "PREFECT_API_", "PREFECT_PROFILE")
"""Beginnings of names of environment variables that would lead to the user's own store or server."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    options.add_argument("--minutes", type=float, default=10.0, help="go on for so long (default: %(default)g)")
    options.add_argument("--kills", type=int, help="go on until so many processes were killed, instead")
    options.add_argument("--rounds", type=int, help="play so many rounds, instead")
    options.add_argument("--first", type=int, default=0, metavar="N", help="begin with round N (default: %(default)s)")
    options.add_argument("--seed", type=int, default=int(time.time()), help="of all chance but the machine's")
    options.add_argument("--scenes", default=",".join(SCENES), help="only these (default: %(default)s)")
    options.add_argument("--on", default=",".join(PLACES), help="where (default: %(default)s)")
    options.add_argument("--processes", type=int, default=3, help="processes at a time (default: %(default)s)")
    options.add_argument("--blows", type=int, default=12, help="in a round, about (default: %(default)s)")
    options.add_argument("--json", type=Path, default=Path("out/soak.json"), help="the counts (default: %(default)s)")
    return options


def turns(args: argparse.Namespace) -> Iterator[tuple[int, str, str]]:
    """(round, scene, place), for ever or for `--rounds`."""
    number = args.first
    while args.rounds is None or number < args.first + args.rounds:
        for name in args.scenes.split(","):
            for place in SCENES[name].places:
                if place in args.on.split(",") and (number - args.first) % SCENES[name].every == 0:
                    yield number, name, place
        number += 1


def enough(args: argparse.Namespace, tally: Tally) -> bool:
    """Whether the soak may end."""
    if args.rounds is not None:
        return False  # `turns` ends
    if args.kills is not None:
        return tally.total["kills"] >= args.kills
    return tally.seconds > 60 * args.minutes


def play(args: argparse.Namespace, top: Path, tally: Tally) -> None:
    """Play rounds until it is enough. Raises Difference."""
    with ExitStack() as within:
        endpoint, bucket = "", ""
        if "s3" in args.on.split(","):
            from tests.s3_server import serving

            server = within.enter_context(serving(top))  # makes its bucket from here; fsspec starts afresh in a fork
            os.environ |= server.environment
            endpoint, bucket = server.endpoint, f"s3://{server.bucket}"
        calms = Calms(top / "calm")
        for number, name, place in turns(args):
            if enough(args, tally):
                return
            chance = random.Random(f"{args.seed} {number} {name} {place}")
            own = top / f"{number}-{name}-{place}"
            own.mkdir()
            root = f"{bucket}/{own.name}" if place == "s3" else str(own / "root")
            each = Round(args.seed, number, chance, place, own, root, endpoint, calms, args.processes, args.blows)
            again = f"--seed {args.seed} --first {number} --rounds 1 --scenes {name} --on {place}"
            try:
                done = SCENES[name].play(each)
            except Difference as error:
                raise Difference(f"{name} on {place}: {error}\nto play it again: {again}") from error
            tally.add(f"{name} on {place}", done)
            told = ", ".join(f"{count} {what}" for what, count in done.items() if count)
            print(f"{tally.seconds:7.1f} s  round {number}  {name} on {place}: {told}", flush=True)
            shutil.rmtree(own)
            gc.freeze()  # what the children share stays shared


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if every result was as undisturbed and every error was foreseen, else 1."""
    options = parser()
    args = options.parse_args(argv)
    if unknown := set(args.scenes.split(",")) - set(SCENES):
        options.error(f"--scenes {', '.join(sorted(unknown))}: known are {', '.join(SCENES)}")
    if unknown := set(args.on.split(",")) - set(PLACES):
        options.error(f"--on {', '.join(sorted(unknown))}: known are {', '.join(PLACES)}")
    top = Path(tempfile.mkdtemp(prefix="resmaster-soak-"))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    tally = Tally(args.seed, args.json, top / "errors.log")
    kept = os.dup(2)
    log = os.open(tally.errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 2)  # of this process and its children: the terminal has one line a round
    try:
        play(args, top, tally)
    except Difference as error:
        tally.failure = str(error)
    finally:
        os.dup2(kept, 2)
        tally.write()
    crashes = tally.crashes()
    if tally.failure or crashes:
        for words, count in crashes.items():
            print(f"{count} processes ended by {words}")
        print(f"{tally.failure or 'every result as undisturbed, but for these errors'}\nfiles: {top}", flush=True)
        return 1
    shutil.rmtree(top)
    told = ", ".join(f"{count} {what}" for what, count in sorted(tally.total.items()) if count)
    print(f"every result as undisturbed (seed {args.seed}): {told}; counts: {args.json}")
    return 0


if __name__ == "__main__":
    for variable in [name for name in os.environ if name.startswith(FOREIGN)]:
        del os.environ[variable]
    sys.exit(main())
