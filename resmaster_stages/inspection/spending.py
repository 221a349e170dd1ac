"""Tells what a dataset has cost: device seconds by stage, from commit records and the records of failed attempts.

Counted are all commits, also those of earlier configurations, and attempts that ended by an error. What a killed
process had saved is counted in the commit that uses it.

Not counted, because no record tells it: what a killed or interrupted process had not saved (at most about
`spill_seconds`, and the samples at work), attempts that lost a race, damaged objects that were made again, uploads, the
start of workers and their idle time, and records that were deleted (`repair --replace`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.attempts import FailedAttempt
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.commits import Commits
from resmaster_stages.dataset.records import parse_record
from resmaster_stages.storage.filesystem import Folder

SECONDS_PER_HOUR = 3600
NOT_COUNTED = (
    "Not counted: start of workers, idle workers, uploads, objects that were made again after damage, and the last "
    "seconds before a kill."
)
CHUNK_RECORDS = 1000
"""Number of records that are in memory together."""


@dataclass(frozen=True)
class StageSpent:
    """The device seconds of one stage."""

    stage: str
    commits: float
    """Of the commits that count."""
    failed: float
    """Of attempts that ended by an error, under any configuration, without what they saved."""
    others: float
    """Of commits under other configurations."""

    @property
    def seconds(self) -> float:
        """All together."""
        return self.commits + self.failed + self.others


@dataclass(frozen=True)
class Spent:
    """The device seconds of a dataset, and what they cost."""

    stages: tuple[StageSpent, ...] = ()
    price: float | None = None
    """Price of a device's hour."""

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def cost(self, seconds: float) -> float | None:
        """What so many device seconds cost; None without a price."""
        return None if self.price is None else seconds / SECONDS_PER_HOUR * self.price

    def line(self) -> str:
        """The total in a few words."""
        return spell_cost(self.seconds, self.price)

    def told(self) -> str:
        """The total in one line, with what of it is no part of the dataset."""
        parts = {
            "failed attempts": sum(stage.failed for stage in self.stages),
            "other configurations": sum(stage.others for stage in self.stages),
        }
        lost = ", ".join(f"{name} {spell_time(seconds)}" for name, seconds in parts.items() if seconds)
        return f"{self.line()} (of it {lost})" if lost else self.line()

    def cells(self, stage: str) -> tuple[str, ...]:
        """The time of a stage and, if there is a price, its cost, as cells of a table."""
        seconds = sum(each.seconds for each in self.stages if each.stage == stage)
        cost = self.cost(seconds)
        return (spell_time(seconds),) if cost is None else (spell_time(seconds), spell_money(cost))


def spell_cost(seconds: float, price: float | None) -> str:
    """Device seconds in words, with the money if there is a price: `2.05 h of device time, 5.12 at 2.5 an hour`."""
    money = "" if price is None else f", {spell_money(seconds / SECONDS_PER_HOUR * price)} at {price:g} an hour"
    return f"{spell_time(seconds)} of device time{money}"


def spell_time(seconds: float) -> str:
    """A time in one unit: `12.3 s`, `4.5 min`, `2.05 h`."""
    if seconds < SECONDS_PER_HOUR:
        return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
    return f"{seconds / SECONDS_PER_HOUR:,.2f} h"


def spell_money(amount: float) -> str:
    """An amount of money: with two decimals, or if it is small, with two digits."""
    return f"{amount:,.2f}" if amount >= 0.1 or not amount else f"{amount:.2g}"


class Spending:
    """Reads the device seconds of a dataset. Each record is read once, so it may be asked again and again."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._known: dict[str, float] = {}
        """Name of a record -> its seconds. A record that cannot be read has none."""

    def seconds(self) -> float:
        """All device seconds of the dataset so far."""
        namespaces = self._namespaces()
        return sum(map(self._of_commits, namespaces)) + sum(self._of_failures(self._attempts()).values())

    def by_stage(self, own: Mapping[str, tuple[str, float]]) -> tuple[StageSpent, ...]:
        """The device seconds of each stage. own: stage -> namespace and seconds of the commits that count."""
        others: dict[str, float] = {}
        for stage, namespace in self._namespaces():
            if own.get(stage, ("", 0.0))[0] != namespace:
                others[stage] = others.get(stage, 0.0) + self._of_commits((stage, namespace))
        failed = self._of_failures(self._attempts())
        stages = dict.fromkeys([*own, *others, *failed])
        return tuple(
            StageSpent(
                stage,
                commits=own.get(stage, ("", 0.0))[1],
                failed=round(failed.get(stage, 0.0), 3),
                others=round(others.get(stage, 0.0), 3),
            )
            for stage in stages
        )

    def _namespaces(self) -> list[tuple[str, str]]:
        found = map(layout.namespace_of, self._folder.names(layout.COMMITS))
        return [each for each in found if each is not None]

    def _attempts(self) -> list[str]:
        """The names of all records of failed attempts."""
        folders = self._folder.names(layout.ATTEMPTS)
        names = chain.from_iterable(map(self._folder.names, folders))
        return [name for name in names if layout.failed_attempt_of(name)]

    def _of_commits(self, namespace: tuple[str, str]) -> float:
        """The seconds of the commits of a stage under one configuration. Those of a shard's last attempt hold those of
        the attempts before."""
        numbers = Commits(self._folder, *namespace).numbers()
        names = [layout.commit(*namespace, shard, number) for shard, number in numbers.items()]
        self._read(Receipt, names)
        return sum(self._known[name] for name in names)

    def _of_failures(self, names: Sequence[str]) -> dict[str, float]:
        """Stage -> seconds of its failed attempts."""
        self._read(FailedAttempt, names)
        seconds: dict[str, float] = {}
        for name in names:
            stage = name.split("/")[1].rpartition("-")[0]
            seconds[stage] = seconds.get(stage, 0.0) + self._known[name]
        return seconds

    def _read(self, kind: type[Receipt | FailedAttempt], names: Sequence[str]) -> None:
        """Read those of the records that are not known yet."""
        new = [name for name in names if name not in self._known]
        for start in range(0, len(new), CHUNK_RECORDS):
            found = self._folder.read_many(new[start : start + CHUNK_RECORDS], lenient=True)
            for name in new[start : start + CHUNK_RECORDS]:
                try:
                    self._known[name] = parse_record(kind, found.get(name, b"")).seconds
                except ValueError:  # `status` and `verify` tell of it
                    self._known[name] = 0.0
