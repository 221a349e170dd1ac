"""What is done in a dataset, and what is still to do: from commit records and the ledger. Computes and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from resmaster_stages.config import DatasetConfig, Stage
from resmaster_stages.lineage import stage_hashes
from resmaster_stages.storage.commit import Receipt, committed_shards, list_commits
from resmaster_stages.storage.dataset import Dataset
from resmaster_stages.storage.ledger import ledger_rows
from resmaster_stages.storage.plan import Plan, read_plan


@dataclass(frozen=True)
class StageStatus:
    """How far a stage is. Every shard is either committed, pending or failed."""

    stage: Stage
    committed: int
    pending: int
    failed: int
    """Shards that were tried, had too many failures and have no commit."""
    failed_shards: tuple[int, ...]
    samples_ok: int
    samples_failed: int
    """Samples that failed in committed shards, and those whose failure keeps a shard from being committed."""
    seconds: float
    """Compute time of all commits."""


@dataclass(frozen=True)
class Status:
    """How far a dataset is."""

    shards: int
    samples: int
    stages: tuple[StageStatus, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(asdict(self)))


def status(dataset: Dataset, config: DatasetConfig | None = None) -> Status:
    """How far each stage is, from commit records and, for what is not committed, the ledger."""
    plan = read_plan(dataset.folder)
    stages = []
    for stage, own_hash in stage_hashes(config or dataset.config).items():
        receipts = list_commits(dataset.folder, stage, own_hash)
        missing = set(range(plan.shards)) - receipts.keys()
        rows = ledger_rows(dataset.folder, stage, missing) if missing else []
        stages.append(stage_status(plan, stage, receipts, [row for row in rows if row["stage_hash"] == own_hash]))
    return Status(plan.shards, plan.samples, tuple(stages))


def stage_status(
    plan: Plan, stage: Stage, receipts: dict[int, Receipt], ledger: Sequence[Mapping[str, Any]]
) -> StageStatus:
    """How far a stage is, from its commit records by shard and the ledger's rows of its shards that have none."""
    missing = set(range(plan.shards)) - receipts.keys()
    failures = {(row["shard"], row["key"]) for row in ledger if row["shard"] in missing}
    failed_shards = tuple(sorted({shard for shard, _ in failures}))
    return StageStatus(
        stage=stage,
        committed=len(receipts),
        pending=len(missing) - len(failed_shards),
        failed=len(failed_shards),
        failed_shards=failed_shards,
        samples_ok=sum(receipt.samples_ok for receipt in receipts.values()),
        samples_failed=sum(receipt.samples_failed for receipt in receipts.values()) + len(failures),
        seconds=round(sum(receipt.seconds for receipt in receipts.values()), 3),
    )


def pending(
    dataset: Dataset,
    config: DatasetConfig | None = None,
    *,
    shards: Sequence[int] | None = None,
    stages: Sequence[Stage] | None = None,
) -> dict[Stage, list[int]]:
    """Stage -> shards that are not committed, of `shards` and `stages` (default: all). Raises PlanError if not planned."""
    plan = read_plan(dataset.folder)
    wanted = list(range(plan.shards)) if shards is None else sorted(set(shards))
    for shard in wanted:
        plan.generation_of(shard)
    todo: dict[Stage, list[int]] = {}
    for stage, own_hash in stage_hashes(config or dataset.config).items():
        if stages is None or stage in stages:
            committed = set(committed_shards(dataset.folder, stage, own_hash))
            todo[stage] = [shard for shard in wanted if shard not in committed]
    return todo


def pending_samples(dataset: Dataset, todo: dict[Stage, list[int]]) -> dict[Stage, int]:
    """Stage -> number of planned samples in the shards of `todo`."""
    plan = read_plan(dataset.folder)
    return {stage: sum(plan.size(shard) for shard in shards) for stage, shards in todo.items()}
