"""Dispersed convolution (ScaleCrafter): 3 x 3 kernels are spread to dense 5 x 5 kernels.

A 5 x 5 kernel reaches as far as a 3 x 3 kernel dilated by two. It is `R` times the 3 x 3 kernel. R [25, 9] is the
least-squares solution of two sets of equations over all 3 x 3 inputs x (zeros beyond the border):
- structure: conv(enlarged(x), k5) = enlarged(conv(x, k3)), where `enlarged` is bilinear from 3 x 3 to 5 x 5, corners
  aligned;
- pixel, weighted: conv(x, k5) = conv(x, k3).

The equations are linear in the kernels and in x, so one equation per output cell and input cell is enough. All of this
is the authors', with the weight 0.05 and supports of 3 x 3. Their programs ship the resulting matrix.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

SMALL, LARGE = 3, 5


def _shifts(side: int, kernel: int) -> np.ndarray:
    """M [side^2 outputs, kernel^2 taps, side^2 inputs], so that conv(x, k) = (k @ M) @ x for `side` x `side` inputs
    x."""
    reach = kernel // 2
    taps = np.zeros((side, side, kernel, kernel, side, side))
    for y in range(side):
        for x in range(side):
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    if 0 <= y + dy < side and 0 <= x + dx < side:
                        taps[y, x, dy + reach, dx + reach, y + dy, x + dx] = 1
    return taps.reshape(side**2, kernel**2, side**2)


def _enlarging(side: int) -> np.ndarray:
    """Matrix of bilinear enlargement, [(2 side - 1)^2, side^2]. Corners are aligned, so every other output cell is an
    input cell."""
    line = np.zeros((2 * side - 1, side))
    for place in range(2 * side - 1):
        line[place, place // 2] += 0.5
        line[place, (place + 1) // 2] += 0.5
    return np.kron(line, line)


@lru_cache(maxsize=4)
def dispersion_matrix(pixel_weight: float = 0.05) -> np.ndarray:
    """R [25, 9], float64, row-major taps: 5 x 5 kernel = R @ 3 x 3 kernel."""
    up, small = _enlarging(SMALL), _shifts(SMALL, SMALL)
    # [outputs, taps, inputs] of both sides of either set; one equation per (output, input)
    structure = np.einsum("oti,ij->otj", _shifts(LARGE, LARGE), up), np.einsum("po,oti->pti", up, small)
    pixel = _shifts(SMALL, LARGE), small
    left, right = (
        np.concatenate([each.transpose(0, 2, 1).reshape(-1, each.shape[1]) * weight for each, weight in both])
        for both in zip(
            *([(part, weight) for part in pair] for pair, weight in ((structure, 1.0), (pixel, pixel_weight)))
        )
    )
    return np.linalg.lstsq(left, right, rcond=None)[0]


def dispersed_weight(weight: Tensor) -> Tensor:
    """3 x 3 kernels [C', C, 3, 3] spread to 5 x 5 kernels [C', C, 5, 5], computed in float64."""
    matrix = torch.from_numpy(dispersion_matrix()).to(weight.device)
    return (weight.double().flatten(2) @ matrix.T).unflatten(2, (LARGE, LARGE)).to(weight.dtype)
