"""FouriScale's layers: convolutions of low-pass filtered features, and attention maps shared between branches.

Dilation alone lets high frequencies alias into the wider taps, so they are removed before the convolution. This module
does not decide which layers are filtered at which steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resmaster_stages.diffusion.convolutions import dilated
from resmaster_stages.diffusion.guidance import TEXT, Branch, DenoiserCall
from resmaster_stages.diffusion.patches import layers_named, replaced_forwards


def mask(length: int, factor: float, weak: bool, floor: float) -> Tensor:
    """Gain of each frequency index 0 ... length // 2 of an axis: [length // 2 + 1], float64.

    The gain is 1 up to the Nyquist frequency of an axis `factor` times shorter, and one index beyond. From there it
    falls linearly to `floor`: within an eighth of the axis, or for the weak filter only at the end of the spectrum.
    """
    half = length // 2
    ramp = (factor - 1) * length // (2 * factor) if weak else max(length // 8, 1)
    index = torch.arange(half + 1, dtype=torch.float64).clamp(max=max(half - 1, 0))
    if ramp == 0:
        return torch.ones_like(index)
    return (1 + (1 - floor) / ramp * (half / factor + 1 - index)).clamp(floor, 1)


@lru_cache(maxsize=512)
def filter_matrix(
    length: int, factor: float, weak: bool, floor: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The filter along an axis of `length` cells as a circulant matrix [length, length], so that y = matrix @ x."""
    response = torch.fft.irfft(mask(length, factor, weak, floor).to(torch.complex128), n=length)
    index = torch.arange(length)
    return response[(index[:, None] - index) % length].to(device=device, dtype=dtype)


@dataclass(frozen=True)
class Filtered:
    """Low-pass filters the features above 1 / `factor` of the Nyquist frequency, then convolves them with taps
    `dilation` cells apart."""

    factor: float
    dilation: int
    weak: bool
    floor: float
    covered: tuple[float, float]
    """Height and width after zero padding, before the filter, as multiples of the features' own height and width."""

    def __call__(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, C', h / stride, w / stride], rounded up."""
        height, width = x.shape[-2:]
        rows, cols = (max(side, round(side * more)) for side, more in zip((height, width), self.covered))
        down, across = (
            filter_matrix(n, max(self.factor / stride, 1.0), self.weak, self.floor, x.device, x.dtype)
            for n, stride in zip((rows, cols), conv.stride)
        )
        padded = F.pad(x, (0, cols - width, 0, rows - height))
        return dilated(conv, (down @ padded @ across.T)[..., :height, :width], self.dilation)


@contextmanager
def shared_attention(unet: Any, call: DenoiserCall, branch: Branch) -> Iterator[None]:
    """Within the block, self-attention of `branch` uses the attention maps of the text branch.

    Queries and keys are the text branch's. Only the values are the branch's own.
    """

    def like_text(plain: Any) -> Any:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = plain(x, *args, **kwargs)
            if branch not in call.branches:
                return y
            rows = list(y.chunk(len(call.branches)))
            rows[call.branches.index(branch)] = rows[call.branches.index(TEXT)]
            return torch.cat(rows)

        return forward

    queries_and_keys = layers_named(unet, ".attn1.to_q", ".attn1.to_k")
    with replaced_forwards(queries_and_keys, lambda name, module: like_text(module.forward)):
        yield
