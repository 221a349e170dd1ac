"""The reference B^L: the low-res image, bicubically enlarged to the target size.

There is one function for it. Captions describe crops of the reference, image prompts embed the crops, and structural
guidance encodes the reference.

Invariants:
- Image tensors are [B, 3, H, W], float32, RGB in [-1, 1]. Enlarging clamps, because bicubic interpolation overshoots.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


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


def upsample(image: Image.Image, height: int, width: int) -> Tensor:
    """`image` enlarged to `height` x `width` px: [1, 3, height, width] in [-1, 1]; bicubic, align_corners=False."""
    return enlarged(to_tensor(image), height, width)


def enlarged(pixels: Tensor, height: int, width: int, how: str = "bicubic") -> Tensor:
    """Images [B, 3, h, w] at `height` x `width` px, clamped to [-1, 1]. how: `bicubic`, `bilinear` or `nearest`."""
    corners = None if how == "nearest" else False
    return F.interpolate(pixels, size=(height, width), mode=how, align_corners=corners).clamp(-1, 1)


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
