"""Tells what is done in a dataset and what is still to do. Changes nothing.

It reads commit records, and of shards without a commit the ledger and the records of failed attempts. A record that
cannot be read costs its shard: the shard counts as committed, and its samples are not counted.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.attempts import FailedAttempt, failed_names, read_failures
from resmaster_stages.dataset.chain import chunks, read_chains, redo_left
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.commits import Commits
from resmaster_stages.dataset.dataset import Dataset, current_config
from resmaster_stages.dataset.layout import FailedName
from resmaster_stages.dataset.ledger import ledger_rows
from resmaster_stages.dataset.publication import CommitsDigest
from resmaster_stages.dataset.retry import Retries, number_of
from resmaster_stages.inspection.published import Published, published
from resmaster_stages.inspection.spending import Spending, Spent
from resmaster_stages.redaction import quoted


@dataclass(frozen=True)
class StageError:
    """The failed shards of a stage whose last attempts ended by errors of one class."""

    error_class: str
    shards: tuple[int, ...]
    last: FailedAttempt
    """The latest of these attempts."""


@dataclass(frozen=True)
class StageStatus:
    """The status of a stage. Every shard is either committed, pending or failed."""

    stage: str
    committed: int
    pending: int
    failed: int
    """Shards that have no commit, and of which an attempt ended by an error."""
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
    unreadable: dict[int, str] = field(default_factory=dict)
    """Committed shard -> why its record cannot be read, and what to do."""
    others: dict[str, int] = field(default_factory=dict)
    """Namespace of another configuration -> number of shards that are committed there."""
    errors: tuple[StageError, ...] = ()
    """Why the failed shards failed, by class of the error, the most frequent first."""
    redo_shards: tuple[int, ...] = ()
    """Committed shards with samples that are to be made again and are not yet."""
    redo_samples: int = 0
    """Number of these samples."""


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
    spent: Spent = field(default_factory=Spent)
    """What the dataset has cost so far."""
    published: Published = field(default_factory=Published)
    """Whether readers get what is committed."""

    @property
    def complete(self) -> bool:
        """Whether every stage of every shard is committed, not known to be damaged, and has nothing to make again."""
        return not self.unreadable and all(
            stage.committed == self.shards and not stage.damaged_shards and not stage.redo_shards
            for stage in self.stages
        )

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Why commit records cannot be read, and what to do: one line each."""
        return tuple(line for stage in self.stages for line in stage.unreadable.values())

    def publication_line(self, url: str) -> str:
        """What is wrong with the publication of the dataset at `url`, and what to do; "" if nothing is wrong."""
        if not self.published.problem:
            return ""
        at_once = self.complete or self.published.problem == "damaged"
        hint = f"next: resmaster publish {quoted(url)}" if at_once else "a build publishes at its end"
        return f"the publication {self.published.spelled()}; {hint}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        spent = self.spent
        totals = {"device_seconds": round(spent.seconds, 3), "cost": spent.cost(spent.seconds)}
        values = asdict(self) | {"spent": asdict(spent) | totals}
        return json.loads(json.dumps(values))


def status(dataset: Dataset) -> Status:
    """The status of each stage and of the publication."""
    plan = dataset.plan
    names = dataset.folder.names(layout.COMMITS)
    namespaces = [each for each in map(layout.namespace_of, names) if each is not None]
    committed = {stage: dataset.commits(stage).numbers() for stage in dataset.hashes}
    marked = {stage: dataset.commits(stage).marked() for stage in dataset.hashes}
    plan.require(max((shard + 1 for numbers in committed.values() for shard in numbers), default=0))
    ready = _ready(plan.shards, committed, marked)
    digest = CommitsDigest(dataset.hashes, dataset.config.quality.publication())
    left = redo_left(dataset)
    stages = []
    for stage, own_hash in dataset.hashes.items():
        commits, numbers = dataset.commits(stage), committed[stage]
        missing = set(range(plan.shards)) - numbers.keys()
        rows = ledger_rows(commits, missing) if missing else []
        failed = {each.shard: each for each in failed_names(commits, missing)} if missing else {}  # the last counts
        unreadable: dict[int, str] = {}
        receipts = _receipts(commits, numbers, unreadable)
        found = stage_status(stage, _digested(receipts, ready, digest), missing, rows, failed.keys())
        others = {
            other: len(Commits(dataset.folder, stage, other).numbers())
            for name, other in namespaces
            if name == stage and other != own_hash[:8]
        }
        found = replace(found, namespace=own_hash[:8], damaged_shards=tuple(marked[stage]), others=others)
        found = replace(found, committed=found.committed + len(unreadable), unreadable=unreadable)
        found = replace(found, redo_shards=tuple(left[stage]), redo_samples=sum(left[stage].values()))
        stages.append(replace(found, errors=_errors(commits, failed.values())))
    current = current_config(dataset.folder)
    state = published(dataset.folder, digest.hexdigest(), bool(ready))
    spent = spent_on(dataset, stages)
    return Status(plan.shards, plan.samples, tuple(stages), len(plan.generations), current, spent, state)


def spent_on(dataset: Dataset, stages: Iterable[StageStatus]) -> Spent:
    """What a dataset has cost so far. stages: their status."""
    own = {each.stage: (each.namespace, each.seconds) for each in stages}
    return Spent(Spending(dataset.folder).by_stage(own), dataset.config.dispatch.price)


def _ready(
    shards: int, committed: Mapping[str, Mapping[int, int]], marked: Mapping[str, Collection[int]]
) -> frozenset[int]:
    """The shards that a publication made now would hold: committed in every stage, and not marked as damaged."""
    damaged = {shard for found in marked.values() for shard in found}
    return frozenset(range(shards)).intersection(*committed.values()) - damaged


def _receipts(commits: Commits, numbers: Mapping[int, int], unreadable: dict[int, str]) -> Iterator[Receipt]:
    """Yield the records that count, in the order of the shards. Why others cannot be read is added to `unreadable`."""
    for chunk in chunks(sorted(numbers)):
        found, problems = commits.read_some({shard: numbers[shard] for shard in chunk})
        unreadable.update(problems)
        yield from (receipt for _, receipt in sorted(found.items()))


def _digested(receipts: Iterable[Receipt], ready: Collection[int], digest: CommitsDigest) -> Iterator[Receipt]:
    """Pass records on, and add those of `ready` shards to `digest`."""
    for receipt in receipts:
        if receipt.shard in ready:
            digest.add(receipt)
        yield receipt


def _errors(commits: Commits, failed: Iterable[FailedName]) -> tuple[StageError, ...]:
    """The failed shards by class of their last error. Reads one record per class. failed: the last of each shard."""
    by_class: dict[str, list[FailedName]] = {}
    for each in failed:
        by_class.setdefault(each.error_class, []).append(each)
    latest = [max(found, key=lambda each: each.time) for found in by_class.values()]
    errors = [
        StageError(last.error_class, tuple(sorted(each.shard for each in by_class[last.error_class])), attempt)
        for last, attempt in zip(latest, read_failures(commits, latest), strict=True)
    ]
    return tuple(sorted(errors, key=lambda error: -len(error.shards)))


def stage_status(
    stage: str,
    receipts: Iterable[Receipt],
    missing: Collection[int],
    ledger: Sequence[Mapping[str, Any]],
    failed: Collection[int],
) -> StageStatus:
    """The status of a stage.

    receipts: its valid records. missing: the shards without a record. ledger: the ledger rows of the latter. failed:
    those of `missing` of which an attempt ended by an error.
    """
    failures = {(row["shard"], row["key"]) for row in ledger if row["shard"] in missing}
    failed_shards = tuple(sorted(failed))
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

    A shard has work left if it has no commit, is marked as damaged, has samples that became good upstream or are to be
    made again, or lacks an attempt of `retries`.

    Lists names, and reads records only of shards with several attempts or samples to make again. Raises PlanError for
    unplanned shards, and if there are commits of such.
    """
    wanted = list(range(dataset.plan.shards)) if shards is None else sorted(set(shards))
    for shard in wanted:
        dataset.plan.generation_of(shard)
    numbers = {stage: dataset.commits(stage).numbers() for stage in dataset.hashes}
    dataset.plan.require(max((shard + 1 for found in numbers.values() for shard in found), default=0))
    several = {shard for found in numbers.values() for shard, number in found.items() if number > 1}
    several |= dataset.redos.shards
    ahead = list(dataset.hashes) if stages is None else stages
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
                or (shard in chains and chains[shard].due(stage, ahead=ahead))
            ]
    return todo


def pending_samples(dataset: Dataset, todo: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Stage -> number of planned samples in the shards of `todo`."""
    return {stage: sum(dataset.plan.size(shard) for shard in shards) for stage, shards in todo.items()}
