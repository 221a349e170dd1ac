"""A method is one or several passes of the denoising loop, each on a canvas of its own size. Imports no torch.

Knows nothing about any method. Invariant: the last pass's canvas is the request's.
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
    """From the previous pass's clean latents [B, C, h, w] (None at first), the pass's noise and its first step to the
    latents [B, C, H, W] that it starts from and what it is made of."""


@dataclass(frozen=True, eq=False)
class Pass:
    """One run of the loop."""

    height: int
    """Of the canvas, in latents."""
    width: int
    begin: Begin
    first: int = 0
    """Number of the first step; those before it are left out."""
    finish: Callable[[Tensor], Tensor] = lambda z: z
    """What is done to the clean latents [B, C, H, W] at the end."""


def from_noise(request: Request, compose: Callable[[Request], Composition], first: int | None) -> Pass:
    """The pass on the request's canvas, from noise; or, with a number of the `first` step, from the noised
    reference."""

    def begin(previous: Tensor | None, noise: CanvasNoise, step: Step) -> tuple[Tensor, Composition]:
        composition, z = compose(request), noise()
        if first is None:
            return z, composition
        if request.reference is None:
            raise ConfigError("init noised_lr starts from a low-res image, and there is none; use init noise")
        return step.noised(request.reference.latents, z), composition

    return Pass(*request.canvas_size, begin, first or 0)


def first_step(fraction: float, steps: int) -> int:
    """Number of the step at `fraction` of the path; at least one step is left."""
    return min(int(fraction * steps), steps - 1)


def phase_scales(scale: float, phases: str, refine: bool) -> tuple[float, ...]:
    """Size of each phase over the low-res image: 2, 3, ... up to `scale` (every), 2, 4, ... (doubling), or `scale`.

    A `scale` between two such sizes takes the place of the nearer one.
    """
    scales = [1.0] if refine else []
    if phases == "every":
        scales += [float(k) for k in range(2, round(scale))]
    elif phases == "doubling":
        scales += [2.0**k for k in range(1, 7) if 1.5 * 2**k <= scale]
    return tuple(dict.fromkeys([*scales, scale]))


def phase_sizes(height: int, width: int, scales: Sequence[float]) -> tuple[tuple[float, int, int], ...]:
    """(scale, rows, columns) of each phase's canvas; the last one has `height` x `width` latents."""
    last = scales[-1]
    return tuple((scale, max(1, round(height * scale / last)), max(1, round(width * scale / last))) for scale in scales)
