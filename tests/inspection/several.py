"""Makes the datasets of a root from stand-in stages: whole, half done, failing, damaged, without a commit."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.errors import ShardError
from resmaster_stages.publish.publish import publish
from resmaster_stages.runner.run import run_stage
from tests.fake_stages import FAKES, planned

FAILING = ["a", "bad high_res 1", "c", "d", "bad low_res 1", "bad low_res 2"]
"""The prompts of three shards, of which the last one cannot be committed."""


def work(dataset: Dataset, shards: Iterable[int]) -> None:
    """Do the shards, as far as they can be done."""
    for shard in shards:
        with suppress(ShardError):
            for stage, process in FAKES.items():
                run_stage(dataset, stage, shard, process=process)


def made(root: str | Path, folder: Path, name: str, prompts: Iterable[str], shards: int = 99, **values: Any) -> Dataset:
    """A dataset of two samples a shard, of which the first `shards` are done; published if all are."""
    dataset = planned(root, list(prompts), folder, name=name, **values)
    work(dataset, range(min(shards, dataset.plan.shards)))
    if shards >= dataset.plan.shards:
        publish(dataset)
    return dataset


def several(root: str | Path, folder: Path) -> dict[str, Dataset]:
    """Name -> dataset, the ones that need attention last. Only `done` needs none."""
    datasets = {
        "done": made(root, folder, "done", "abcdef"),
        "half": made(root, folder, "half", "abcdef", 1, dispatch={"price": 3600.0, "max_cost": 1e8}),
        "new": made(root, folder, "new", "ab", 0),
        "failing": made(root, folder, "failing", FAILING),
        "damaged": made(root, folder, "damaged", "abcd"),
    }
    datasets["damaged"].commits("high_res").mark(0, ["high_res/000000-00000000.tar"])
    return datasets
