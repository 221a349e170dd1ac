"""A method is one or several stages: passes of the denoising loop, each on a canvas of its own size.

Knows nothing about any method. Invariant: the last stage's canvas is the request's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from resmaster_stages.diffusion.loop import CanvasNoise, Composition
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.request import Request
from resmaster_stages.models.schedule import Step

Begin = Callable[[Tensor | None, CanvasNoise, Step], tuple[Tensor, Composition]]
"""From the previous stage's clean latents [B, C, h, w] (None at first), the stage's noise and its first step to the
latents [B, C, H, W] that it starts from and what it is made of."""


@dataclass(frozen=True, eq=False)
class Stage:
    """One pass of the loop."""

    height: int
    """Of the canvas, in latents."""
    width: int
    begin: Begin
    first: int = 0
    """Number of the first step; those before it are left out."""
    finish: Callable[[Tensor], Tensor] = lambda z: z
    """What is done to the clean latents [B, C, H, W] at the end."""


def single(compose: Callable[[Request], Composition]) -> Callable[[Request], tuple[Stage, ...]]:
    """A method of one stage, from noise or, with `init: noised_lr`, from the noised reference."""

    def stages(request: Request) -> tuple[Stage, ...]:
        def begin(previous: Tensor | None, noise: CanvasNoise, step: Step) -> tuple[Tensor, Composition]:
            composition, z = compose(request), noise()
            if request.config.init == "noise":
                return z, composition
            if request.reference is None:
                raise ConfigError("init noised_lr starts from a low-res picture, and there is none; use init noise")
            return step.noised(request.reference.latents, z), composition

        return (Stage(*request.canvas_size, begin, first_step(request.config.start, request.config.steps)),)

    return stages


def first_step(fraction: float, steps: int) -> int:
    """Number of the step at `fraction` of the path; at least one step is left."""
    return min(int(fraction * steps), steps - 1)


def phase_scales(scale: float, phases: str, refine: bool) -> tuple[float, ...]:
    """Size of each phase over the low-res picture: 2, 3, ... up to `scale` (every), 2, 4, ... (doubling), or `scale`.

    A `scale` between two such sizes takes the place of the nearer one.
    """
    scales = [1.0] if refine else []
    if phases == "every":
        scales += [float(k) for k in range(2, round(scale))]
    elif phases == "doubling":
        scales += [2.0**k for k in range(1, 7) if 1.5 * 2**k <= scale]
    return tuple(dict.fromkeys([*scales, scale]))
