"""Passes: a method runs the denoising loop once or several times, each time on a canvas of its own size.

This module does not import torch. Invariant: the canvas of the last pass has the size of the request's canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resmaster_stages.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from resmaster_stages.diffusion.loop import CanvasNoise, Composition
    from resmaster_stages.methods.request import Request
    from resmaster_stages.models.schedule import Step

    Begin = Callable[[Tensor | None, CanvasNoise, Step], tuple[Tensor, Composition]]
    """(the previous pass's clean latents [B, C, h, w], or None; the pass's noise; the pass's first step) -> (the
    latents [B, C, H, W] that the pass starts from; its composition)."""


@dataclass(frozen=True, eq=False)
class Pass:
    """One run of the denoising loop."""

    height: int
    """Height of the canvas, in latents."""
    width: int
    begin: Begin
    first: int = 0
    """Index of the first step. The steps before it are left out."""
    finish: Callable[[Tensor], Tensor] = lambda z: z
    """Applied to the clean latents [B, C, H, W] at the end."""
    path: tuple[Step, ...] | None = None
    """Steps of the pass's own, of which the first `first` are left out. None: those of the request.

    A last step that ends at alpha = 1 hands over x0 from the middle of a path. A step from alpha = 1 to a noise level
    under `ddim_keep` inverts: it adds the noise that the model predicts.
    """


def from_noise(request: Request, compose: Callable[[Request], Composition], first: int | None) -> Pass:
    """The pass on the request's canvas that starts from noise or, if `first` is the index of a step, from the reference
    noised for that step."""

    def begin(previous: Tensor | None, noise: CanvasNoise, step: Step) -> tuple[Tensor, Composition]:
        composition, z = compose(request), noise()
        if first is None:
            return step.pure(z), composition
        if request.reference is None:
            raise ConfigError("init noised_lr starts from a low-res image, and there is none; use init noise")
        return step.noised(request.roughened(request.followed, noise), z), composition

    return Pass(*request.canvas_size, begin, first or 0)


def phase_scales(scale: float, phases: str, refine: bool) -> tuple[float, ...]:
    """Scale of each phase relative to the low-res image: 2, 3, ... (every), 2, 4, ... (doubling), from 2.5x on the size
    halfway (halfway) or none of these (last), and finally `scale`.

    A `scale` that lies between two such scales replaces the nearer one. `refine` adds a first phase at scale 1.
    """
    scales = [1.0] if refine else []
    if phases == "every":
        scales += [float(k) for k in range(2, round(scale))]
    elif phases == "doubling":
        scales += [2.0**k for k in range(1, 7) if 1.5 * 2**k <= scale]
    elif phases == "halfway" and scale >= 2.5:
        scales += [(1 + scale) / 2]
    return tuple(dict.fromkeys([*scales, scale]))


def phase_sizes(height: int, width: int, scales: Sequence[float], multiple: int) -> tuple[tuple[float, int, int], ...]:
    """(scale, rows, columns) of each phase's canvas, in latents: multiples of `multiple`. The last canvas has `height`
    x `width` latents."""

    def side(length: int, scale: float) -> int:
        return max(1, round(length * scale / scales[-1] / multiple)) * multiple

    return tuple((scale, side(height, scale), side(width, scale)) for scale in scales)
