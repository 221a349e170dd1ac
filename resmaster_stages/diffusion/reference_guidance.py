"""Hooks that keep a canvas close to a reference while it is denoised.

They are pure functions of latents and do not use a model. All tensors are [B, C, H, W], float32. Samples do not
influence one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from resmaster_stages.config.structure import StructureConfig
from resmaster_stages.config.wrap import Axes
from resmaster_stages.diffusion.frequency import low_pass_of, swap_low_frequencies, swap_weights
from resmaster_stages.diffusion.loop import LatentHook, X0Hook
from resmaster_stages.models.schedule import Step


def skip_residual(x0: Tensor, noise: Tensor, exponent: float | Tensor) -> LatentHook:
    """The hook z <- (1 - c) z + c (x0 noised by `noise`) with c = cosine ** exponent; all [B, C, H, W].

    exponent: one number for the whole canvas, or one per place [B or 1, 1, H, W].
    """

    def pull(z: Tensor, step: Step) -> Tensor:
        weight = step.cosine**exponent
        return (1 - weight) * z + weight * step.noised(x0, noise)

    return pull


def match_moments(z: Tensor, like: Tensor) -> Tensor:
    """`z` [B, C, H, W] with the mean and standard deviation of `like` [B, C, h, w], taken over all elements of each
    sample."""
    dims = (1, 2, 3)
    mean, std = z.mean(dims, keepdim=True), z.std(dims, keepdim=True)
    return (z - mean) / std * like.std(dims, keepdim=True) + like.mean(dims, keepdim=True)


def structural_guidance(
    anchor: Callable[[Step], Tensor],
    config: StructureConfig,
    scale: float,
    course: Sequence[float],
    wraps: Axes = (False, False),
) -> X0Hook:
    """The hook that replaces the low frequencies of x0 by those of `anchor` [B, C, H, W] of the step.

    scale: how many times the low-res image was enlarged to give the anchor. course: `Step.done` of each step. wraps:
    whether the canvas continues at the opposite border, along its height and along its width.
    """
    low, weights = low_pass_of(config, scale, wraps), swap_weights(config, course)

    def swap(x0: Tensor, step: Step) -> Tensor:
        weight = weights[step.index]
        return swap_low_frequencies(x0, anchor(step), low, weight) if weight else x0

    return swap
