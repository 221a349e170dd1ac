"""Datasets to export, and what an export holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.curation import Choice, Session, Verdict, now
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.publish.publish import publish
from resmaster_stages.runner.run import run_stage
from tests.fake_stages import FAKES, files_of, planned, png

PROMPTS = ["a house", "a tree", "a boat", "bad high_res", "a <b>cat</b>"]
"""Five samples in three shards. One fails."""
NAMES = ["a house", "a tree", "a boat", "a <b>cat</b>"]
WIDE = "a tree"
"""The prompt whose image is of 96 x 64 px; the others are of 64 x 64 px."""


def high_res(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    """As the stand-in, with one wide image."""
    for sample, output in zip(samples, FAKES["high_res"](config, samples), strict=True):
        if sample.prompt == WIDE:
            yield Output(sample.key, files={**files_of(sample, 64), "png": png((9, 200, 30), (96, 64))})
        else:
            yield output


def built(root: str | Path, folder: Path, prompts: Sequence[str] = PROMPTS, **values: Any) -> Dataset:
    """A published dataset."""
    dataset = planned(root, list(prompts), folder, **values)
    make(dataset)
    return dataset


def make(dataset: Dataset) -> None:
    """Do what is due in every stage, and publish."""
    for shard in range(dataset.plan.shards):
        for stage in dataset.hashes:
            run_stage(dataset, stage, shard, process={**FAKES, "high_res": high_res}[stage])
    publish(dataset)


def rows_of(dataset: Dataset) -> list[dict[str, Any]]:
    """The rows of the manifest."""
    return pq.read_table(dataset.folder.url_of(layout.MANIFEST)).to_pylist()


def key_of(dataset: Dataset, prompt: str) -> str:
    return next(row["key"] for row in rows_of(dataset) if row["prompt"] == prompt)


def image_of(dataset: Dataset, prompt: str, stage: str = "high_res") -> bytes:
    """The bytes of an image in the dataset."""
    row = next(row for row in rows_of(dataset) if row["prompt"] == prompt)
    tar = dataset.folder.read(row[f"{stage}_object"])
    return tar[row[f"{stage}_offset"] :][: row[f"{stage}_bytes"]]


def choose(dataset: Dataset, prompt: str, verdict: Verdict, rating: int | None = None) -> None:
    Session(dataset.folder).add([Choice(key_of(dataset, prompt), verdict, rating, when=now())])


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its name in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def visible(folder: Path) -> set[str]:
    """The names of an export's files, without its records."""
    return {name for name in content(folder) if not name.startswith((".resmaster/", "export.json"))}
