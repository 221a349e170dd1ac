"""Measures repeated objects: the failure of direct inference and plain MultiDiffusion beyond the native size.

The caller passes in a function that counts objects (a detector, or a captioner whose sentences are counted by
`mentions`). The counts are compared with what the prompt asks for. Only kinds that the prompt names count: a bird that
the prompt does not name is not a repetition.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Counts = Mapping[str, int]
"""Kind of object -> number of objects."""
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
REACH_WORDS = 3
"""A number belongs to a noun that follows within this many words: `two small red houses`."""


@dataclass(frozen=True)
class Repeats:
    """Repeated objects in a set of images."""

    rate: float
    """Share (0 to 1) of images that show at least `least` objects more than their prompt asks for."""
    surplus: float
    """Objects per image beyond those that the prompt asks for."""
    images: int
    """Number of images whose prompt names something that can be counted. Other images are left out."""


def mentions(text: str, nouns: Iterable[str]) -> Counter[str]:
    """How many objects of each kind a sentence names: `a red house, a house and two trees` -> house 2, tree 2.

    Plurals with -s and -es are understood. A plural without a number counts as 2.
    """
    counts: Counter[str] = Counter()
    singular = {form: noun for noun in nouns for form in (noun, f"{noun}s", f"{noun}es")}
    for clause in re.split(r"[,;.]|\band\b|\bwith\b", text.lower()):
        words = re.findall(r"[a-z]+|\d+", clause)
        for place, word in enumerate(words):
            if noun := singular.get(word):
                before = words[max(0, place - REACH_WORDS) : place]
                number = next(
                    (int(w) if w.isdecimal() else NUMBERS[w] for w in before if w.isdecimal() or w in NUMBERS), 0
                )
                counts[noun] += number or (1 if word == noun else 2)
    return counts


def surplus(found: Counts, wanted: Counts) -> int:
    """The number of objects of the wanted kinds beyond the wanted numbers."""
    return sum(max(0, found.get(kind, 0) - count) for kind, count in wanted.items())


def repeated_objects(
    images: Iterable[tuple[Any, Counts]], count_objects: Callable[[Any], Counts], least: int = 1
) -> Repeats:
    """Repeats over pairs (image, objects that its prompt asks for), which are read one by one. `count_objects` counts
    the objects in an image."""
    return repeats_of(
        [surplus(count_objects(image), wanted) for image, wanted in images if any(wanted.values())], least
    )


def repeats_of(extra: Sequence[int], least: int = 1) -> Repeats:
    """Repeats, from the surplus of objects in each image."""
    if not extra:
        return Repeats(0.0, 0.0, 0)
    return Repeats(sum(e >= least for e in extra) / len(extra), sum(extra) / len(extra), len(extra))
