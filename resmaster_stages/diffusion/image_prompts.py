"""Tailored image prompts (ResMaster eq. 8): the base model's image adapter embeds each view's crop of the reference,
or an image of the caller's for each view."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from resmaster_stages.diffusion.reference import continued
from resmaster_stages.diffusion.views import Box
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.bases.base import NO_ADAPTER, ImageAdapter
from resmaster_stages.models.parts import Models

_BATCH = 16


def required_adapter(models: Models) -> ImageAdapter:
    """The image adapter. Raises ConfigError if the model has none, or one that cannot be used."""
    adapter = models.base.image_adapter()
    if adapter is None:
        raise ConfigError(NO_ADAPTER.format(models.identity))
    return adapter


def embed_crops(models: Models, pixels: Tensor, boxes: Sequence[Box]) -> tuple[Tensor, Tensor]:
    """(image, unconditional) embeddings [N, 1, ...] of the crops `boxes` of `pixels` [B, 3, H, W] in [-1, 1].

    `boxes` are in px and all of one size. A box that ends beyond the border continues at the opposite border. There is
    one entry per crop, sample by sample. Raises ConfigError.
    """
    pixels = continued(pixels, boxes)
    crops = [image[:, y0:y1, x0:x1] for image in pixels for y0, x0, y1, x1 in boxes]  # views, not copies
    return _embed(models, (torch.stack(crops[start : start + _BATCH]) for start in range(0, len(crops), _BATCH)))


def embed_images(models: Models, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(image, unconditional) embeddings [N, 1, ...] of N images [1, 3, h, w] in [-1, 1], of any sizes. Raises
    ConfigError."""
    return _embed(models, images)


def _embed(models: Models, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    adapter = required_adapter(models)
    with torch.inference_mode(), models.using(adapter.encoder):
        parts = [adapter.embed(batch.to(models.device, torch.float32)) for batch in batches]
        image = torch.cat(parts).to(models.dtype)[:, None]
        return image, adapter.nothing(image)
