"""Holding a canvas that is being denoised to a picture that it shall resemble: pure functions of latents.

Knows nothing about models or methods. All tensors are [B, C, H, W], float32; samples do not touch one another.
"""

from __future__ import annotations

from torch import Tensor

from resmaster_stages.diffusion.loop import LatentHook
from resmaster_stages.diffusion.schedule import Step


def skip_residual(x0: Tensor, noise: Tensor, exponent: float) -> LatentHook:
    """z <- (1 - c) z + c (x0 noised by `noise`), c = cosine ** exponent; all [B, C, H, W]."""

    def pull(z: Tensor, step: Step) -> Tensor:
        weight = step.cosine**exponent
        return (1 - weight) * z + weight * step.noised(x0, noise)

    return pull


def match_moments(z: Tensor, like: Tensor) -> Tensor:
    """`z` [B, C, H, W] with the mean and standard deviation of `like` [B, C, h, w], over all elements of each sample."""
    dims = (1, 2, 3)
    mean, std = z.mean(dims, keepdim=True), z.std(dims, keepdim=True)
    return (z - mean) / std * like.std(dims, keepdim=True) + like.mean(dims, keepdim=True)
