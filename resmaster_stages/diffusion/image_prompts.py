"""Tailored image prompts (ResMaster eq. 8): each view's crop of the reference through CLIP and the IP-Adapter.

The attention processors of a loaded IP-Adapter compute Attn(Q, K_T, V_T) + scale * Attn(Q, K_I, V_I). This module makes
the embeddings that they read and sets the scale for a while. Plain adapters read one CLIP embedding per crop; Plus
adapters read the encoder's penultimate patch features.

Invariants:
- Scales and projection are restored when the block is left, exceptions included.
- Without image prompts the UNet computes what it would compute without an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection, MultiIPAdapterImageProjection
from torch import Tensor, nn

from resmaster_stages.diffusion.views import Box
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.parts import Models

_BATCH = 16


class _NoTokens(nn.Module):
    """Stands in for the adapters' projections while image prompts are off."""

    def __init__(self, adapters: int) -> None:
        super().__init__()
        self.adapters = adapters

    def forward(self, image_embeds: list[Tensor]) -> list[None]:
        return [None] * self.adapters


@contextmanager
def adapter_scale(unet: Any, scale: float) -> Iterator[None]:
    """Within the block the UNet's IP-Adapters (if any) have weight `scale`; with 0 they are out of the computation."""
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

    Crops are squeezed to a square rather than cut to one: what is at a narrow view's ends matters too.
    """
    pixels = F.interpolate(crops, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    pixels = pixels.clamp(-1, 1) / 2 + 0.5
    shift, spread = (torch.tensor(values, device=crops.device).view(1, 3, 1, 1) for values in (mean, std))
    return (pixels - shift) / spread


def require_adapter(models: Models) -> None:
    """Raises ConfigError where image prompts are wanted and the model has no IP-Adapter that can serve them."""
    if not models.has_ip_adapter:
        raise ConfigError(
            f"model {models.identity}: image prompts need an IP-Adapter; set model.ip_adapter, "
            "or upscale.image_prompt.enabled: false"
        )
    layers = models.unet.encoder_hid_proj.image_projection_layers
    if len(layers) != 1 or not isinstance(layers[0], ImageProjection | IPAdapterPlusImageProjection):
        names = ", ".join(type(layer).__name__ for layer in layers)
        raise ConfigError(
            f"model {models.identity}: IP-Adapter of an unsupported kind ({names}); load one plain or Plus adapter"
        )


def embed_crops(models: Models, pixels: Tensor, boxes: Sequence[Box]) -> tuple[Tensor, Tensor]:
    """(image, unconditional) embeddings of the crops `boxes` (px, of one size) of `pixels` [B, 3, H, W] in [-1, 1].

    One entry per crop, sample by sample. Plain adapter: [N, 1, D] and zeros. Plus: [N, 1, tokens, D] and the features
    of an all-zero input. Raises ConfigError.
    """
    require_adapter(models)
    encoder = models.image_encoder
    assert encoder is not None
    plus = isinstance(models.unet.encoder_hid_proj.image_projection_layers[0], IPAdapterPlusImageProjection)

    def encode(pixels: Tensor) -> Tensor:
        if plus:
            return encoder(pixels, output_hidden_states=True).hidden_states[-2]
        return encoder(pixels).image_embeds

    with torch.inference_mode(), models.using(encoder):
        parts = []
        crops = [picture[:, y0:y1, x0:x1] for picture in pixels for y0, x0, y1, x1 in boxes]  # views, not copies
        for start in range(0, len(crops), _BATCH):
            batch = torch.stack(crops[start : start + _BATCH]).to(models.device, torch.float32)
            inputs = preprocess(batch, encoder.config.image_size, models.image_mean, models.image_std)
            parts.append(encode(inputs.to(encoder.dtype)))
        image = torch.cat(parts).to(models.dtype)[:, None]
        if not plus:
            return image, torch.zeros_like(image)
        nothing = torch.zeros(1, 3, encoder.config.image_size, encoder.config.image_size, device=models.device)
        empty = encode(nothing.to(encoder.dtype)).to(models.dtype)[:, None]
        return image, empty.expand_as(image)
