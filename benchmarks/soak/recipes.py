"""The datasets that the soak builds, and what a process does that builds, mends or finishes one.

A recipe is a configuration with its prompts and its stages: stand-ins, or the real stages with a real model. Real
models are loaded by the parent, once, and every child is forked with them.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset.damage import drop_unreadable_records
from resmaster_stages.dataset.dataset import Dataset, open_dataset
from resmaster_stages.dataset.lost_plan import restore_plan
from resmaster_stages.dataset.retry import Retries, number_of, retries_of
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.stages import Process
from resmaster_stages.errors import ResMasterError
from resmaster_stages.inspection.leftovers import find_leftovers, remove_leftovers
from resmaster_stages.inspection.status import pending
from resmaster_stages.inspection.verify import Verification, note, verify
from resmaster_stages.prompts import ingest
from resmaster_stages.publish.publish import publish
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.filesystem import Folder
from tests.durability.injection import good_later
from tests.fake_stages import batch_dependent

Find = Callable[[Dataset, str, int], Process | None]
"""(dataset, stage, shard) -> the stage's function; None: the real one."""

FAULT_SHARE = 0.02
"""Share of calls to the store that fail."""
PAUSE_SECONDS = 0.02
SHARD_TRIES = 5_000
"""A worker that fails more often than this in one round is stuck."""
MOST_ATTEMPTS = 6
"""A sample that is still not made after so many further attempts in peace is lost."""
CALLS = ("names", "read", "read_many", "exists", "create", "write", "upload", "download", "remove")
"""Methods of `Folder` that may fail."""


@dataclass(frozen=True)
class Recipe:
    """How one kind of dataset is made."""

    values: Mapping[str, Any]
    """The configuration without its root."""
    find: Find
    pause_seconds: float = PAUSE_SECONDS
    """Up to so long a stand-in stage takes per sample: kills come between all steps, not only between shards."""

    def config(self, root: str) -> DatasetConfig:
        """The configuration of the dataset at `root`."""
        return parse_config({**self.values, "root": root})


def recipe(folder: Path, prompts: Sequence[str], find: Find, **values: Any) -> Recipe:
    """A recipe whose file of prompts lies in `folder`.

    Without the probe of the store, which a fault would take for a store that cannot do it. Any number of samples of a
    shard may fail, for any number may be left out after kills.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "prompts.txt"
    path.write_text("\n".join(prompts) + "\n")
    usual = {"name": "demo", "prompts": str(path), "allow_overwriting_store": True, "max_failure_ratio": 1.0}
    return Recipe({**usual, **values}, find)


STANDINS = {"samples_per_shard": 2, "low_res": {"height": 16, "width": 16}}


def standins(folder: Path) -> Recipe:
    """Stand-in stages, one of which depends on the batch: six shards of two samples. One sample fails at first, so that
    ledgers are written too."""
    prompts = ["bad high_res 4" if number == 4 else f"prompt {number}" for number in range(12)]
    return recipe(folder, prompts, in_batches, **STANDINS)


def small(folder: Path) -> Recipe:
    """The same with two shards."""
    return recipe(folder, ["a", "bad high_res b", "c", "d"], in_batches, **STANDINS)


def slow(folder: Path) -> Recipe:
    """The same again, and slow, so that processes die at the same samples."""
    return replace(small(folder), pause_seconds=0.2)


def plain(folder: Path) -> Recipe:
    """Stand-in stages as servers and the command line are given them here: four shards of two samples."""
    return recipe(folder, [f"prompt {number}" for number in range(8)], good_later, **STANDINS)


def in_batches(dataset: Dataset, stage: str, shard: int) -> Process:
    """Stand-ins, of which low_res shows in what batch a sample was made."""
    return batch_dependent if stage == "low_res" else good_later(dataset, stage, shard)


def real(folder: Path, model: str) -> Recipe:
    """The real stages with `model`, which is loaded here: two shards of four samples, two to a batch."""
    import torch

    torch.set_num_threads(1)  # threads do not outlive a fork
    prompts = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("house", "boat", "cat", "tree")]
    found = recipe(
        folder,
        prompts,
        lambda dataset, stage, shard: None,
        samples_per_shard=4,
        spill_seconds=0.05,
        model={"id": model, "device": "cpu"},
        low_res={"steps": 2, "batch_size": 2},
        captions={"max_new_tokens": 6},
        upscale={"scale": 1.5, "steps": 2, "view_batch": 3, "image_prompt": {"enabled": model == "picturebook"}},
        quality={"device": "cpu"},
    )
    _load(found.config(str(folder)))
    return found


def tiny(folder: Path) -> Recipe:
    """The real stages with a tiny model of random weights, 64 px."""
    from tests.tiny_models import save

    return real(folder, str(save(folder / "model")))


def picturebook(folder: Path) -> Recipe:
    """The real stages with the embedded model, 128 px."""
    return real(folder, "picturebook")


def _load(config: DatasetConfig) -> None:
    from resmaster_stages.captions import load_writer
    from resmaster_stages.metrics.clip_score import load_clip
    from resmaster_stages.models.load import load_models

    load_models(config.model)
    load_writer(config)
    if config.quality.clip:
        load_clip(config.quality.clip, config.quality.clip_revision, config.quality.device)


# ----------------------------------------------------------------------------------------------------------------------
# what processes do


def build(made: Recipe, root: str, seed: int, faults: Any = None) -> None:
    """Plan, then do what is pending, in random order, until nothing is. Errors that say what to do are done again.

    faults: a shared counter of the faults that this process's calls to the store meet; None: the calls are left alone.
    """
    chance = random.Random(seed)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if faults is not None:
        make_faulty(chance, faults)
    for _ in range(SHARD_TRIES):
        try:
            dataset = ingest(made.config(root))
            retries, _ = retries_of(dataset)
            shards = sorted({shard for todo in pending(dataset, retries=retries).values() for shard in todo})
            if not shards:
                return
            run_shard(made, dataset, chance.choice(shards), retries, chance)
        except (OSError, ResMasterError):
            continue
    raise RuntimeError("a worker is stuck")


def run_shard(
    made: Recipe, dataset: Dataset, shard: int, retries: Retries | None = None, chance: random.Random | None = None
) -> None:
    """Every stage of one shard. With `chance`, stand-in stages take their time."""
    for stage in dataset.hashes:
        process = made.find(dataset, stage, shard)
        if process is not None and chance is not None:
            process = slowed(process, chance, made.pause_seconds)
        run_stage(dataset, stage, shard, number=number_of(retries, stage, shard), process=process)


def finish(made: Recipe, root: str) -> Counter[str]:
    """In peace: plan, repair, give samples that failed or were left out further attempts, and publish. Counts the
    samples that needed one."""
    return mended_and_published(made, ingest(made.config(root)))


def mended_and_published(made: Recipe, dataset: Dataset) -> Counter[str]:
    """As `resmaster repair --retry-errors`, until no sample is left that failed."""
    restore_plan(dataset.folder)
    repair(made, dataset)
    counts: Counter[str] = Counter()
    for _ in range(MOST_ATTEMPTS):
        retries, samples = retries_of(dataset)
        if not samples:
            break
        counts["tried again"] += samples
        for shard in sorted({int(shard) for numbers in retries.values() for shard in numbers}):
            run_shard(made, dataset, shard, retries)
    publish(dataset)
    return counts


def repair(made: Recipe, dataset: Dataset) -> None:
    """As `resmaster repair`, without its publishing."""
    drop_unreadable_records(dataset)
    for shard in sorted({shard for todo in pending(dataset).values() for shard in todo}):
        run_shard(made, dataset, shard)


def verified(root: str) -> Verification:
    """As `resmaster verify`."""
    dataset = open_dataset(root)
    found = verify(dataset)
    note(dataset, found)
    return found


def clean_up(root: str) -> None:
    """As `resmaster gc --older-than 0`."""
    dataset = open_dataset(root)
    remove_leftovers(dataset.folder, find_leftovers(dataset, timedelta(0)))


def slowed(process: Process, chance: random.Random, seconds: float) -> Process:
    """A stage that takes up to so long for each sample."""

    def slow(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for output in process(config, samples):
            time.sleep(chance.uniform(0, seconds))
            yield output

    return slow


def make_faulty(chance: random.Random, faults: Any) -> None:
    """Let the store fail, for the rest of this process: before a call took effect, or after."""

    def faulty(call: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*arguments: Any, **options: Any) -> Any:
            fails, late = chance.random() < FAULT_SHARE, chance.random() < 0.5
            if fails and not late:
                faults.value += 1
                raise OSError(errno.EIO, "the soak says no")
            result = call(*arguments, **options)
            if fails:
                faults.value += 1
                raise ConnectionResetError(errno.ECONNRESET, "the answer got lost")
            return result

        return attempt

    for name in CALLS:
        setattr(Folder, name, faulty(getattr(Folder, name)))


def through(endpoint: str, work: Callable[..., Any], *arguments: object) -> Any:
    """`work`, with the S3 store behind `endpoint`."""
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    return work(*arguments)
