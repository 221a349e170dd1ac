"""Structural guidance (ResMaster eq. 5 and 6): the low frequencies of x0 are taken from the reference.

The swap is linear, so IFFT(G FFT(ref) + (1 - G) FFT(x0)) = x0 + G * (ref - x0): one low-pass of the difference. Three
filters G are known, with frequencies in units of the Nyquist frequency. None of them wraps around at the borders,
unless the canvas itself does.

- gaussian (FreeInit's): exp(-|f|^2 / (2 sigma_f^2)). It is separable, so it is two one-dimensional convolutions, with
  reflect padding.
- butterworth (HiFlow's): 1 / (1 + (|f| / cutoff)^8). It is not separable and its impulse response is long, so it is a
  product in the cosine domain, which is two matrix products there and two back. That is the Fourier form on a canvas
  that is mirrored at its borders. Along an axis that wraps, cosines and sines of whole periods take the place of these
  cosines, which is the Fourier form of the canvas itself.
- haar (I-Max's): the low band of a Haar wavelet of level 1, which is the means of 2 x 2 latents. Its blocks do not
  overlap, so borders do not matter. At an odd border a block is cut.

For skip residuals there is `box` (FAM Diffusion's), which ends sharply along each axis, in the same cosine domain.

The tests compare each with its closed form. This module does not deal with models. Of the steps it uses only how far
each of them is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from math import ceil, cos, pi

import torch
import torch.nn.functional as F
from torch import Tensor

from resmaster_stages.config.structure import StructureConfig
from resmaster_stages.config.wrap import Axes
from resmaster_stages.models.schedule import even_course

LowPass = Callable[[Tensor], Tensor]
"""A low-pass filter of canvases [B, C, H, W]."""

_RADIUS = 32
"""Longest kernel radius in cells. Kernels are cut where their values fall below a millionth of the peak."""


@lru_cache(maxsize=16)
def low_pass_kernel(sigma_f: float) -> tuple[float, ...]:
    """Impulse response of the filter along one axis, odd length, sum 1.

    h(n) = integral of exp(-f^2 / (2 sigma_f^2)) cos(pi f n) over 0 <= f <= 1 is the sampled filter's exact response.
    Unless sigma_f is large, it is a Gaussian of standard deviation 1 / (pi sigma_f) cells.
    """
    frequency = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    response = torch.exp(-(frequency**2) / (2 * sigma_f**2))
    offsets = torch.arange(_RADIUS + 1, dtype=torch.float64)
    half = (response * torch.cos(torch.pi * frequency * offsets[:, None])).mean(dim=1)  # [radius + 1]
    radius = int((half.abs() > 1e-6 * half[0]).nonzero().max())
    kernel = torch.cat([half[1 : radius + 1].flip(0), half[: radius + 1]])
    return tuple((kernel / kernel.sum()).tolist())


@lru_cache(maxsize=16)
def _kernel_on(device: torch.device, dtype: torch.dtype, sigma_f: float) -> Tensor:
    """The kernel on `device`, kept there because uploading it at every step would make the device wait."""
    return torch.tensor(low_pass_kernel(sigma_f), dtype=dtype, device=device)


def _blur_axis(x: Tensor, sigma_f: float, dim: int, wraps: bool) -> Tensor:
    kernel = _kernel_on(x.device, x.dtype, sigma_f)
    radius = min(len(kernel) // 2, x.shape[dim] - 1)  # reflect padding must be shorter than the axis
    middle = len(kernel) // 2
    kernel = kernel[middle - radius : middle + radius + 1]
    kernel = kernel / kernel.sum()
    channels, mode = x.shape[1], "circular" if wraps else "reflect"
    if dim == 2:
        padded = F.pad(x, (0, 0, radius, radius), mode=mode)
        return F.conv2d(padded, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    padded = F.pad(x, (radius, radius, 0, 0), mode=mode)
    return F.conv2d(padded, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def low_pass(x: Tensor, sigma_f: float, wraps: Axes = (False, False)) -> Tensor:
    """`x` [B, C, H, W] through the Gaussian low-pass of standard deviation `sigma_f` (Nyquist = 1), with circular
    padding along axes that wrap, and reflect padding along others."""
    return _blur_axis(_blur_axis(x, sigma_f, 2, wraps[0]), sigma_f, 3, wraps[1])


def block_means(x: Tensor) -> Tensor:
    """`x` [B, C, H, W] with every block of 2 x 2 replaced by its mean: the low band of a Haar wavelet, level 1.

    If a side is odd, its last blocks are cut, and have the mean of what is left of them.
    """
    height, width = x.shape[-2:]
    means = F.avg_pool2d(x, 2, ceil_mode=True)
    return means.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[..., :height, :width]


def resampled(x: Tensor, fraction: float) -> Tensor:
    """`x` [B, C, H, W] bilinearly reduced to `fraction` of its sides, antialiased, and enlarged again: ScaleDiff's
    low-pass. The reduced sides are rounded down, and are at least one cell."""
    size = x.shape[-2:]
    small = [max(1, int(side * fraction)) for side in size]
    x = F.interpolate(x, size=small, mode="bilinear", align_corners=False, antialias=True)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


_ORDER = 4
"""HiFlow's order of the Butterworth filter."""


@lru_cache(maxsize=16)
def _waves(length: int, wraps: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """An orthonormal transform [frequency, place] of `length` values; its transpose is its inverse. `_frequencies` has
    the frequency of each row.

    It is the cosine transform (DCT-II) or, on an axis that wraps, the real Fourier transform: cosines and sines of
    whole periods in turn.
    """
    place = torch.arange(length, dtype=torch.float64)
    if wraps:
        periods = (place + 1).div(2, rounding_mode="floor")  # 0, 1, 1, 2, 2, ...
        angle = 2 * torch.pi / length * periods[:, None] * place
        waves = torch.where(place[:, None] % 2 == 1, torch.cos(angle), torch.sin(angle))
        waves[0] = 1
        return (waves / waves.norm(dim=1, keepdim=True)).to(device, dtype)
    rows = torch.cos(torch.pi / length * (place + 0.5) * place[:, None]) * (2 / length) ** 0.5
    rows[0] /= 2**0.5
    return rows.to(device, dtype)


def _frequencies(length: int, wraps: bool) -> Tensor:
    """The frequency of each row of `_waves` (Nyquist = 1): [length], float64."""
    row = torch.arange(length, dtype=torch.float64)
    return (2 * (row + 1).div(2, rounding_mode="floor") if wraps else row) / length


@lru_cache(maxsize=16)
def _butterworth_gain(
    size: tuple[int, int], wraps: Axes, cutoff: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Gain of the filter [height, width] at the frequencies of `_waves`. size: (height, width)."""
    y, x = (_frequencies(length, wrapped) for length, wrapped in zip(size, wraps))
    squared = (y[:, None] ** 2 + x**2) / cutoff**2
    return (1 / (1 + squared**_ORDER)).to(device, dtype)


def butterworth(x: Tensor, cutoff: float, wraps: Axes = (False, False)) -> Tensor:
    """`x` [B, C, H, W] through a Butterworth low-pass of order 4 that halves the frequency `cutoff` (Nyquist = 1), with
    mirrored borders where the axis does not wrap."""
    height, width = x.shape[-2:]
    down, across = (_waves(length, wrapped, x.device, x.dtype) for length, wrapped in zip((height, width), wraps))
    spectrum = down @ x @ across.T
    return down.T @ (spectrum * _butterworth_gain((height, width), wraps, cutoff, x.device, x.dtype)) @ across


def box(x: Tensor, cutoff: float) -> Tensor:
    """`x` [B, C, H, W] without the frequencies from `cutoff` (Nyquist = 1) on along either axis, with mirrored borders.

    The mean always stays.
    """
    for dim in (2, 3):
        waves = _waves(x.shape[dim], False, x.device, x.dtype)[: max(1, ceil(cutoff * x.shape[dim]))]
        x = waves.T @ (waves @ x) if dim == 2 else (x @ waves.T) @ waves
    return x


def low_pass_of(config: StructureConfig, scale: float, wraps: Axes = (False, False)) -> LowPass:
    """The filter that the configuration names, for a reference enlarged `scale` times."""
    if config.filter == "haar":
        return block_means
    cutoff = canvas_cutoff(config, scale)
    if config.filter == "butterworth":
        return partial(butterworth, cutoff=cutoff, wraps=wraps)
    return partial(low_pass, sigma_f=cutoff, wraps=wraps)


def swap_low_frequencies(x0: Tensor, reference: Tensor, low: LowPass, weight: float = 1.0) -> Tensor:
    """x0 with its low frequencies (times `weight`) replaced by those of `reference`; all [B, C, H, W]."""
    return x0 + weight * low(reference - x0)


def canvas_cutoff(config: StructureConfig, scale: float) -> float:
    """The cutoff in units of the canvas's Nyquist frequency, for a reference enlarged `scale` times."""
    return config.cutoff / scale if config.cutoff_units == "lr_nyquist" else config.cutoff


def _decay(kind: str, place: float) -> float:
    """Weight at `place` in the window, from 0 at its first step to 1 after its last."""
    if kind == "linear_decay":
        return 1 - place
    return (1 + cos(pi * place)) / 2 if kind == "cosine_decay" else 1.0


def swap_weights(config: StructureConfig, course: Sequence[float]) -> tuple[float, ...]:
    """Weight of the swap at each step; 0 outside the window from `start` to `stop`.

    course: the fraction of the path before each step (`Step.done`). Weights decay with the steps, as in the papers:
    step i of the n in the window is at the place i / n. On a path with even fractions the place is exactly that of the
    fraction between `start` and `stop`.
    """
    window = [index for index, done in enumerate(course) if config.acts(done)]
    even = tuple(course) == even_course(len(course)).done
    weights = [0.0] * len(course)
    for number, index in enumerate(window):
        fraction = (course[index] - config.start) / (config.stop - config.start)
        weights[index] = config.strength * _decay(config.weight, fraction if even else number / len(window))
    return tuple(weights)


@lru_cache(maxsize=256)
def _gaussian_kernel(radius: int, sigma: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Gaussian kernel [2 radius + 1], sum 1. It is kept because uploading it at every step would make the device
    wait."""
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return (kernel / kernel.sum()).to(device=device, dtype=dtype)


def gaussian_blur(x: Tensor, radius: int, sigma: float, axes: tuple[int, ...] = (2, 3)) -> Tensor:
    """`x` [B, C, H, W] blurred along `axes` by a Gaussian of `sigma` cells, cut at `radius` cells, zero-padded."""
    kernel = _gaussian_kernel(radius, sigma, x.device, x.dtype).expand(x.shape[1], 1, -1)  # [C, 1, 2 r + 1]
    if 2 in axes:
        x = F.conv2d(x, kernel[..., None], padding=(radius, 0), groups=x.shape[1])
    if 3 in axes:
        x = F.conv2d(x, kernel[:, :, None], padding=(0, radius), groups=x.shape[1])
    return x
