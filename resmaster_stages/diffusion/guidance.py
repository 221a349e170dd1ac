"""Guidance rules: which branches the UNet computes for every view at a step, and how their predictions become one.

A branch is one row of the UNet's batch per view: with the negative prompt or with the view's own. Rules that need the
same text twice (a weaker or a stronger variant of the network) name the branches apart; patches go by the names.

Knows nothing about the network, and imports no torch. Invariant: without guidance (scale 1, no negative conditions)
there is one branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from resmaster_stages.models.schedule import Step


@dataclass(frozen=True)
class Branch:
    """One row of the batch per view."""

    name: str
    conditional: bool
    """Whether it reads the view's own conditions, or the negative ones."""


NEGATIVE = Branch("negative", False)
TEXT = Branch("text", True)

Branches = tuple[Branch, ...]


class Guidance(Protocol):
    """A rule. `combine` gets one prediction [N, C, h, w] (float32) per branch, in the order of `branches`."""

    def branches(self, step: Step) -> Branches: ...

    def combine(self, outputs: Sequence[Tensor], step: Step) -> Tensor: ...


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance."""
    return unconditional + scale * (conditional - unconditional)


@dataclass(frozen=True)
class ClassifierFree:
    """negative + scale * (text - negative); the conditional branch alone where the scale is 1, and from `stop` on."""

    scale: float
    stop: float = 1.0
    """Fraction of the steps after which guidance ends (Kynkäänniemi et al. 2024: late guidance changes little). Steps
    are fixed beforehand: a rule that looked at the predictions would wait for the device."""

    def branches(self, step: Step) -> Branches:
        return (NEGATIVE, TEXT) if self.scale != 1 and step.done < self.stop else (TEXT,)

    def combine(self, outputs: Sequence[Tensor], step: Step) -> Tensor:
        return outputs[0] if len(outputs) == 1 else guide(outputs[0], outputs[1], self.scale)


@dataclass
class DenoiserCall:
    """What the UNet is computing: written by the loop before each call, read by the patches of one composition."""

    step: Step | None = None
    branches: Branches = ()
    items: Tensor | None = None
    """Numbers [n] of the views in the batch, which has their rows branch by branch: item = sample * views + view."""
    states: Tensor | None = None
    """What the batch's rows hear: [rows, 77, D]."""
    texts: Sequence[tuple[Any, Tensor]] = ()
    """Per branch, the `TextEmbeddings` of distinct prompts and which of them each view uses [n]: `states` is made of
    these."""

    @property
    def index(self) -> int:
        """Number of the step, from 0."""
        assert self.step is not None, "patches act within the denoising loop"
        return self.step.index
