"""Looks at all datasets directly below a root, and says which of them need attention first. Changes nothing.

A dataset costs about ten requests, one more per thousand of its files that are listed, and at most `RECORDS` records
per stage of its shards without failures and as many of those with. A dataset that cannot be read costs a line, and so
does a folder that is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.dataset import dataset_in, no_dataset
from resmaster_stages.errors import ResMasterError, UserError
from resmaster_stages.inspection.known import Known
from resmaster_stages.inspection.numbers import DatasetNumbers, dataset_numbers
from resmaster_stages.redaction import one_line, printable, quoted, without_credentials
from resmaster_stages.storage.filesystem import Folder

RECORDS = 8
"""Records of a stage that are read at most, of shards with failures and of others. Sums of more are estimates."""
FOLDERS = 1000
"""A root with more folders is not looked at."""
THREADS = 8
"""Datasets that are looked at side by side."""

HEADINGS = (
    "dataset",
    "attention",
    "done",
    "last commit",
    "shards failed",
    "samples failed",
    "damaged",
    "flagged",
    "rejected",
    "device hours",
    "cost",
)
UNKNOWN = "-"

_DAMAGED, _FAILED, _COST, _STALLED, _SAMPLES, _PUBLICATION, _AT_WORK, _DONE = range(8)


@dataclass(frozen=True)
class Concern:
    """Why a dataset needs attention."""

    level: int
    """0 is the most urgent."""
    weight: float
    """The greater of two of one level is the more urgent."""
    text: str

    @property
    def urgent(self) -> bool:
        """Whether somebody has to do something."""
        return self.level < _AT_WORK


@dataclass(frozen=True)
class NoDataset:
    """A folder of which there are no numbers."""

    name: str
    line: str
    """Why, and what to do."""
    foreign: bool
    """Whether it is no dataset at all. If not, it is one that cannot be read."""


@dataclass(frozen=True)
class Overview:
    """The datasets of a root."""

    root: str
    seen: float
    """When it was looked (Unix time)."""
    datasets: tuple[DatasetNumbers, ...] = ()
    """What needs attention first stands first."""
    others: tuple[NoDataset, ...] = ()

    @property
    def unreadable(self) -> tuple[NoDataset, ...]:
        """The datasets that cannot be read."""
        return tuple(each for each in self.others if not each.foreign)

    @property
    def foreign(self) -> tuple[NoDataset, ...]:
        """The folders that are no datasets."""
        return tuple(each for each in self.others if each.foreign)

    @property
    def count(self) -> str:
        """How many datasets there are, in words."""
        found = len(self.datasets) + len(self.unreadable)
        return "1 dataset" if found == 1 else f"{found} datasets"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "root": self.root,
            "datasets": [facts(numbers, self.seen) for numbers in self.datasets],
            "unreadable": {each.name: each.line for each in self.unreadable},
            "foreign": {each.name: each.line for each in self.foreign},
        }


def overview(root: Folder, known: Known | None = None, now: Callable[[], float] = time.time) -> Overview:
    """The datasets directly below `root`. known: what earlier looks have read.

    Raises UserError if `root` has too many folders, and as `Folder.names` does.
    """
    known = known or Known()
    names = folders_below(root)
    with ThreadPoolExecutor(THREADS, "overview") as threads:
        found = list(threads.map(lambda name: look(root.sub(name), known, RECORDS), names))
    seen = now()
    datasets = [each for each in found if isinstance(each, DatasetNumbers)]
    datasets.sort(key=lambda numbers: _urgency(concern(numbers, seen), numbers.name))
    return Overview(root.url, seen, tuple(datasets), tuple(each for each in found if isinstance(each, NoDataset)))


def folders_below(root: Folder) -> list[str]:
    """The names of what is directly below `root`, but for hidden names. Raises UserError if there are too many."""
    names = [name for name in root.names("") if not name.startswith(".")]
    if len(names) > FOLDERS:
        raise UserError(f"{root.url}: {len(names)} folders are too many for one overview; name a root with fewer")
    return names


def look(folder: Folder, known: Known, limit: int | None, pixels: bool = False) -> DatasetNumbers | NoDataset | None:
    """The numbers of the dataset in a folder; None for a file and for a folder with nothing in it.

    limit, pixels: as for `dataset_numbers`.
    """
    name = folder.path.rpartition("/")[2]
    try:
        present = folder.names("")
        if not present:
            return None
        if layout.CONFIG in present:
            return dataset_numbers(dataset_in(folder), present, known, limit, pixels)
        if layout.PLAN in present or layout.COMMITS in present:
            return NoDataset(name, f"{_place(folder)}: {no_dataset(present)}", foreign=False)
        hint = f"if datasets lie below it: resmaster status {quoted(_place(folder))}"
        return NoDataset(name, f"{_place(folder)}: no dataset (no config.json); {hint}", foreign=True)
    except (ResMasterError, OSError) as error:
        line, place = one_line(error), _place(folder)
        return NoDataset(name, line if line.startswith(place) else f"{place}: {line}", foreign=False)


def _place(folder: Folder) -> str:
    return printable(without_credentials(folder.url))


def _urgency(found: Concern, name: str) -> tuple[int, float, str]:
    """Concerns sort by it."""
    return found.level, -found.weight, name


def concern(numbers: DatasetNumbers, now: float) -> Concern:
    """The most urgent concern about a dataset. now: Unix time."""
    return next(_concerns(numbers, now))


def _concerns(numbers: DatasetNumbers, now: float) -> Iterator[Concern]:
    stages, publication = numbers.stages, numbers.publication
    if damaged := sum(stage.damaged for stage in stages):
        yield Concern(_DAMAGED, damaged, f"{damaged} {'commit' if damaged == 1 else 'commits'} damaged")
    if failed := sum(stage.failed for stage in stages):
        yield Concern(_FAILED, failed, f"{failed} {'shard' if failed == 1 else 'shards'} failed")
    cost, budget = numbers.cost, numbers.max_cost
    if cost is not None and budget is not None and cost > budget:
        yield Concern(_COST, cost / budget, f"cost above max_cost {budget:g}")
    quiet = now - numbers.last_commit if numbers.last_commit is not None else 0.0
    if not numbers.complete and quiet > numbers.stall_seconds:
        yield Concern(_STALLED, quiet, f"no commit for {spell_age(quiet)}")
    lost = numbers.samples_failed / max(1, numbers.samples)
    if lost > numbers.max_failure_ratio and numbers.samples_failed > 1:
        yield Concern(_SAMPLES, lost, f"{100 * lost:.0f} % of samples failed")
    if publication.problem:
        yield Concern(_PUBLICATION, 1, f"publication: {publication.problem}")
    if numbers.complete and not publication.there:
        yield Concern(_PUBLICATION, 0, "not published")
    if not numbers.complete:
        yield Concern(_AT_WORK, 1 - numbers.progress, _doing(numbers))
    yield Concern(_DONE, 0, "")


def _doing(numbers: DatasetNumbers) -> str:
    """What is said of an incomplete dataset about which there is no concern."""
    if numbers.last_commit is None:
        return "nothing committed yet"
    return f"{numbers.redo_samples} samples to make again" if numbers.redo_samples else "incomplete"


def facts(numbers: DatasetNumbers, now: float) -> dict[str, Any]:
    """A dataset as JSON values. Sums are estimates if `estimated`."""
    last = numbers.last_commit
    return {
        "name": numbers.name,
        "url": numbers.url,
        "attention": concern(numbers, now).text,
        "urgent": concern(numbers, now).urgent,
        "complete": numbers.complete,
        "published": numbers.publication.there,
        "shards": numbers.shards,
        "samples": numbers.samples,
        "progress": round(numbers.progress, 4),
        "last_commit": None if last is None else datetime.fromtimestamp(last, UTC).isoformat(timespec="seconds"),
        "failed_shards": sum(stage.failed for stage in numbers.stages),
        "failed_samples": numbers.samples_failed,
        "damaged": sum(stage.damaged for stage in numbers.stages),
        "flagged": numbers.publication.flagged,
        "rejected": numbers.publication.rejected,
        "redo_samples": numbers.redo_samples,
        "device_hours": round(numbers.seconds / 3600, 4),
        "price": numbers.price,
        "cost": None if numbers.cost is None else round(numbers.cost, 4),
        "max_cost": numbers.max_cost,
        "estimated": numbers.estimated,
    }


def cells(numbers: DatasetNumbers, now: float) -> tuple[str, ...]:
    """A dataset as the cells below `HEADINGS`. `~` stands before estimates."""
    about, publication = "~" if numbers.estimated else "", numbers.publication
    return (
        printable(numbers.name),
        printable(concern(numbers, now).text),
        f"{int(100 * numbers.progress)} %",
        UNKNOWN if numbers.last_commit is None else f"{spell_age(now - numbers.last_commit)} ago",
        str(sum(stage.failed for stage in numbers.stages)),
        f"{about}{numbers.samples_failed}",
        str(sum(stage.damaged for stage in numbers.stages)),
        UNKNOWN if publication.flagged is None else str(publication.flagged),
        str(publication.rejected),
        f"{about}{numbers.seconds / 3600:.2f}",
        UNKNOWN if numbers.cost is None else f"{about}{numbers.cost:.2f}",
    )


def spell_age(seconds: float) -> str:
    """`7300` -> `2 h`."""
    for unit, size, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < most:
            return f"{max(0, int(seconds / size))} {unit}"
    return f"{int(seconds / 86_400)} d"
