"""How much of a build is not model compute: start-up, orchestration, storage, report.

    python benchmarks/overhead.py deployments/datasets/picturebook.yaml [--limit N]

Builds the dataset in a temporary folder, in this process, and prints where the wall time went. "Model compute" is the
time inside the stages' `process` generators (models, image codecs, metrics); the rest is what the pipeline adds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from resmaster_flows.cli.main import ENVIRONMENT
from resmaster_stages.config.load import load_config
from resmaster_stages.dataset.stages import STAGES, Process
from resmaster_stages.prompts import ingest


def timed(process: Process, spent: dict[str, float], stage: str) -> Process:
    """`process` with the time inside its generator added to `spent[stage]`."""

    def wrapper(config: Any, samples: Any) -> Iterator[Any]:
        outputs = iter(process(config, samples))
        while True:
            start = time.perf_counter()
            try:
                output = next(outputs)
            except StopIteration:
                return
            finally:
                spent[stage] += time.perf_counter() - start
            yield output

    return wrapper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config")
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()

    start = time.perf_counter()
    os.environ |= {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
    from resmaster_flows.build import build_dataset
    from resmaster_flows.calls import call

    spent = dict.fromkeys(STAGES, 0.0)
    for name, stage in list(STAGES.items()):
        STAGES[name] = replace(stage, process=timed(stage.function(), spent, name))

    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory())
        config = ingest(load_config(args.config, root=root, limit=args.limit)).config
        result = call(build_dataset, config, read_input=False)
        finished = time.perf_counter()
    compute, wall = sum(spent.values()), finished - started
    print(f"start-up (imports)               {started - start:8.1f} s")
    for name, seconds in spent.items():
        print(f"model compute, {name:<9}         {seconds:8.1f} s")
    print(f"orchestration, storage, report   {wall - compute:8.1f} s")
    print(f"wall time after start-up         {wall:8.1f} s for {result.samples} samples")
    print(f"overhead                         {100 * (wall - compute) / wall:8.1f} % of it")


if __name__ == "__main__":
    main()
