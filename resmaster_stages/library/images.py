"""Images as callers have them: what they give becomes PIL images, and results become what they ask for.

Invariants:
- An array is [H, W] or [H, W, channels], a tensor [channels, H, W], with 1, 3 or 4 channels: grey, RGB, or RGB and
  alpha. Transparency becomes white. One more axis in front makes a batch.
- Numbers are bytes from 0 to 255, or floats from 0 to 1, which are rounded to bytes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from PIL import Image

from resmaster_stages.errors import SampleError, UserError
from resmaster_stages.storage.filesystem import open_regular
from resmaster_stages.storage.images import convert_image, decode_image
from resmaster_stages.storage.sources import MAX_FILE_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

OneImage: TypeAlias = "str | Path | Image.Image"
"""A file or a PIL image."""
AnyImage: TypeAlias = "OneImage | NDArray[Any] | Tensor"
"""What an image may be given as. An array or a tensor may also be a batch."""
OutputType = Literal["pil", "np", "pt", "latent"]
"""pil: a PIL image. np: an array [H, W, 3], float32 from 0 to 1. pt: a tensor [3, H, W], float32 from 0 to 1, on the
model's device. latent: the clean latents [C, h, w] as the model has them."""

KINDS = "a path, a PIL image, a numpy array, a torch tensor, or a list of these"
SLACK = 1e-3
"""How far floats may lie outside of 0 to 1, as rounding in half precision makes them."""


def is_tensor(value: object) -> bool:
    """Whether `value` is a torch tensor. Torch is not imported for it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_batch(images: object) -> bool:
    """Whether several images were given: a list, or an array or tensor with one more axis."""
    if isinstance(images, np.ndarray) or is_tensor(images):
        return images.ndim == 4  # type: ignore[attr-defined]
    return isinstance(images, Sequence) and not isinstance(images, str | bytes)


def open_image(image: AnyImage) -> Image.Image:
    """An image as `decode_image` gives it, from a file, a PIL image, an array or a tensor. Raises UserError."""
    try:
        if isinstance(image, str | Path):
            return decode_image(_content(Path(image)), str(image))
        if isinstance(image, Image.Image):
            return convert_image(image, "the image")
    except SampleError as error:
        raise UserError(str(error)) from None
    if isinstance(image, np.ndarray):
        return open_image(_of_array(image, "array", "[H, W] or [H, W, channels]"))
    if is_tensor(image):
        values: Any = image
        if values.ndim != 3:
            raise UserError(_shape("tensor", tuple(values.shape), "[channels, H, W]"))
        return open_image(_of_array(_array_of(values).transpose(1, 2, 0), "tensor", "[channels, H, W]"))
    raise UserError(f"an image is {KINDS}, not {type(image).__name__}; give one of these")


def _array_of(tensor: Any) -> NDArray[Any]:
    """A tensor of any device and number format as an array."""
    values = tensor.detach().cpu()
    return np.asarray(values.float().numpy() if values.is_floating_point() else values.numpy())


def _shape(what: str, shape: tuple[int, ...], wanted: str) -> str:
    return (
        f"the image is a {what} of shape {[*shape]}; give {wanted} with 1, 3 or 4 channels, or one more axis in front"
    )


def _of_array(values: NDArray[Any], what: str, wanted: str) -> Image.Image:
    """A PIL image of [H, W] or [H, W, channels]. what: what the caller gave, for messages. Raises UserError."""
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    good = values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4))
    if not good or 0 in values.shape:
        shape = values.shape if what == "array" else (values.shape[2], *values.shape[:2])
        raise UserError(_shape(what, shape, wanted))
    if np.issubdtype(values.dtype, np.floating):
        low, high = float(values.min()), float(values.max())
        if not (low >= -SLACK and high <= 1 + SLACK):  # also where one is no number
            hint = "(x + 1) / 2" if low >= -1 - SLACK and high <= 1 + SLACK else "x / 255"
            raise UserError(
                f"the image is a {what} of floats from {low:g} to {high:g}; floats go from 0 to 1, so give {hint}"
            )
        values = (values.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    elif values.dtype != np.uint8:
        raise UserError(f"the image is a {what} of {values.dtype}; give uint8 from 0 to 255, or floats from 0 to 1")
    return Image.fromarray(np.ascontiguousarray(values))


def converted(image: Image.Image, output_type: OutputType) -> Any:
    """An 8-bit image in the form that was asked for, "latent" excepted."""
    if output_type == "pil":
        return image
    values = np.asarray(image, dtype=np.float32) / 255
    if output_type == "np":
        return values
    import torch

    return torch.from_numpy(values.transpose(2, 0, 1).copy())


def _content(path: Path) -> bytes:
    """The content of an image file. Raises UserError. Only regular files are opened, because a FIFO could block."""
    try:
        with open_regular(str(path)) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise UserError(
                    f"{path}: has {size:,} bytes, more than {MAX_FILE_BYTES:,}; compress it, or scale it down"
                )
            return file.read()
    except FileNotFoundError:
        reason = "is a link to nothing; give an image file" if path.is_symlink() else "no such image file"
        raise UserError(f"{path}: {reason}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is None:  # a folder, or no regular file
            raise UserError(f"{path}: {error}; give an image file") from None
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read ({reason}); give an image file that you may read") from None
