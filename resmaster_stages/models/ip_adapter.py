"""IP-Adapters of UNets: CLIP embeds an image as tokens that every cross-attention reads beside the text.

The attention processors of a loaded IP-Adapter compute Attn(Q, K_T, V_T) + scale * Attn(Q, K_I, V_I). This module makes
the embeddings that they read, and sets the scale within a block. Plain adapters read one CLIP embedding per crop. Plus
adapters read the encoder's penultimate patch features.

Invariants:
- Scales and projection are restored when the block is left, also after an exception.
- Without image prompts, the UNet computes the same as without an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection, MultiIPAdapterImageProjection
from torch import Tensor, nn

from resmaster_stages.errors import ConfigError


class _NoTokens(nn.Module):
    """Stands in for the adapters' projections while image prompts are off."""

    def __init__(self, adapters: int) -> None:
        super().__init__()
        self.adapters = adapters

    def forward(self, image_embeds: list[Tensor]) -> list[None]:
        return [None] * self.adapters


@contextmanager
def adapter_scale(unet: Any, scale: float) -> Iterator[None]:
    """Within the block, the UNet's IP-Adapters (if any) have weight `scale`. With 0 they are not computed at all."""
    unet = getattr(unet, "_orig_mod", unet)  # torch.compile wraps the module
    projection = getattr(unet, "encoder_hid_proj", None)  # other denoisers have no adapters
    if not isinstance(projection, MultiIPAdapterImageProjection):
        yield
        return
    processors = [processor for processor in unet.attn_processors.values() if hasattr(processor, "to_k_ip")]
    before = [list(processor.scale) for processor in processors]
    try:
        for processor in processors:
            processor.scale = [scale] * len(processor.scale)
        if scale == 0:
            unet.encoder_hid_proj = _NoTokens(projection.num_ip_adapters)
        yield
    finally:
        unet.encoder_hid_proj = projection
        for processor, scales in zip(processors, before):
            processor.scale = scales


def preprocess(crops: Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """`crops` [N, 3, h, w] in [-1, 1] as CLIP input [N, 3, size, size].

    Crops are squeezed to a square instead of being cropped to one, because the ends of a narrow view matter too.
    """
    pixels = F.interpolate(crops, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    pixels = pixels.clamp(-1, 1) / 2 + 0.5
    shift, spread = (torch.tensor(values, device=crops.device).view(1, 3, 1, 1) for values in (mean, std))
    return (pixels - shift) / spread


@dataclass(frozen=True, eq=False)
class IpAdapter:
    """Makes the embeddings that a UNet's IP-Adapter reads."""

    encoder: Any
    """CLIP's image encoder."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    plus: bool

    def _encode(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.encoder.dtype)
        if self.plus:
            return self.encoder(pixels, output_hidden_states=True).hidden_states[-2]
        return self.encoder(pixels).image_embeds

    def embed(self, crops: Tensor) -> Tensor:
        """Crops [N, 3, h, w] in [-1, 1] as embeddings: plain [N, D], Plus [N, tokens, D]."""
        return self._encode(preprocess(crops, self.encoder.config.image_size, self.mean, self.std))

    def nothing(self, image: Tensor) -> Tensor:
        """The unconditional counterpart of embeddings [N, 1, ...].

        For plain adapters it is zeros, for Plus adapters the features of an all-zero input.
        """
        if not self.plus:
            return torch.zeros_like(image)
        size = self.encoder.config.image_size
        empty = self._encode(torch.zeros(1, 3, size, size, device=image.device)).to(image.dtype)
        return empty[:, None].expand_as(image)


def adapter_of(unet: Any, encoder: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> IpAdapter | None:
    """The IP-Adapter that is loaded into `unet`, or None.

    Raises ConfigError for an IP-Adapter of an unsupported kind.
    """
    projection = getattr(unet, "encoder_hid_proj", None)
    if not isinstance(projection, MultiIPAdapterImageProjection):
        return None
    layers = projection.image_projection_layers
    if len(layers) != 1 or not isinstance(layers[0], ImageProjection | IPAdapterPlusImageProjection):
        names = ", ".join(type(layer).__name__ for layer in layers)
        raise ConfigError(
            f"model.ip_adapter: IP-Adapter of an unsupported kind ({names}); load one plain or Plus adapter"
        )
    return IpAdapter(encoder, mean, std, isinstance(layers[0], IPAdapterPlusImageProjection))
