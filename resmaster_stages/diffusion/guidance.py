"""Guidance rules: which branches the UNet computes for each view at a step, and how to combine their predictions.

A branch is one row of the UNet's batch per view. It has the negative prompt or the view's own prompt. Rules that need
the same text twice (for a weaker or a stronger variant of the network) give the branches different names, and patches
look at the names.

This module does not import torch. Invariant: without guidance (scale 1, no negative conditions) there is one branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from resmaster_stages.models.bases.base import guide

if TYPE_CHECKING:
    from torch import Tensor

    from resmaster_stages.models.schedule import Step


@dataclass(frozen=True)
class Branch:
    """A guidance branch: one row of the batch per view."""

    name: str
    conditional: bool
    """True if the branch reads the view's own conditions, False if it reads the negative conditions."""


NEGATIVE = Branch("negative", False)
TEXT = Branch("text", True)

Branches = tuple[Branch, ...]


class Guidance(Protocol):
    """A guidance rule. `combine` gets one prediction [N, C, h, w] (float32) per branch, in the order of `branches`."""

    def branches(self, step: Step) -> Branches: ...

    def combine(self, outputs: Sequence[Tensor], step: Step) -> Tensor: ...


@dataclass(frozen=True)
class ClassifierFree:
    """negative + scale * (text - negative). With scale 1, and from `stop` on, the conditional branch alone."""

    scale: float
    stop: float = 1.0
    """Fraction of the steps after which guidance ends (Kynkäänniemi et al. 2024: late guidance changes little). The
    steps are fixed beforehand, because a rule that looked at the predictions would wait for the device."""
    mix: Callable[[Tensor, Tensor, float], Tensor] = guide
    """(unconditional, conditional, scale) -> the guided prediction, as `Base.guide` has it."""

    def branches(self, step: Step) -> Branches:
        return (NEGATIVE, TEXT) if self.scale != 1 and step.done < self.stop else (TEXT,)

    def combine(self, outputs: Sequence[Tensor], step: Step) -> Tensor:
        return outputs[0] if len(outputs) == 1 else self.mix(outputs[0], outputs[1], self.scale)


@dataclass(frozen=True)
class ByBand(ClassifierFree):
    """Guidance with `scale` for high frequencies and with the scale `low` for low ones (FreCaS, HiWave).

    With the family's rule g and the linear filter L it is g(scale) + L(g(low) - g(scale)). Where g is plain
    classifier-free guidance, this is each band's own guidance, added up. One branch is enough where both scales are 1.
    """

    low: float = 1.0
    split: Callable[[Tensor], Tensor] = lambda x: x
    """L: the low frequencies of predictions [N, C, h, w]."""

    def branches(self, step: Step) -> Branches:
        return (NEGATIVE, TEXT) if (self.scale != 1 or self.low != 1) and step.done < self.stop else (TEXT,)

    def combine(self, outputs: Sequence[Tensor], step: Step) -> Tensor:
        high = super().combine(outputs, step)
        if len(outputs) == 1:
            return high
        return high + self.split(self.mix(outputs[0], outputs[1], self.low) - high)


@dataclass
class DenoiserCall:
    """The UNet call in progress. The loop writes it before each call, and the patches of the composition read it."""

    step: Step | None = None
    branches: Branches = ()
    items: Tensor | None = None
    """Item numbers [n] of the views in the batch: item = sample * views + view. The batch has their rows branch by
    branch."""
    states: Tensor | None = None
    """The text states of the batch's rows: [rows, 77, D]."""
    texts: Sequence[tuple[Any, Tensor]] = ()
    """For each branch, the `TextEmbeddings` of distinct prompts and the index of each view's prompt [n]. `states` is
    gathered from these."""

    @property
    def index(self) -> int:
        """Number of the step, from 0."""
        assert self.step is not None, "patches act within the denoising loop"
        return self.step.index

    def canvases(self, count: int) -> list[int]:
        """Numbers of the batch's samples, of `count` in all, where every sample is one view: its whole canvas."""
        if count == 1:
            return [0]
        assert self.items is not None, "canvases are predicted within the denoising loop"
        return list(self.items.tolist())  # this waits for the device, so a single sample does without
