"""Builds that are killed, stopped and failed at random, many times; the result must be that of an undisturbed build.

    python -m benchmarks.soak [--minutes 10 | --rounds N] [--on folder,s3] [--processes 3] [--seed N]

In a round, several processes build one dataset with stand-in stages (no model; everything else is real): they race to
plan it, take shards in random order, give a failed sample another attempt, and write beside each other. Meanwhile they
are sent SIGKILL and SIGTERM at random moments and replaced, and any call to the store may fail before or after it took
effect. A last process, left in peace, finishes and publishes. Then all that a reader can see must be equal, to the
byte, to an undisturbed build's; no sample may be there twice or be missing, and no file that a commit does not name may
be visible. The first difference ends the soak with exit status 1.

SIGKILL comes at most twice in a round: after the third death at a sample the pipeline leaves it out, as it should.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.retry import number_of
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.stages import Process
from resmaster_stages.errors import ResMasterError
from resmaster_stages.inspection.status import pending
from resmaster_stages.models import identity
from resmaster_stages.prompts import ingest
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.filesystem import Folder
from tests.durability.injection import everything, good_later
from tests.fake_stages import FAKES, config_at

PROMPTS = "\n".join(f"bad high_res {n}" if n == 4 else f"prompt {n}" for n in range(12)) + "\n"
"""Six shards of two samples; one sample fails, so that ledgers are written too."""

RETRIES = {"high_res": {"2": 2}}
"""Another attempt at the sample that failed, in which it is good. The stage after it follows."""

PROMPTS_FILE = "SOAK_PROMPTS"
"""Environment variable with the path of the file that holds them."""

FAULT_SHARE = 0.02
"""Share of calls to the store that fail."""
PAUSE_SECONDS = 0.02
"""Up to so long a stand-in stage takes per sample: kills come between all steps, not only between shards."""
SHARD_TRIES = 5_000
"""A worker that fails more often than this in one round is stuck."""
ROUND_SECONDS = 300.0
MOST_SIGKILLS = 2

CALLS = ("names", "read", "read_many", "exists", "create", "write", "upload", "download", "remove")
"""Methods of `Folder` that may fail."""


def config_of(root: str) -> DatasetConfig:
    # without the probe of the store, which a fault would take for a store that cannot do it
    return config_at(root, prompts=os.environ[PROMPTS_FILE], allow_overwriting_store=True)


# ----------------------------------------------------------------------------------------------------------------------
# in the children


def build(root: str, seed: int, tally: Any) -> None:
    """One worker: plans, then does what is pending in random order until nothing is. `tally` counts its faults; None:
    in peace."""
    chance = random.Random(seed)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if tally is not None:
        make_faulty(chance, tally)
    for _ in range(SHARD_TRIES):
        try:
            config = config_of(root)
            dataset = ingest(config)
            shards = sorted({shard for todo in pending(dataset, retries=RETRIES).values() for shard in todo})
            if not shards:
                if tally is None:
                    write_manifest(dataset)
                return
            shard = chance.choice(shards)
            for stage in FAKES:
                process = slowed(good_later(dataset, stage, shard), chance)
                run_stage(dataset, stage, shard, number=number_of(RETRIES, stage, shard), process=process)
        except (OSError, ResMasterError):
            if tally is None:
                raise
    raise SystemExit("a worker is stuck")


def slowed(process: Process, chance: random.Random) -> Process:
    def slow(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for output in process(config, samples):
            time.sleep(chance.uniform(0, PAUSE_SECONDS))
            yield output

    return slow


def make_faulty(chance: random.Random, tally: Any) -> None:
    """Let the store fail, for the rest of this process."""

    def faulty(call: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*arguments: Any, **options: Any) -> Any:
            fails, late = chance.random() < FAULT_SHARE, chance.random() < 0.5
            if fails and not late:
                tally.value += 1
                raise OSError(errno.EIO, "the soak says no")
            result = call(*arguments, **options)
            if fails:
                tally.value += 1
                raise ConnectionResetError(errno.ECONNRESET, "the answer got lost")
            return result

        return attempt

    for name in CALLS:
        setattr(Folder, name, faulty(getattr(Folder, name)))


# ----------------------------------------------------------------------------------------------------------------------
# in the parent, which forks and does not read or write datasets itself


def fork(work: Callable[..., object], *arguments: object) -> int:
    """Run `work` in a child, which dies with this process. Its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        work(*arguments)
        status = 0
    except SystemExit as leave:
        status = leave.code if isinstance(leave.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ask(work: Callable[..., object], *arguments: object) -> Any:
    """The answer of `work`, computed in a child. Raises SystemExit if it failed."""
    with tempfile.TemporaryFile() as answer:

        def tell() -> None:
            answer.write(pickle.dumps(work(*arguments)))
            answer.flush()

        if os.waitstatus_to_exitcode(os.waitpid(fork(tell), 0)[1]):
            raise SystemExit("the result cannot be read")
        answer.seek(0)
        return pickle.load(answer)  # our own child's


def disturbed(root: str, chance: random.Random, processes: int, disturbances: int) -> Counter[str]:
    """Let workers build, and disturb them; what was done to them."""
    done: Counter[str] = Counter()
    tallies: list[Any] = []
    alive: set[int] = set()

    def start() -> None:
        tallies.append(multiprocessing.get_context("fork").RawValue("l", 0))
        alive.add(fork(build, root, chance.getrandbits(32), tallies[-1]))

    def reap() -> None:
        for pid in list(alive):
            if os.waitpid(pid, os.WNOHANG)[0]:
                alive.discard(pid)

    for _ in range(processes):
        start()
    while alive and sum(done.values()) < disturbances:
        time.sleep(chance.expovariate(1 / 0.3))
        reap()
        if alive:
            kind = signal.SIGKILL if done["SIGKILL"] < MOST_SIGKILLS and chance.random() < 0.5 else signal.SIGTERM
            victim = chance.choice(sorted(alive))
            os.kill(victim, kind)
            os.waitpid(victim, 0)
            alive.discard(victim)
            done[kind.name] += 1
            start()
    deadline = time.monotonic() + ROUND_SECONDS
    while alive:
        reap()
        if time.monotonic() > deadline:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            raise SystemExit(f"{root}: workers did not end within {ROUND_SECONDS:g} s")
        time.sleep(0.02)
    done["faults"] = sum(tally.value for tally in tallies)
    return done


def differences(found: dict[object, object], expected: dict[object, object]) -> list[str]:
    """What is not as in the undisturbed build, in words."""
    return [
        f"{key}: {found.get(key)!r} where {expected.get(key)!r} was due"
        for key in {**expected, **found}
        if found.get(key) != expected.get(key)
    ]


def soak_round(root: str, chance: random.Random, processes: int, expected: dict[object, object]) -> Counter[str]:
    """One round. Raises SystemExit if the result differs."""
    done = disturbed(root, chance, processes, chance.randint(2, 8))
    if os.waitstatus_to_exitcode(os.waitpid(fork(build, root, 0, None), 0)[1]):
        raise SystemExit(f"{root}: a process that was left in peace could not finish")
    if wrong := differences(ask(everything, root), expected):
        raise SystemExit("\n".join([f"{root}: differs from the undisturbed build", *wrong[:10]]))
    return done


@contextmanager
def places(names: Sequence[str], folder: Path) -> Iterator[dict[str, str]]:
    """Name -> where its datasets go."""
    found = {"folder": str(folder / "root")} if "folder" in names else {}
    if "s3" not in names:
        yield found
        return
    from tests.s3_server import serving

    with serving(folder) as server:  # makes its bucket from here; fsspec starts afresh in every fork
        os.environ |= server.environment
        yield {**found, "s3": f"s3://{server.bucket}"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10.0, help="go on for so long (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="so many rounds per place instead")
    parser.add_argument("--on", default="folder,s3", help="where (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=3, help="processes at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of all chance but the machine's")
    args = parser.parse_args(argv)
    chance = random.Random(args.seed)
    identity.weights_of = lambda config: identity.Weights(config.model.id)
    started = time.monotonic()
    totals: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory(prefix="resmaster-soak-") as top, places(args.on.split(","), Path(top)) as roots:
        prompts = Path(top) / "prompts.txt"
        prompts.write_text(PROMPTS)
        os.environ[PROMPTS_FILE] = str(prompts)
        calm = str(Path(top) / "calm")
        ask(build, calm, 0, None)
        expected = ask(everything, calm)
        number = 0
        while (number < args.rounds) if args.rounds else (time.monotonic() - started < 60 * args.minutes):
            for name, place in roots.items():
                done = soak_round(f"{place}/{number}", chance, args.processes, expected)
                totals.setdefault(name, Counter()).update({"rounds": 1, **done})
                print(f"{time.monotonic() - started:7.1f} s  {name:<6} round {number}: {dict(done)}", flush=True)
            number += 1
    for name, total in totals.items():
        print(
            f"{name}: {total['rounds']} rounds, {total['SIGKILL']} SIGKILL, {total['SIGTERM']} SIGTERM, "
            f"{total['faults']} faults: every result as undisturbed (seed {args.seed})"
        )


if __name__ == "__main__":
    main()
