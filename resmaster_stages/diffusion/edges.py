"""Canny's edge detector (Canny 1986), as ControlNets for edges and region-wise noise use it.

The gradient is Sobel's with 3 x 3 taps and its size |gx| + |gy|, as in OpenCV's default, so thresholds mean the same:
ControlNets are trained with edges between 100 and 200.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue."""


def canny(pixels: Tensor, low: float = 100.0, high: float = 200.0) -> Tensor:
    """Edges of images [B, 3, H, W] in [-1, 1]: [B, 1, H, W], 1 on edges and 0 elsewhere, float32, on the CPU.

    low, high: sizes of the gradient of 8-bit grey values. An edge is a ridge of the gradient above `low` that is
    connected to a place above `high`.
    """
    levels = ((pixels.float().cpu().clamp(-1, 1) + 1) * 127.5).round()
    grey = (levels * torch.tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True).round()
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    gx, gy = F.conv2d(padded, torch.stack([across, across.T])[:, None]).split(1, dim=1)
    size = gx.abs() + gy.abs()
    ridge = size * _is_ridge(gx, gy, size)
    return torch.stack([_connected(each[0].numpy(), low, high) for each in ridge])[:, None]


def edge_density(pixels: Tensor, height: int, width: int) -> Tensor:
    """How dense the edges of images [B, 3, H, W] in [-1, 1] are: [B, 1, height, width], float32, on the CPU, from 0
    where an image has the fewest to 1 where it has the most. 0 everywhere if they are spread evenly, as in an image of
    one colour.

    All gradients that are connected to one of 255 count (LSRNA).
    """
    density = F.adaptive_avg_pool2d(canny(pixels, 0.0, 255.0), (height, width))
    least, most = density.amin((1, 2, 3), keepdim=True), density.amax((1, 2, 3), keepdim=True)
    return (density - least) / (most - least).masked_fill(most == least, 1.0)


def _is_ridge(gx: Tensor, gy: Tensor, size: Tensor) -> Tensor:
    """Where `size` is greatest across the edge, of the two neighbours in the direction of the gradient (one of four).

    Of two equal neighbours one is kept.
    """
    around = F.pad(size, (1, 1, 1, 1))
    height, width = size.shape[-2:]

    def at(dy: int, dx: int) -> Tensor:
        return around[..., 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    flat, steep = gy.abs() < gx.abs() * 0.41421356, gy.abs() > gx.abs() * 2.41421356  # tan of 22.5 and 67.5 degrees
    falling = (gx * gy) > 0
    before = torch.where(flat, at(0, -1), torch.where(steep, at(-1, 0), torch.where(falling, at(-1, -1), at(-1, 1))))
    after = torch.where(flat, at(0, 1), torch.where(steep, at(1, 0), torch.where(falling, at(1, 1), at(1, -1))))
    return (size > before) & (size >= after)


def _connected(ridge: np.ndarray, low: float, high: float) -> Tensor:
    """The ridges [H, W] above `low` that touch a place above `high`, also by corners, as 1 and 0."""
    padded = np.pad(ridge, 1)
    reached = padded > high
    left, newest = (~reached & (padded > low)).ravel(), np.flatnonzero(reached)
    around = [down * padded.shape[1] + across for down in (-1, 0, 1) for across in (-1, 0, 1)]
    while len(newest):
        found = []
        for step in around:
            near = newest + step
            found.append(near[left[near]])
            left[found[-1]] = False
        newest = np.concatenate(found)
        reached.ravel()[newest] = True
    return torch.from_numpy(reached[1:-1, 1:-1].astype(np.float32))
