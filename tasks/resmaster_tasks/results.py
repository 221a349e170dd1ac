"""Prefect's result storage for the stage tasks: the commit records themselves.

A stage of a shard that is committed shows as Cached, in any run, on any machine, with any Prefect database: what is
asked is the dataset. Nothing is stored beside it, so nothing can be stale: a record that is gone is no result.
"""

from __future__ import annotations

from typing import Any

from prefect.context import TaskRunContext
from prefect.filesystems import WritableFileSystem
from prefect.results import ResultRecord, ResultRecordMetadata
from prefect.serializers import JSONSerializer

from resmaster_stages.config.dataset import Stage
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import open_dataset
from resmaster_stages.dataset.stages import stage_hashes
from resmaster_stages.progress import ShardDone, emit
from resmaster_stages.runner.run import finished

_found: dict[str, bytes] = {}
"""Cache key -> record, from the look at the dataset to Prefect's questions about it, a moment later."""


class CommitRecords(WritableFileSystem):
    """Reads what `cache_key` found. Writing does nothing: whoever computed a result has committed it."""

    _block_type_name = "ResMaster commit records"

    def read_path(self, path: str, _sync: bool = True) -> bytes:  # type: ignore[override]
        """The record of a key. Raises FileNotFoundError if the stage has something to do."""
        if path not in _found:
            raise FileNotFoundError(path)
        return _found[path]

    def write_path(self, path: str, content: bytes, _sync: bool = True) -> None:  # type: ignore[override]
        """Nothing."""

    def _resolve_path(self, path: str) -> None:
        """Keys are no paths of this machine."""


def cache_key(stage: Stage, dataset_url: str, shard: int) -> str:
    """Stage hash (which covers the stages before), shard, and the attempt that is committed, if the stage has nothing
    to do."""
    dataset = open_dataset(dataset_url)
    hashes = stage_hashes(dataset.config)
    key = f"{dataset.config.name}/{stage}-{hashes.get(stage, '')}/{shard:06d}"
    _found.clear()
    receipt = finished(dataset, hashes, stage, shard) if stage in hashes else None
    if receipt is not None:
        key = f"{key}/{receipt.attempt}"
        _found[key] = _record(key, receipt)
        emit(ShardDone(stage, shard, cached=True))
    return key


def _record(key: str, receipt: Receipt) -> bytes:
    metadata = ResultRecordMetadata(serializer=JSONSerializer(), storage_key=key)
    return ResultRecord(result=receipt.to_json(), metadata=metadata).serialize()


def cache_key_of_task(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """`cache_key` of a stage task's run; the stage is the task's name."""
    return cache_key(context.task.name, parameters["dataset_url"], parameters["shard"])  # type: ignore[arg-type]
