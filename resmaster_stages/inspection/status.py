"""What is done in a dataset, and what is still to do: from commit records and the ledger. Computes and changes
nothing."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from resmaster_stages.config.dataset import DatasetConfig, Stage
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.chain import Link, chunks, list_records, read_chain
from resmaster_stages.dataset.commit import committed_shards
from resmaster_stages.dataset.damage import marked_shards
from resmaster_stages.dataset.dataset import Dataset, current_config
from resmaster_stages.dataset.ledger import ledger_rows
from resmaster_stages.dataset.plan import read_plan
from resmaster_stages.dataset.stages import stage_hashes


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
    """Samples that failed in committed shards and were not mended, and those whose failure keeps a shard from being
    committed."""
    seconds: float
    """Compute time of all commits."""
    supplements: int = 0
    """Commits that added to a shard what had failed in it."""
    namespace: str = ""
    """First digits of the stage's hash: its commit records are in `commits/{stage}-{namespace}/`."""
    damaged_shards: tuple[int, ...] = ()
    """Committed shards that `verify` has found damaged; `repair` puts them back."""
    others: dict[str, int] = field(default_factory=dict)
    """Namespaces of other configurations -> shards that are committed there."""


@dataclass(frozen=True)
class Status:
    """How far a dataset is."""

    shards: int
    samples: int
    stages: tuple[StageStatus, ...]
    generations: int = 1
    """Generations of the plan: one more each time that prompts were added."""
    config: str = layout.CONFIG
    """The configuration that counts, as a file in the dataset."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(asdict(self)))


def status(dataset: Dataset, config: DatasetConfig | None = None) -> Status:
    """How far each stage is, from commit records and, for what is not committed, the ledger."""
    plan = read_plan(dataset.folder)
    names = dataset.folder.names(layout.COMMITS)
    namespaces = [each for each in map(layout.namespace_of, names) if each is not None]
    stages = []
    for stage, own_hash in stage_hashes(config or dataset.config).items():
        listing = list_records(dataset.folder, stage, own_hash)
        missing = set(range(plan.shards)) - listing.committed
        rows = ledger_rows(dataset.folder, stage, missing) if missing else []
        links = (
            link for chunk in chunks(sorted(listing.committed)) for link in listing.read(dataset.folder, chunk).values()
        )
        found = stage_status(stage, links, missing, [row for row in rows if row["stage_hash"] == own_hash])
        others = {
            other: len(committed_shards(dataset.folder, stage, other))
            for name, other in namespaces
            if name == stage and other != own_hash[:8]
        }
        damaged = tuple(marked_shards(dataset.folder, stage, own_hash))
        stages.append(replace(found, namespace=own_hash[:8], damaged_shards=damaged, others=others))
    current = current_config(dataset.folder)
    return Status(plan.shards, plan.samples, tuple(stages), len(plan.generations), current)


def stage_status(
    stage: Stage, links: Iterable[Link], missing: Collection[int], ledger: Sequence[Mapping[str, Any]]
) -> StageStatus:
    """How far a stage is, from what is committed of each shard, the shards that have no commit, and their rows of the
    ledger."""
    failures = {(row["shard"], row["key"]) for row in ledger if row["shard"] in missing}
    failed_shards = tuple(sorted({shard for shard, _ in failures}))
    committed = supplements = ok = lost = 0
    seconds = 0.0
    for link in links:
        committed += 1
        supplements += len(link.supplements)
        ok += sum(receipt.samples_ok for receipt in link.receipts)
        lost += len(link.failed)
        seconds += sum(receipt.seconds for receipt in link.receipts)
    return StageStatus(
        stage=stage,
        committed=committed,
        pending=len(missing) - len(failed_shards),
        failed=len(failed_shards),
        failed_shards=failed_shards,
        samples_ok=ok,
        samples_failed=lost + len(failures),
        seconds=round(seconds, 3),
        supplements=supplements,
    )


def pending(
    dataset: Dataset,
    config: DatasetConfig | None = None,
    *,
    shards: Sequence[int] | None = None,
    stages: Sequence[Stage] | None = None,
) -> dict[Stage, list[int]]:
    """Stage -> shards that are not committed, lack a supplement or are known to be damaged, of `shards` and `stages`
    (default: all).

    Lists names, and reads records only of shards that have requests or supplements. Raises PlanError if not planned.
    """
    plan = read_plan(dataset.folder)
    wanted = list(range(plan.shards)) if shards is None else sorted(set(shards))
    for shard in wanted:
        plan.generation_of(shard)
    hashes = stage_hashes(config or dataset.config)
    names = {stage: dataset.folder.names(layout.commit_folder(stage, own_hash)) for stage, own_hash in hashes.items()}
    extras = {extra[0] for found in names.values() for name in found if (extra := layout.extra_of(name))}
    last = list(hashes)[-1]
    chains = {shard: read_chain(dataset.folder, hashes, shard, last) for shard in wanted if shard in extras}
    todo: dict[Stage, list[int]] = {}
    for stage, found in names.items():
        if stages is None or stage in stages:
            committed = {layout.number_of(name) for name in found} - {
                *marked_shards(dataset.folder, stage, hashes[stage])
            }
            todo[stage] = [
                shard for shard in wanted if shard not in committed or (shard in chains and chains[shard].todo(stage))
            ]
    return todo


def pending_samples(dataset: Dataset, todo: dict[Stage, list[int]]) -> dict[Stage, int]:
    """Stage -> number of planned samples in the shards of `todo`."""
    plan = read_plan(dataset.folder)
    return {stage: sum(plan.size(shard) for shard in shards) for stage, shards in todo.items()}
