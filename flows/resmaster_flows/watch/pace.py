"""Estimates how long a build will still take, from its measured speed."""

from __future__ import annotations

from collections import defaultdict


class TimeLeft:
    """Estimates the seconds left from the measured seconds per sample of each stage.

    The estimate is unknown until every stage that has work left has finished a sample.
    """

    def __init__(self, pending: dict[str, int]) -> None:
        self.pending = dict(pending)
        self._seconds: dict[str, float] = defaultdict(float)
        self._samples: dict[str, int] = defaultdict(int)

    def sample_done(self, stage: str, seconds: float) -> None:
        """Record that one sample of `stage` took `seconds`."""
        self._seconds[stage] += seconds
        self._samples[stage] += 1
        self.pending[stage] = max(0, self.pending.get(stage, 0) - 1)

    def drop(self, stage: str, samples: int) -> None:
        """Record that this many samples of `stage` turned out to be done already."""
        self.pending[stage] = max(0, self.pending.get(stage, 0) - samples)

    def seconds(self) -> float | None:
        """Seconds left, or None while unknown."""
        total = 0.0
        for stage, left in self.pending.items():
            if left == 0:
                continue
            if self._samples[stage] == 0:
                return None
            total += left * self._seconds[stage] / self._samples[stage]
        return total


def spell_seconds(seconds: float | None) -> str:
    """`93.2` -> `1 min 33 s`."""
    if seconds is None:
        return "estimating"
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
