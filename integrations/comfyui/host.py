"""What the nodes share with ComfyUI: images as tensors, the progress bar, the stop button and the device's memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from comfy import model_management
from comfy.cli_args import LatentPreviewMethod, args
from comfy.utils import ProgressBar
from numpy.typing import NDArray
from PIL import Image

from resmaster_stages.diffusion.canvas import Canvas
from resmaster_stages.errors import UserError
from resmaster_stages.library.callbacks import Watch
from resmaster_stages.models.occupancy import has_own_memory, occupy
from resmaster_stages.progress import Event, Note, listening
from resmaster_stages.storage.images import convert_image

LOG = logging.getLogger("resmaster")
PREVIEW_PX = 512
"""The longest side of a preview on the page."""
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Channels of ComfyUI's images -> modes of PIL's."""


def _pil_images(images: torch.Tensor) -> list[Image.Image]:
    """The images of a batch [B, H, W, C] in [0, 1]. Raises UserError for a shape that is none."""
    if images.ndim != 4 or images.shape[-1] not in MODES or 0 in images.shape:
        raise UserError(f"image: a tensor of shape {list(images.shape)} is no batch of images; connect an IMAGE")
    pixels = (images.float().clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy()
    return [Image.fromarray(each.squeeze(-1) if each.shape[-1] == 1 else each) for each in pixels]


def rgb_images(images: torch.Tensor) -> list[Image.Image]:
    """The images of a batch [B, H, W, C] in [0, 1], on white where they are transparent. Raises UserError."""
    return [convert_image(each, "image") for each in _pil_images(images)]


def pil_masks(masks: torch.Tensor) -> list[Image.Image]:
    """The masks of a batch [B, H, W], or of one mask [H, W], in [0, 1]."""
    return _pil_images(masks.reshape(-1, *masks.shape[-2:], 1))


def image_batch(images: Sequence[Image.Image | NDArray[np.float32]]) -> torch.Tensor:
    """RGB images of one size, or arrays [H, W, 3] in [0, 1], as a batch [B, H, W, 3] in [0, 1]."""
    arrays = [np.asarray(each) / np.float32(255) if isinstance(each, Image.Image) else each for each in images]
    return torch.stack([torch.from_numpy(each) for each in arrays])


def of_each(values: Sequence[Any], images: int, name: str, parts: int = 1) -> list[Any]:
    """`values` for each of `images` images: `parts` values for all of them, or `parts` for each in its turn.

    Raises UserError for another number of values.
    """
    if len(values) == parts:
        return [values] * images
    if len(values) == parts * images:
        return [values[start : start + parts] for start in range(0, len(values), parts)]
    each = f" with {parts} views" if parts > 1 else ""
    wanted = f"{parts} or {parts * images}" if images > 1 else f"{parts}"
    raise UserError(f"{name}: {len(values)} given for {images} image(s){each}; give {wanted}")


class Bar:
    """ComfyUI's bar for a batch of images. It shows previews, and stops the work when the user stops the queue."""

    def __init__(self, images: int) -> None:
        self._images = images
        self._bar = ProgressBar(images)

    def of(self, number: int) -> Watch:
        """What is told of each step of the image `number`."""

        def progress(done: int, total: int) -> None:
            model_management.throw_exception_if_processing_interrupted()
            self._bar.update_absolute(number * total + done, self._images * total)

        def preview(canvas: Canvas, step: int, timestep: float, tensors: dict[str, Any]) -> None:
            done = number * canvas.steps + step + 1
            self._bar.update_absolute(done, self._images * canvas.steps, ("JPEG", canvas.preview(), PREVIEW_PX))

        wanted = args.preview_method != LatentPreviewMethod.NoPreviews
        return Watch(preview if wanted else None, progress)


def _tell(event: Event) -> None:
    if isinstance(event, Note):
        LOG.warning(event.line)


@contextmanager
def at_work(device: torch.device | None = None) -> Iterator[None]:
    """Within the block, this project's models may have `device` for themselves, and notes go to ComfyUI's log.

    ComfyUI's models leave the device first, and this project's leave it at the end. ComfyUI runs nodes in torch's
    inference mode, whose tensors cannot be moved to a device later on. So the block is outside of it.
    """
    alone = device is not None and has_own_memory(device)
    if alone:
        model_management.unload_all_models()
        model_management.soft_empty_cache()
    try:
        with torch.inference_mode(False), torch.no_grad(), listening(_tell):
            yield
    finally:
        if device is not None and alone:
            occupy(device)
            model_management.soft_empty_cache()
