"""The reference B^L: the low-res image, bicubically enlarged to the target size.

There is one function for it. Captions describe crops of the reference, image prompts embed the crops, and structural
guidance encodes the reference.

Invariants:
- Image tensors are [B, 3, H, W], float32, RGB in [-1, 1]. Enlarging clamps, because bicubic interpolation overshoots.
- Along an axis that wraps, interpolation reads on at the opposite border.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from resmaster_stages.config.wrap import Axes

_REACH = 3
"""Cells on each side of a place that bicubic interpolation reads at most."""


def to_tensor(image: Image.Image) -> Tensor:
    """A PIL image as [1, 3, H, W], float32, RGB in [-1, 1]."""
    pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.uint8).copy())  # [H, W, 3]
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def to_mask(image: Image.Image) -> Tensor:
    """The brightness of a PIL image as [1, 1, H, W], float32, from 0 (black) to 1 (white)."""
    return torch.from_numpy(np.asarray(image.convert("L"), dtype=np.float32).copy())[None, None] / 255


def to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] as an 8-bit RGB image, rounded to the nearest level."""
    levels = (pixels.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def upsample(image: Image.Image, height: int, width: int, wraps: Axes = (False, False)) -> Tensor:
    """`image` enlarged to `height` x `width` px: [1, 3, height, width] in [-1, 1]; bicubic, align_corners=False."""
    return enlarged(to_tensor(image), height, width, wraps=wraps)


def enlarged(pixels: Tensor, height: int, width: int, how: str = "bicubic", wraps: Axes = (False, False)) -> Tensor:
    """Images [B, 3, h, w] at `height` x `width` px, clamped to [-1, 1]. how: `bicubic`, `bilinear` or `nearest`."""
    return resized(pixels, height, width, how, wraps).clamp(-1, 1)


def resized(
    x: Tensor, height: int, width: int, how: str = "bicubic", wraps: Axes = (False, False), antialias: bool = False
) -> Tensor:
    """`x` [B, C, h, w] at `height` x `width` cells, align_corners=False.

    wraps: whether `x` continues at the opposite border, along its height and along its width. Then `x` is continued on
    both sides by so many whole cells that they become whole cells, and these are cut off afterwards.
    """
    margins = [0, 0]
    for axis, size in enumerate((height, width)):
        if wraps[axis]:
            length = x.shape[2 + axis]
            whole, reach = length // gcd(length, size), _REACH * max(1, -(-length // size))
            more = -(-reach // whole) * whole
            x = x.index_select(2 + axis, torch.arange(-more, length + more, device=x.device) % length)
            margins[axis] = more * size // length
    corners = None if how == "nearest" else False
    down, across = margins
    larger = (height + 2 * down, width + 2 * across)
    y = F.interpolate(x, size=larger, mode=how, align_corners=corners, antialias=antialias)
    return y[..., down : down + height, across : across + width]


def continued(pixels: Tensor, boxes: Sequence[tuple[int, int, int, int]]) -> Tensor:
    """`pixels` [..., H, W], with the image continued at the bottom and right by its opposite borders as far as the
    half-open `boxes` (y0, x0, y1, x1) reach."""
    ends = [max(box[2 + axis] for box in boxes) for axis in (0, 1)]
    for axis, end in zip((-2, -1), ends):
        if end > pixels.shape[axis]:
            places = torch.arange(end, device=pixels.device) % pixels.shape[axis]
            pixels = pixels.index_select(pixels.ndim + axis, places)
    return pixels


def sharpened(pixels: Tensor, amount: float, sigmas: Tensor) -> Tensor:
    """Images [B, 3, H, W] plus `amount` times what a blur of 3 x 3 removes of them (DiffuseHigh). Not clamped.

    sigmas: the blur's standard deviation for each image, in px: [B].
    """
    side = torch.exp(-0.5 / sigmas**2)
    taps = torch.stack([side, torch.ones_like(side), side], dim=1) / (1 + 2 * side)[:, None]  # [B, 3]
    blur = (taps[:, :, None] * taps[:, None]).to(pixels).repeat_interleave(pixels.shape[1], dim=0)[:, None]
    images = F.pad(pixels, (1, 1, 1, 1), mode="reflect").flatten(0, 1)[None]  # [1, B * 3, H + 2, W + 2]
    blurred = F.conv2d(images, blur, groups=len(blur)).view_as(pixels)
    return pixels + amount * (pixels - blurred)


def pad_to_multiple(pixels: Tensor, multiple: int) -> Tensor:
    """`pixels` [B, 3, H, W] with border pixels repeated at the bottom and right, up to multiples of `multiple`."""
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, -width % multiple, 0, -height % multiple), mode="replicate")
