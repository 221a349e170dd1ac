"""Circular padding: convolutions that read on at the opposite border, so that an image continues there.

A network whose convolutions are all circular, and whose attention knows no places, draws an image without a border: a
shift of its input by whole cells of its deepest level shifts its output. This module does not deal with transformers,
which know the place of each token.

Invariants:
- Without wrapped axes nothing is changed. All layers are restored at the end, also after an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from resmaster_stages.config.wrap import Axes
from resmaster_stages.diffusion.patches import replaced_forwards
from resmaster_stages.models.bases.base import network_of


def _wrapping(conv: Any, wraps: Axes) -> Callable[[Tensor], Tensor]:
    """`conv` with the padding of the axes that wrap taken from the opposite border."""
    padding = [int(side) for side in conv.padding]
    rows, cols = (side if wrapped else 0 for side, wrapped in zip(padding, wraps))
    own = [0 if wrapped else side for side, wrapped in zip(padding, wraps)]

    def forward(x: Tensor) -> Tensor:
        padded = F.pad(x, (cols, cols, rows, rows), mode="circular")
        return F.conv2d(padded, conv.weight, conv.bias, conv.stride, own, conv.dilation, conv.groups)

    return forward


@contextmanager
def circular(denoiser: Any, wraps: Axes) -> Iterator[None]:
    """Within the block, the convolutions of `denoiser` (a UNet) pad the axes that wrap from the opposite border."""
    every = network_of(denoiser).named_modules() if any(wraps) else ()
    padded = ((name, each) for name, each in every if isinstance(each, nn.Conv2d) and any(each.padding))
    with replaced_forwards(padded, lambda name, module: _wrapping(module, wraps)):
        yield
