"""What the tests of families do with the folder of a model: all stages of a dataset, and damages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.errors import ConfigError
from resmaster_stages.models import captioner, places
from resmaster_stages.models.load import load_models
from resmaster_stages.planning.checks import check
from resmaster_stages.prompts import ingest
from resmaster_stages.runner.run import run_stage

VALUES: tuple[Any, ...] = (None, -1, 0, 3, 10**9, "x", [], {}, True, float("nan"))
"""What stands in a damaged file where a number or a name should be."""


def configured(folder: Path, model: Path, /, **values: Any) -> DatasetConfig:
    """The configuration of a dataset of two prompts in `folder`, with a model's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("a red house, of old stones\na cat\n")
    base: dict[str, Any] = {
        "name": "demo",
        "root": str(folder / "out"),
        "prompts": str(folder / "prompts.txt"),
        "low_res": {"steps": 2, "guidance_scale": 3.0},
        "captions": {"source": "prompt"},
        "upscale": {"method": "resmaster", "steps": 2, "scale": 2, "image_prompt": {"enabled": False}},
        "quality": {"clip": None},
    }
    return parse_config({**base, **values, "model": {"id": str(model), **values.get("model", {})}})


@contextmanager
def fresh() -> Iterator[None]:
    """Within the block, nothing is known of models that were read before, and nothing stays loaded after it."""
    for kept in (places._read_json, captioner.token_counter, load_models):
        kept.cache_clear()
    try:
        yield
    finally:
        load_models.cache_clear()


def planned(config: DatasetConfig) -> str:
    """What planning says against a configuration, in one string; "" if nothing."""
    try:
        with fresh():
            check(config)
    except ConfigError as error:
        return str(error)
    return ""


def stored(receipts: Iterable[Receipt]) -> dict[str, list[str]]:
    """Stage -> sha256 of its objects."""
    return {receipt.stage: [each.sha256 for each in receipt.objects] for receipt in receipts}


def built(config: DatasetConfig) -> list[Receipt]:
    """The receipts of all stages of the dataset's one shard."""
    with fresh():
        dataset = ingest(config)
        return [run_stage(dataset, stage, 0) for stage in dataset.hashes]


@contextmanager
def spoiled(model: Path, file: str, key: str, value: Any) -> Iterator[None]:
    """Within the block, `key` of the JSON `file` of a model has `value`. `...` as value: there is no such key."""
    path = model / file
    before = path.read_bytes()
    values = json.loads(before)
    if value is ...:
        values.pop(key, None)
    else:
        values[key] = value
    path.write_text(json.dumps(values))
    try:
        with fresh():
            yield
    finally:
        path.write_bytes(before)


def copied(model: Path, folder: Path) -> Path:
    """A copy of a model that a test may spoil."""
    return Path(shutil.copytree(model, folder / "model"))
