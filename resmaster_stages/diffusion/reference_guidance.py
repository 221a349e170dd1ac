"""Hooks that keep a canvas close to a reference while it is denoised.

They are pure functions of latents and do not use a model. All tensors are [B, C, H, W], float32. Samples do not
influence one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import acos, pi

from torch import Tensor

from resmaster_stages.config.structure import StructureConfig
from resmaster_stages.config.wrap import Axes
from resmaster_stages.diffusion.frequency import LowPass, box, low_pass_of, swap_low_frequencies, swap_weights
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


def noise_gone(step: Step) -> float:
    """1 - t / T, from 0 at t = T to 1 at t = 0. On a flow path, t is that of the decay (`Step.cosine`)."""
    return acos(2 * step.cosine - 1) / pi


def low_residual(
    x0: Tensor, noise: Tensor, cutoff: float = 0.5, weight: Callable[[Step], float] = noise_gone
) -> LatentHook:
    """The hook z <- z + weight * low((x0 noised by `noise`) - z): a skip residual of low frequencies (FAM Diffusion).

    The band ends at `cutoff` (1 - t / T) of the Nyquist frequency along both axes. From 1 on it has all frequencies,
    and the hook is `skip_residual` with another weight.
    """

    def pull(z: Tensor, step: Step) -> Tensor:
        share, end, followed = weight(step), cutoff * noise_gone(step), step.noised(x0, noise)
        return (1 - share) * z + share * followed if end >= 1 else z + share * box(followed - z, end)

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


def fading_guidance(reference: Tensor, low: LowPass, weight: float, first: Step) -> X0Hook:
    """The hook that pulls the low frequencies of x0 to those of `reference` [B, C, H, W]: by `weight` at the step
    `first`, and less and less as the share of noise in the latents falls (ScaleDiff).

    The share of noise is 1 - abar on a variance-preserving path, and the same at the same noise level on any other.
    """

    def share(step: Step) -> float:
        return step.sigma**2 / (step.alpha**2 + step.sigma**2)

    def pull(x0: Tensor, step: Step) -> Tensor:
        return swap_low_frequencies(x0, reference, low, weight * share(step) / share(first))

    return pull
