"""One level of a discrete wavelet transform, as PyWavelets computes it in mode `symmetric`.

Along an axis of n values, with a filter h of 8 taps:

    a[k] = sum over j of h[j] x[2k + 1 - j],   k = 0 ... (n + 7) // 2 - 1

Values before and behind the axis are those of its mirror, border values included. In two dimensions, rows are
transformed and then columns. The filters are those of PyWavelets (and of Daubechies, 1992, Tables 6.1 and 6.3):

- db4: the Daubechies wavelet with four vanishing moments (DiffuseHigh);
- sym4: the least asymmetric one with the same moments (HiWave).

Invariants:
- `inverse(transform(x))` is `x`, for any size, up to rounding.
- A constant has no part in the high bands.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Name = Literal["db4", "sym4"]

LOW: dict[Name, tuple[float, ...]] = {
    "db4": (
        -0.010597401785069032,
        0.0328830116668852,
        0.030841381835560764,
        -0.18703481171909309,
        -0.027983769416859854,
        0.6308807679298589,
        0.7148465705529157,
        0.2303778133088965,
    ),
    "sym4": (
        -0.07576571478927333,
        -0.02963552764599851,
        0.49761866763201545,
        0.8037387518059161,
        0.29785779560527736,
        -0.09921954357684722,
        -0.012603967262037833,
        0.0322231006040427,
    ),
}
"""The taps h of the low-pass filters."""
TAPS = 8


def high_taps(low: tuple[float, ...]) -> tuple[float, ...]:
    """The taps of the high-pass filter beside the low-pass filter `low`: reversed, and every other one negated."""
    return tuple(tap if place % 2 else -tap for place, tap in enumerate(reversed(low)))


@lru_cache(maxsize=16)
def _filters(wavelet: Name, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Both filters as convolutions read them, reversed: [low and high, TAPS]. Kept, because uploading them at every
    step would make the device wait."""
    low = LOW[wavelet]
    return torch.tensor([low[::-1], high_taps(low)[::-1]], dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _mirrored(length: int, device: torch.device) -> Tensor:
    """The place in an axis of `length` values of each value of the axis continued by its mirror: [n], long."""
    count = (length + TAPS - 1) // 2
    place = torch.arange(-(TAPS - 2), 2 * count) % (2 * length)
    return torch.minimum(place, 2 * length - 1 - place).to(device)


def _split(x: Tensor, wavelet: Name, dim: int) -> tuple[Tensor, Tensor]:
    """The low and the high band of `x` [B, C, H, W] along `dim` (2 or 3)."""
    filters, channels = _filters(wavelet, x.device, x.dtype), x.shape[1]
    long = x.index_select(dim, _mirrored(x.shape[dim], x.device))
    shape, stride = ((2, 1, TAPS, 1), (2, 1)) if dim == 2 else ((2, 1, 1, TAPS), (1, 2))
    bands = F.conv2d(long, filters.view(shape).repeat(channels, 1, 1, 1), stride=stride, groups=channels)
    low, high = bands.unflatten(1, (channels, 2)).unbind(2)
    return low, high


def _join(low: Tensor, high: Tensor, wavelet: Name, dim: int, length: int) -> Tensor:
    """The inverse of `_split`, for an axis of `length` values."""
    filters, channels = _filters(wavelet, low.device, low.dtype), low.shape[1]
    shape, stride = ((2, 1, TAPS, 1), (2, 1)) if dim == 2 else ((2, 1, 1, TAPS), (1, 2))
    bands = torch.stack([low, high], dim=2).flatten(1, 2)
    long = F.conv_transpose2d(bands, filters.view(shape).repeat(channels, 1, 1, 1), stride=stride, groups=channels)
    return long.narrow(dim, TAPS - 2, length)


@dataclass(frozen=True)
class Bands:
    """The four bands of a canvas [B, C, H, W], each [B, C, (H + 7) // 2, (W + 7) // 2]. The first letter of a name is
    the band along columns, the second along rows: l is low, h is high."""

    ll: Tensor
    lh: Tensor
    hl: Tensor
    hh: Tensor
    size: tuple[int, int]
    """(height, width) of the canvas."""


def transform(x: Tensor, wavelet: Name) -> Bands:
    """The bands of `x` [B, C, H, W]."""
    low, high = _split(x, wavelet, 3)
    ll, hl = _split(low, wavelet, 2)
    lh, hh = _split(high, wavelet, 2)
    return Bands(ll, lh, hl, hh, (x.shape[2], x.shape[3]))


def inverse(bands: Bands, wavelet: Name) -> Tensor:
    """The canvas [B, C, H, W] that has the bands."""
    height, width = bands.size
    low = _join(bands.ll, bands.hl, wavelet, 2, height)
    high = _join(bands.lh, bands.hh, wavelet, 2, height)
    return _join(low, high, wavelet, 3, width)


def low_band(x: Tensor, wavelet: Name) -> Tensor:
    """What the band `ll` alone gives of `x`: [B, C, H, W]."""
    ll = transform(x, wavelet).ll
    nothing = torch.zeros_like(ll)
    return inverse(Bands(ll, nothing, nothing, nothing, (x.shape[2], x.shape[3])), wavelet)
