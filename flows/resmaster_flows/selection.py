"""Parses and spells lists of shards and stages as users write them: `1,4-7` and `captions,quality`."""

from __future__ import annotations

from collections.abc import Iterable

from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import UserError, did_you_mean


def parse_numbers(text: str | None) -> list[int] | None:
    """`1,4-7` -> [1, 4, 5, 6, 7]; None stays None. Raises UserError on anything else."""
    if text is None:
        return None
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise UserError(f"--shards {text}: {part.strip()!r} is not a shard number or a range; write e.g. 1,4-7")
        numbers.update(range(int(first), int(last or first) + 1))
    return sorted(numbers)


def parse_stages(text: str | None) -> list[str] | None:
    """`captions,high_res` -> those stages in pipeline order; None stays None. Raises UserError on unknown names."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in STAGES:
            meant = did_you_mean(name, STAGES)
            raise UserError(f"--stages {text}: unknown stage {name!r}{meant}; known: {', '.join(STAGES)}")
    return [stage for stage in STAGES if stage in names]


def spell_shards(shards: Iterable[int]) -> str:
    """The inverse of `parse_numbers`: `[1, 4, 5, 6, 7]` -> `1,4-7`."""
    runs: list[list[int]] = []
    for shard in sorted(set(shards)):
        if runs and shard == runs[-1][1] + 1:
            runs[-1][1] = shard
        else:
            runs.append([shard, shard])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
