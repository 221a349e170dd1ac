"""Structural guidance (ResMaster eq. 5 and 6): the low frequencies of x0 are taken from the reference.

The filter is the Gaussian of FreeInit, G(f) = exp(-|f|^2 / (2 sigma_f^2)), with frequencies in units of the Nyquist
frequency. The swap is linear, so IFFT(G FFT(ref) + (1 - G) FFT(x0)) = x0 + G * (ref - x0), which is one blur. G is
separable, so the blur is two one-dimensional convolutions. They use reflect padding (no wrap-around at the borders).
The tests compare the result with the FFT form.

This module does not deal with models. Of the steps it uses only how far each of them is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from resmaster_stages.config.structure import StructureConfig

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


def _blur_axis(x: Tensor, sigma_f: float, dim: int) -> Tensor:
    kernel = _kernel_on(x.device, x.dtype, sigma_f)
    radius = min(len(kernel) // 2, x.shape[dim] - 1)  # reflect padding must be shorter than the axis
    middle = len(kernel) // 2
    kernel = kernel[middle - radius : middle + radius + 1]
    kernel = kernel / kernel.sum()
    channels = x.shape[1]
    if dim == 2:
        padded = F.pad(x, (0, 0, radius, radius), mode="reflect")
        return F.conv2d(padded, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    padded = F.pad(x, (radius, radius, 0, 0), mode="reflect")
    return F.conv2d(padded, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def low_pass(x: Tensor, sigma_f: float) -> Tensor:
    """`x` [B, C, H, W] through the Gaussian low-pass of standard deviation `sigma_f` (Nyquist = 1), with reflect
    padding."""
    return _blur_axis(_blur_axis(x, sigma_f, 2), sigma_f, 3)


def swap_low_frequencies(x0: Tensor, reference: Tensor, sigma_f: float, weight: float = 1.0) -> Tensor:
    """x0 with its low frequencies (times `weight`) replaced by those of `reference`; all [B, C, H, W]."""
    return x0 + weight * low_pass(reference - x0, sigma_f)


def cutoff_sigma(config: StructureConfig, scale: float) -> float:
    """The cutoff as sigma_f, in units of the canvas's Nyquist frequency, for a reference enlarged `scale` times."""
    return config.cutoff / scale if config.cutoff_units == "lr_nyquist" else config.cutoff


def swap_weights(config: StructureConfig, course: Sequence[float]) -> tuple[float, ...]:
    """Weight of the swap at each step; 0 outside the window from `start` to `stop`.

    course: the fraction of the path before each step (`Step.done`).
    """
    weights = []
    for done in course:
        if not config.start <= done < config.stop:
            weights.append(0.0)
        elif config.weight == "linear_decay":
            weights.append(1 - (done - config.start) / (config.stop - config.start))
        else:
            weights.append(1.0)
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
