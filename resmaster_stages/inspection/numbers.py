"""Counts what is done, failed and spent in a dataset, for pages over many datasets and for scrapers.

Names say how many shards are committed, failed and damaged. Samples, seconds and bytes stand in the records. Either all
records are read (`limit` None), or of each stage some: then sums are estimates, and `estimated` says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import pyarrow.compute as pc

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.chain import redo_left
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.publication import read_publication
from resmaster_stages.dataset.schemas import manifest_schema
from resmaster_stages.errors import ShardError
from resmaster_stages.inspection.known import Failure, Known, Made
from resmaster_stages.inspection.listing import StageListing, list_stages
from resmaster_stages.inspection.lists import counting_choices
from resmaster_stages.redaction import one_line
from resmaster_stages.storage.store_errors import explained
from resmaster_stages.storage.tables import decode_table

Item = TypeVar("Item")


@dataclass(frozen=True)
class StageNumbers:
    """The numbers of one stage. Every shard is committed, pending or failed."""

    stage: str
    committed: int
    pending: int
    failed: int
    damaged: int
    """Committed shards that `verify` has found damaged, or whose record cannot be read."""
    samples_ok: int
    samples_failed: int
    seconds: float
    """Compute time of the commits that count."""
    last_commit: float | None
    """When the last commit was made (Unix time)."""
    tried: int
    """Samples of the commits, good or failed."""
    gpu_seconds: Mapping[str, float]
    native_rows: float
    bytes: int
    failed_attempts: Mapping[str, int]
    """Class of the error -> attempts at a shard that ended by it."""
    failures: Mapping[str, int]
    """Class of the error -> rows of the ledger that were read."""
    retries: int
    """Rows of the ledger of samples that had failed before."""
    estimated: bool
    """Whether sums are estimates, from some of the records."""


@dataclass(frozen=True)
class PublicationNumbers:
    """The numbers of what is published."""

    there: bool = False
    flagged: int | None = None
    """Published samples with flags; None if nothing is published."""
    rejected: int = 0
    """Samples that somebody rejected."""
    problem: str = ""
    """Why a file of it cannot be read."""


@dataclass(frozen=True)
class DatasetNumbers:
    """The numbers of a dataset."""

    name: str
    """Name of the dataset's folder."""
    root: str
    """The folder or URL above it."""
    shards: int
    samples: int
    stages: tuple[StageNumbers, ...]
    megapixels: float
    """Of a mean high-res image; 0 if it was not asked for."""
    redo_samples: int
    """Samples that are to be made again and are not yet, in the stage that has most of them."""
    publication: PublicationNumbers
    stall_seconds: float
    """A build gives up on runs that commit nothing for so long (`dispatch.stall_seconds`)."""
    max_failure_ratio: float
    price: float | None
    """Of one hour of one worker (`dispatch.price`)."""
    max_cost: float | None

    @property
    def url(self) -> str:
        """The dataset's folder or URL."""
        return f"{self.root}/{self.name}"

    @property
    def progress(self) -> float:
        """The share of commits that are there, of all that the plan needs."""
        return sum(stage.committed for stage in self.stages) / max(1, self.shards * len(self.stages))

    @property
    def complete(self) -> bool:
        """Whether every stage of every shard is committed, not known to be damaged, and has nothing to make again."""
        whole = all(stage.committed == self.shards and not stage.damaged for stage in self.stages)
        return whole and not self.redo_samples

    @property
    def last_commit(self) -> float | None:
        """When the last commit was made (Unix time)."""
        return max((stage.last_commit for stage in self.stages if stage.last_commit is not None), default=None)

    @property
    def seconds(self) -> float:
        """Compute time of the commits that count."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def cost(self) -> float | None:
        """Device hours by the price; None without a price."""
        return None if self.price is None else self.seconds / 3600 * self.price

    @property
    def samples_failed(self) -> int:
        """Samples that failed in some stage."""
        return sum(stage.samples_failed for stage in self.stages)

    @property
    def estimated(self) -> bool:
        """Whether sums are estimates, from some of the records."""
        return any(stage.estimated for stage in self.stages)


def dataset_numbers(
    dataset: Dataset, present: Sequence[str], known: Known, limit: int | None, pixels: bool = False
) -> DatasetNumbers:
    """The numbers of a dataset.

    present: the names directly in the dataset's folder. limit: how many records of a stage's shards without failures,
    and how many of those with, are read at most. pixels: whether to ask for the size of images, in the whole plan.
    """
    plan, config = dataset.plan, dataset.config
    listings = list_stages(dataset, present)
    plan.require(max((shard + 1 for each in listings for shard in each.records), default=0))
    root, _, name = dataset.url.rpartition("/")
    publication = _publication(dataset, present, known)
    megapixels = 0.0
    if pixels:
        version = tuple(part.stored.sha256 for generation in plan.generations for part in generation.parts)
        of_all = known.value(dataset.url, "pixels", version, plan.pixels)
        megapixels = of_all * config.upscale.scale**2 / max(1, plan.samples) / 1e6
    left = redo_left(dataset) if layout.REDO in present else {}
    return DatasetNumbers(
        name=name,
        root=root,
        shards=plan.shards,
        samples=plan.samples,
        stages=tuple(_stage(dataset, each, known, limit) for each in listings),
        megapixels=megapixels,
        redo_samples=max((sum(shards.values()) for shards in left.values()), default=0),
        publication=publication,
        stall_seconds=config.dispatch.stall_seconds,
        max_failure_ratio=config.max_failure_ratio,
        price=config.dispatch.price,
        max_cost=config.dispatch.max_cost,
    )


class _Sums(NamedTuple):
    """Sums over the records of a stage."""

    made: dict[int, Made]
    """Of the records that were read."""
    unreadable: frozenset[int]
    weights: dict[int, float]
    """Shard -> the number of commits that it stands for."""

    def of(self, field: str) -> float:
        return sum(getattr(made, field) * self.weights[shard] for shard, made in self.made.items())


def _stage(dataset: Dataset, listing: StageListing, known: Known, limit: int | None) -> StageNumbers:
    missing = set(range(dataset.plan.shards)) - listing.records.keys()
    failed = missing & {attempt.shard for attempt in listing.attempts}
    sums = _sums(dataset, listing, known, limit)
    rows, share = _failures(dataset, listing, known, limit, missing)
    lost = len({(row.shard, row.key) for row in rows if row.shard in missing}) * share
    ok, bad = sums.of("samples_ok"), sums.of("samples_failed")
    gpus: dict[str, float] = {}
    for shard, made in sums.made.items():
        if made.gpu:
            gpus[made.gpu] = gpus.get(made.gpu, 0.0) + made.seconds * sums.weights[shard]
    return StageNumbers(
        stage=listing.stage,
        committed=len(listing.records),
        pending=len(missing) - len(failed),
        failed=len(failed),
        damaged=len(listing.marked | sums.unreadable),
        samples_ok=round(ok),
        samples_failed=round(bad + lost),
        seconds=round(sums.of("seconds"), 3),
        last_commit=max((made.finished for made in sums.made.values()), default=None),
        tried=round(ok + bad),
        gpu_seconds=dict(sorted(gpus.items())),
        native_rows=sums.of("native_rows"),
        bytes=round(sums.of("bytes")),
        failed_attempts=dict(sorted(Counter(attempt.error_class for attempt in listing.attempts).items())),
        failures=dict(sorted(Counter(row.error_class for row in rows).items())),
        retries=sum(row.attempt_number > 1 for row in rows),
        estimated=share > 1 or any(weight > 1 for weight in sums.weights.values()),
    )


def _sums(dataset: Dataset, listing: StageListing, known: Known, limit: int | None) -> _Sums:
    """The records of a stage: some of the shards with a ledger, which may have failures, and some of the others."""
    in_time = sorted(listing.records, key=lambda shard: (listing.records[shard].modified, shard))
    groups = [[shard for shard in in_time if (shard in listing.ledgers) is failures] for failures in (True, False)]
    chosen = [_spread(group, limit) for group in groups]
    commits = dataset.commits(listing.stage)
    made, problems = known.made(commits, listing, [shard for group in chosen for shard in group])
    weights: dict[int, float] = {}
    for group, some in zip(groups, chosen, strict=True):
        weights.update(dict.fromkeys(some, len(group) / max(1, len(some))))
    return _Sums(made, frozenset(problems), weights)


def _failures(
    dataset: Dataset, listing: StageListing, known: Known, limit: int | None, missing: set[int]
) -> tuple[list[Failure], float]:
    """Rows of the ledger, and the number of shards that each stands for. With a limit: of `missing` shards alone."""
    shards = sorted(listing.ledgers if limit is None else missing & listing.ledgers.keys())
    some = _spread(shards, limit)
    files = [file for shard in some for file in listing.ledgers[shard]]
    rows = known.failures(dataset.commits(listing.stage), files) if files else []
    return rows, len(shards) / len(some) if some else 1


def _spread(items: Sequence[Item], limit: int | None) -> Sequence[Item]:
    """At most `limit` of the items, evenly spread, the last among them."""
    if limit is None or len(items) <= limit:
        return items
    return [items[(number + 1) * len(items) // limit - 1] for number in range(limit)]


def _publication(dataset: Dataset, present: Sequence[str], known: Known) -> PublicationNumbers:
    """What is published, and what people chose. A file that cannot be read costs these numbers alone."""
    try:
        record = read_publication(dataset.folder) if layout.PUBLICATION in present else None
        manifest = next((file.sha256 for file in record.files if file.name == layout.MANIFEST), "") if record else ""
        flagged = known.value(dataset.url, "flagged", manifest, lambda: _flagged(dataset)) if manifest else None
        sessions = tuple(dataset.folder.files(layout.CURATION)) if layout.CURATION in present else ()
        rejected = 0
        if sessions or layout.CURATION_TABLE in present:
            rejected = known.value(dataset.url, "rejected", (manifest, sessions), lambda: _rejected(dataset))
        return PublicationNumbers(record is not None, flagged, rejected)
    except (ShardError, FileNotFoundError) as error:
        return PublicationNumbers(layout.PUBLICATION in present, problem=one_line(error))


def _flagged(dataset: Dataset) -> int:
    """Number of published samples with flags. Reads one column of the manifest."""
    with explained(dataset.folder.url_of(layout.MANIFEST)), dataset.folder.open(layout.MANIFEST) as file:
        flags = decode_table(file, manifest_schema(), layout.MANIFEST, ["flags"])["flags"]
    return pc.sum(pc.greater(pc.list_value_length(flags), 0)).as_py() or 0


def _rejected(dataset: Dataset) -> int:
    return sum(choice.verdict == "rejected" for choice in counting_choices(dataset).values())
