"""Caption fit: does a view's caption describe the view, or does a neighbour's caption describe it better?

A wrong caption often suits its own crop: the blurred foot of a lighthouse looks like the stem of a flower. The
neighbouring views show what the crop is part of. So the fit of a caption is the mean of its CLIP score on the crop and
of its mean CLIP score on the neighbours' crops.

Invariants:
- All views are judged by the captions that were written for them, so the order of the views changes nothing.
- CLIP gets an image's crops in batches of a fixed size, so settings for speed do not change the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BATCH = 32
"""Crops or texts per call of CLIP. The number is fixed, because another batch size rounds differently and rows of the
captions table must not change."""


class Embedder(Protocol):
    """The part of `clip_score.ClipScorer` that the check uses: embeddings [N, D] of images and texts, of any norm."""

    def image_embeddings(self, images: Sequence[Image.Image]) -> NDArray[np.float32]: ...

    def text_embeddings(self, texts: Sequence[str]) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Choice:
    """The caption that is chosen for a view."""

    view: int
    """The number of the view that the caption was written for: the view itself or a neighbour."""
    fit: float
    """Fit of the caption to the view: a CLIP score, 0 to 100."""


def neighbours(rows: int, cols: int) -> tuple[tuple[int, ...], ...]:
    """The numbers of the views above, left, right and below each view of a row-major grid; fewer at borders."""
    found = []
    for number in range(rows * cols):
        row, col = divmod(number, cols)
        around = ((row - 1, col), (row, col - 1), (row, col + 1), (row + 1, col))
        found.append(tuple(r * cols + c for r, c in around if 0 <= r < rows and 0 <= c < cols))
    return tuple(found)


def best_captions(
    clip: Embedder,
    crops: Sequence[Image.Image],
    captions: Mapping[int, str],
    around: Sequence[Sequence[int]],
    margin: float,
) -> dict[int, Choice]:
    """For each view of `captions`, its own caption, or a neighbour's that fits more than `margin` better.

    crops: those of all views. captions: view -> caption, for the views that may give a caption to a neighbour or take
    one. around: the `neighbours` of every view. Of neighbours whose captions fit equally well, the first in `around` is
    taken.
    """
    if not captions:
        return {}
    texts = list(dict.fromkeys(captions.values()))
    column = {view: texts.index(text) for view, text in captions.items()}
    seen, read = _unit(clip.image_embeddings, crops), _unit(clip.text_embeddings, texts)
    score = 100 * np.maximum(seen @ read.T, 0)  # [views, texts]
    chosen = {}
    for view, own in column.items():
        beside = list(around[view])
        fit = (score[view] + score[beside].mean(axis=0)) / 2 if beside else score[view]
        givers = [other for other in beside if other in column]
        best = max(givers, key=lambda other: fit[column[other]], default=view)
        if not fit[column[best]] - fit[own] > margin:
            best = view
        chosen[view] = Choice(best, float(fit[column[best]]))
    return chosen


def _unit(embed: Any, items: Sequence[Any]) -> NDArray[np.float64]:
    """Embeddings [N, D] scaled to unit length, computed in batches. An embedding of zeros stays zeros."""
    parts = [embed(items[start : start + BATCH]) for start in range(0, len(items), BATCH)]
    values = np.concatenate(parts).astype(np.float64)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(length > 0, length, 1)
