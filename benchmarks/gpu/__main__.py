"""Measures a GPU: `python -m benchmarks.gpu --seconds 520 --out out/gpu`. docs/gpu.md says what, and how.

Every step is a process of its own: one that crashes, hangs or poisons its device costs the others nothing. Imports no
torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu import tables
from benchmarks.gpu.record import Record, Run, read, trace, write

SHARES = {"ceilings": 0.03, "rows": 0.2, "image": 0.34, "flow": 0.18, "truth": 0.11, "training": 0.14}
"""Steps in order of worth, and their shares of the time. What a step does not use, those after it have."""
GRACE_SECONDS = 15.0
"""How much longer than its time a step may take before it is stopped: what it is at may be nearly done."""
CLOSING_SECONDS = 20.0
"""Kept for that of the last step, for stopping it and for the table."""
REPORT, LOG = "gpu.json", "log.txt"


@dataclass(frozen=True)
class Programme:
    """What one call does."""

    steps: tuple[str, ...]
    seconds: float
    out: Path
    rehearse: bool

    def ends(self, start: float) -> dict[str, float]:
        """When each step should have ended, if all before it took their time."""
        whole, span, passed = sum(SHARES[step] for step in self.steps), self.seconds - CLOSING_SECONDS, 0.0
        found = {}
        for step in self.steps:
            passed += SHARES[step] / whole
            found[step] = start + span * passed
        return found


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=520.0, help="for everything, the table included")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="where the report, the log and weights go")
    parser.add_argument("--only", default=",".join(SHARES), help="steps, comma-separated; default all")
    parser.add_argument(
        "--rehearse", action="store_true", help="every step at toy sizes on a CPU; its numbers mean nothing"
    )
    parser.add_argument("--step", choices=tuple(SHARES), help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if unknown := [step for step in args.only.split(",") if step not in SHARES]:
        parser.error(f"--only {unknown[0]}: no such step; choose from {', '.join(SHARES)}")
    if args.seconds <= 2 * CLOSING_SECONDS:
        parser.error(f"--seconds {args.seconds:g}: give more than {2 * CLOSING_SECONDS:g}")
    return args


def _facts(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    import diffusers
    import torch

    from benchmarks.methods import device_name

    cuda = device == "cuda"
    return {
        "device": device_name(torch.device(device)),
        "device_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "diffusers": diffusers.__version__,
    }


def do_step(args: argparse.Namespace) -> int:
    """One step, in this process."""
    import torch

    record = Record(args.out / REPORT, args.step)
    device = "cpu" if args.rehearse else "cuda"
    try:
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("there is no CUDA device; --rehearse runs every step on a CPU")
        if args.rehearse:
            torch.compiler.set_stance("force_eager")  # compiling for a CPU takes minutes and tells nothing of a GPU
        record.about(**_facts(device))
        importlib.import_module(f"benchmarks.gpu.{args.step}").measure(
            Run(record, device, args.rehearse, args.until, args.out)
        )
    except Exception as error:
        said = trace(error)
        record.change(lambda step: step.update(status="failed", error=said))
        print(said, flush=True)
        return 1
    record.change(lambda step: step.update(status="done"))
    return 0


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a step and what it started."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(3)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_step(programme: Programme, step: str, until: float) -> str:
    """One step, in a process of its own; what became of it."""
    words = ["--step", step, "--until", str(until), "--out", str(programme.out)]
    words += ["--rehearse"] if programme.rehearse else []
    record, start = Record(programme.out / REPORT, step), time.time()
    record.change(lambda each: each.update(status="begun", seconds_given=until - start))
    with (programme.out / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu", *words],
            stdout=log,
            stderr=log,
            process_group=0,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"},
        )
        try:
            status = process.wait(max(1.0, until + GRACE_SECONDS - time.time()))
            problem = "" if status in (0, 1) else f"the process ended with status {status}"
        except subprocess.TimeoutExpired:
            _stop(process)
            problem = "stopped: its time was over; what it had found is here"
        except BaseException:
            _stop(process)
            raise

    def ended(each: dict[str, Any]) -> None:
        each["seconds"] = time.time() - start
        if problem:
            each.update(status="stopped", error=problem)

    record.change(ended)
    return str(read(programme.out / REPORT)["steps"][step]["status"])


def run(programme: Programme) -> int:
    """All steps in order, and the table. 1 if a step did not end well."""
    programme.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    about = {
        "command": "python -m benchmarks.gpu " + shlex.join(_words(programme)),
        "date": datetime.now(UTC).date().isoformat(),
        "rehearsal": programme.rehearse,
        "seconds": programme.seconds,
    }
    write(programme.out / REPORT, {"about": about, "steps": {}})
    (programme.out / LOG).write_bytes(b"")
    good = True
    for step, until in programme.ends(start).items():
        status = run_step(programme, step, until)
        print(f"{step}: {status} after {time.time() - start:.0f} s", flush=True)
        good &= status == "done"
    print("\n" + tables.markdown(read(programme.out / REPORT)))
    return 0 if good else 1


def _words(programme: Programme) -> list[str]:
    """The options of a call, as documented: without the folder."""
    words = ["--seconds", f"{programme.seconds:g}"]
    if programme.steps != tuple(SHARES):
        words += ["--only", ",".join(programme.steps)]
    return words + (["--rehearse"] if programme.rehearse else [])


def main(words: list[str] | None = None) -> int:
    """The command."""
    args = _arguments(words)
    if args.step:
        return do_step(args)
    wanted = args.only.split(",")
    return run(Programme(tuple(step for step in SHARES if step in wanted), args.seconds, args.out, args.rehearse))


if __name__ == "__main__":
    sys.exit(main())
