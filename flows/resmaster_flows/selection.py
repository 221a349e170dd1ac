"""Parses and spells lists of shards and stages as users write them: `1,4-7` and `captions,quality`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from resmaster_stages.config.part import LONGEST_SHOWN
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import UserError, did_you_mean

MOST_DIGITS = 9
"""Maximum number of digits of a shard's number."""


def parse_numbers(text: str, shards: int) -> list[int]:
    """`1,4-7` -> [1, 4, 5, 6, 7]. shards: how many the plan has.

    Raises UserError on anything else, and on a number that is not in the plan.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(rf"\s*(\d{{1,{MOST_DIGITS}}})(?:-(\d{{1,{MOST_DIGITS}}}))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise UserError(
                f"--shards {_shown(text)}: {_shown(part.strip())!r} is not a shard number or a range; write e.g. 1,4-7"
            )
        if last >= shards:  # before the range is written out, which may have any length
            raise UserError(
                f"--shards {_shown(text)}: shard {last} is not in the plan, which has {shards} (from 0); resmaster "
                "status lists them"
            )
        numbers.update(range(first, last + 1))
    return sorted(numbers)


def _shown(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def parse_stages(text: str | None) -> list[str] | None:
    """`captions,high_res` -> those stages in pipeline order; None stays None. Raises UserError on unknown names."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in STAGES:
            meant = did_you_mean(name, STAGES)
            raise UserError(
                f"--stages {_shown(text)}: unknown stage {_shown(name)!r}{meant}; known: {', '.join(STAGES)}"
            )
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
