"""Stand-ins for stages that a test in another process can hold up or mend, by files that the prompts name.

`until FILE`: the high-res stage says that it has begun (`FILE.begun-PID`) and waits for the file.
`unless FILE`: the high-res stage of the shard fails as long as there is no such file.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.stages import Process
from resmaster_stages.errors import SampleError, ShardError
from tests.fake_stages import EVERY_FAKE

LONGEST_WAIT_SECONDS = 150


def stand_in(stage: str) -> Process:
    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for output, sample in zip(EVERY_FAKE[stage](config, samples), samples, strict=True):
            if stage == "high_res":
                if found := re.search(r"until (\S+)", sample.prompt):
                    wait_for(Path(found[1]))
                if (found := re.search(r"unless (\S+)", sample.prompt)) and not Path(found[1]).exists():
                    raise ShardError("not mended yet")
            yield output

    return process


def wait_for(path: Path) -> None:
    begun(path).touch()
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise SampleError(f"{path} never came")
        time.sleep(0.05)


def begun(path: Path) -> Path:
    return path.with_name(f"{path.name}.begun-{os.getpid()}")


def begun_by(path: Path) -> set[int]:
    """The processes that have begun to wait for a file."""
    return {int(found.name.rpartition("-")[2]) for found in path.parent.glob(f"{path.name}.begun-*")}


low_res, captions, high_res, quality, recaptions = (stand_in(stage) for stage in EVERY_FAKE)
