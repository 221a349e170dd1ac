"""Says whether a build has reached the limit of its money or of its hours (`dispatch.max_cost`, `dispatch.max_hours`).

A build asks before each shard, wherever the shard is done, and finishes the shards that are at work. So with N
processes at work, at most N shards are done beyond the limit.

The money is that of the dataset: what all builds together have spent on it, as far as `spending` knows. The hours are
those of one build.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from resmaster_stages.config.dataset import DispatchConfig
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.inspection.spending import SECONDS_PER_HOUR, Spending, spell_cost, spell_money
from resmaster_stages.inspection.status import Status, pending_samples
from resmaster_stages.progress import Note, emit
from resmaster_stages.storage.filesystem import open_root


def end_of_hours(config: DispatchConfig) -> str | None:
    """When a build that begins now has had its hours (UTC, ISO 8601); None without such a limit."""
    if config.max_hours is None:
        return None
    return (datetime.now(UTC) + timedelta(hours=config.max_hours)).isoformat(timespec="milliseconds")


class Limits:
    """The limits of one build."""

    def __init__(self, dataset: Dataset, until: str | None, spending: Spending | None = None) -> None:
        """until: what `end_of_hours` said when the build began. spending: of the dataset, if some is known already."""
        self.until = until
        self.told = ""
        """The limit that `within` has met, in words."""
        self._config = dataset.config.dispatch
        self._spending = spending or Spending(dataset.folder)

    @property
    def given(self) -> bool:
        """Whether there is any limit."""
        return self.until is not None or (self._config.max_cost is not None and self._config.price is not None)

    def within(self, shards: Iterable[int]) -> Iterator[int]:
        """The shards, as long as no limit is reached. A note tells the limit."""
        for shard in shards:
            if told := self.reached():
                self.told = told
                emit(Note(f"{told}; no further shard is begun"))
                return
            yield shard

    def reached(self) -> str:
        """Which limit is reached, in words; "" if none is. Reads the store only if money is limited."""
        config = self._config
        if self.until is not None and datetime.now(UTC) >= (end := datetime.fromisoformat(self.until)):
            return f"the build was to begin no shard after {end:%Y-%m-%d %H:%M:%S} UTC (max_hours)"
        if config.max_cost is None or config.price is None:
            return ""
        seconds = self._spending.seconds()
        if seconds / SECONDS_PER_HOUR * config.price < config.max_cost:
            return ""
        return f"the budget of {spell_money(config.max_cost)} is spent (max_cost): {spell_cost(seconds, config.price)}"


@lru_cache(maxsize=4)
def known_spending(url: str, build: str | None) -> Spending:
    """The spending of a dataset as this process knows it from earlier shards of the same build."""
    return Spending(open_root(url))


def left(dataset: Dataset, todo: Mapping[str, Sequence[int]], found: Status) -> str:
    """What a build that was stopped by a limit has not done, in words. todo: stage -> shards. found: the status."""
    shards = {shard for missing in todo.values() for shard in missing}
    told = f"{len(shards)} of {found.shards} shards are left"
    seconds = _seconds_left(pending_samples(dataset, todo), found)
    return told if seconds is None else f"{told}, about {spell_cost(seconds, dataset.config.dispatch.price)}"


def _seconds_left(samples: Mapping[str, int], found: Status) -> float | None:
    """Device seconds of so many samples by stage, at the pace of the commits; None if a stage has none yet."""
    seconds = 0.0
    for stage in found.stages:
        tried = stage.samples_ok + stage.samples_failed
        if samples.get(stage.stage, 0):
            if not tried or not stage.seconds:
                return None
            seconds += samples[stage.stage] * stage.seconds / tried
    return seconds
