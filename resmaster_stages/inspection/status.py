"""Tells what is done in a dataset and what is still to do, from commit records and the ledger. Changes nothing."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.chain import chunks, read_chains
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.commits import Commits
from resmaster_stages.dataset.dataset import Dataset, current_config
from resmaster_stages.dataset.ledger import ledger_rows
from resmaster_stages.dataset.retry import Retries, number_of


@dataclass(frozen=True)
class StageStatus:
    """The status of a stage. Every shard is either committed, pending or failed."""

    stage: str
    committed: int
    pending: int
    failed: int
    """Shards that were tried, had too many failures and have no commit."""
    failed_shards: tuple[int, ...]
    samples_ok: int
    samples_failed: int
    """Samples that failed, in committed shards and in failed shards."""
    seconds: float
    """Compute time of the commits that count."""
    retried: int = 0
    """Committed shards whose failed samples got another attempt."""
    namespace: str = ""
    """First digits of the stage's hash. The commit records are in `commits/{stage}-{namespace}/`."""
    damaged_shards: tuple[int, ...] = ()
    """Committed shards that `verify` has found damaged. `repair` puts them back."""
    others: dict[str, int] = field(default_factory=dict)
    """Namespace of another configuration -> number of shards that are committed there."""


@dataclass(frozen=True)
class Status:
    """The status of a dataset."""

    shards: int
    samples: int
    stages: tuple[StageStatus, ...]
    generations: int = 1
    """Generations of the plan: one more each time that prompts or images were added."""
    config: str = layout.CONFIG
    """Name of the file in the dataset that holds the current configuration."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(asdict(self)))


def status(dataset: Dataset) -> Status:
    """The status of each stage, from commit records and, for shards without a commit, from the ledger."""
    plan = dataset.plan
    names = dataset.folder.names(layout.COMMITS)
    namespaces = [each for each in map(layout.namespace_of, names) if each is not None]
    stages = []
    for stage, own_hash in dataset.hashes.items():
        commits = dataset.commits(stage)
        numbers = commits.numbers()
        missing = set(range(plan.shards)) - numbers.keys()
        rows = ledger_rows(commits, missing) if missing else []
        receipts = (
            receipt
            for chunk in chunks(sorted(numbers))
            for receipt in commits.read_many({shard: numbers[shard] for shard in chunk}).values()
        )
        found = stage_status(stage, receipts, missing, rows)
        others = {
            other: len(Commits(dataset.folder, stage, other).numbers())
            for name, other in namespaces
            if name == stage and other != own_hash[:8]
        }
        stages.append(replace(found, namespace=own_hash[:8], damaged_shards=tuple(commits.marked()), others=others))
    current = current_config(dataset.folder)
    return Status(plan.shards, plan.samples, tuple(stages), len(plan.generations), current)


def stage_status(
    stage: str, receipts: Iterable[Receipt], missing: Collection[int], ledger: Sequence[Mapping[str, Any]]
) -> StageStatus:
    """The status of a stage, from its valid records, the shards without a record, and the ledger rows of the latter."""
    failures = {(row["shard"], row["key"]) for row in ledger if row["shard"] in missing}
    failed_shards = tuple(sorted({shard for shard, _ in failures}))
    committed = retried = ok = lost = 0
    seconds = 0.0
    for receipt in receipts:
        committed += 1
        retried += receipt.number > 1
        ok += receipt.samples_ok
        lost += receipt.samples_failed
        seconds += receipt.seconds
    return StageStatus(
        stage=stage,
        committed=committed,
        pending=len(missing) - len(failed_shards),
        failed=len(failed_shards),
        failed_shards=failed_shards,
        samples_ok=ok,
        samples_failed=lost + len(failures),
        seconds=round(seconds, 3),
        retried=retried,
    )


def pending(
    dataset: Dataset,
    *,
    shards: Sequence[int] | None = None,
    stages: Sequence[str] | None = None,
    retries: Retries | None = None,
) -> dict[str, list[int]]:
    """Stage -> shards with work left, among `shards` and `stages` (default: all).

    A shard has work left if it has no commit, is marked as damaged, has samples that became good upstream, or lacks an
    attempt of `retries`.

    Lists names, and reads records only of shards with several attempts. Raises PlanError for unplanned shards.
    """
    wanted = list(range(dataset.plan.shards)) if shards is None else sorted(set(shards))
    for shard in wanted:
        dataset.plan.generation_of(shard)
    numbers = {stage: dataset.commits(stage).numbers() for stage in dataset.hashes}
    several = {shard for found in numbers.values() for shard, number in found.items() if number > 1}
    chains = dict(read_chains(dataset, [shard for shard in wanted if shard in several])) if several else {}
    todo: dict[str, list[int]] = {}
    for stage, found in numbers.items():
        if stages is None or stage in stages:
            marked = set(dataset.commits(stage).marked())
            todo[stage] = [
                shard
                for shard in wanted
                if shard in marked
                or found.get(shard, 0) < number_of(retries, stage, shard)
                or (shard in chains and chains[shard].due(stage))
            ]
    return todo


def pending_samples(dataset: Dataset, todo: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Stage -> number of planned samples in the shards of `todo`."""
    return {stage: sum(dataset.plan.size(shard) for shard in shards) for stage, shards in todo.items()}
