"""Image prompts of FLUX.1 and Chroma: a plain IP-Adapter, or Redux.

The IP-Adapter's attention processors of the double blocks add scale * Attn(Q, K_I, V_I) to the image's tokens. They
read one CLIP embedding per view. Redux makes tokens of an image that the transformer reads after those of the text.
They are multiplied by the scale.

Invariants:
- Scales and processors are restored when the block is left, also after an exception.
- Without image prompts, the transformer computes the same as without an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from torch import Tensor, nn

from resmaster_stages.models.ip_adapter import IpAdapter, adapter_of

SIGLIP = (0.5, 0.5, 0.5)
"""Mean, and standard deviation, of RGB in [0, 1] for SigLIP."""


class ReduxEncoder(nn.Module):
    """SigLIP and Redux' projection of its states to tokens of text: pixels [N, 3, h, w] -> [N, tokens, D]."""

    def __init__(self, vision: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.vision, self.projection = vision, projection
        self.scale = 1.0

    @property
    def config(self) -> Any:
        """SigLIP's."""
        return self.vision.config

    @property
    def device(self) -> torch.device:
        """SigLIP's."""
        return next(self.vision.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """SigLIP's."""
        return next(self.vision.parameters()).dtype

    @property
    def tokens(self) -> int:
        """Tokens per image."""
        return int((self.config.image_size // self.config.patch_size) ** 2)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projection(self.vision(pixels).last_hidden_state).image_embeds


@dataclass(frozen=True, eq=False)
class FluxAdapter(IpAdapter):
    """Makes the embeddings that FLUX.1's IP-Adapter reads."""

    def nothing(self, image: Tensor) -> Tensor:
        """The embeddings of a black image, as diffusers' pipelines have it."""
        size = self.encoder.config.image_size
        black = self.embed(torch.full((1, 3, size, size), -1.0, device=image.device))
        return black.to(image.dtype)[:, None].expand_as(image)


@dataclass(frozen=True, eq=False)
class Redux(FluxAdapter):
    """Makes the tokens that Redux appends to those of the text."""

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels.to(self.encoder.dtype))


def flux_adapter_of(
    transformer: Any, encoder: Any, mean: tuple[float, ...], std: tuple[float, ...]
) -> IpAdapter | None:
    """The adapter that is loaded with the image encoder `encoder`, or None. mean, std: those of CLIP's input.

    Raises ConfigError for an IP-Adapter of an unsupported kind.
    """
    if isinstance(encoder, ReduxEncoder):
        return Redux(encoder, SIGLIP, SIGLIP, plus=False)
    if encoder is None or adapter_of(transformer, encoder, mean, std) is None:
        return None
    return FluxAdapter(encoder, mean, std, plus=False)


@contextmanager
def flux_adapter_scale(transformer: Any, encoder: Any, scale: float) -> Iterator[None]:
    """Within the block, the transformer's adapter (if any) has weight `scale`. With 0 it is not computed at all."""
    redux = [encoder] if isinstance(encoder, ReduxEncoder) else []
    attentions = [
        module
        for module in transformer.modules()
        if isinstance(getattr(module, "processor", None), FluxIPAdapterAttnProcessor)
    ]
    before = [(attention, attention.processor, attention.processor.scale) for attention in attentions]
    scales = [each.scale for each in redux]
    try:
        for each in redux:
            each.scale = scale
        for attention, processor, own in before:
            processor.scale = [scale] * len(own)
            if scale == 0:  # the IP-Adapter's processors cannot do without image prompts
                attention.set_processor(_plain(processor))
        yield
    finally:
        for attention, processor, own in before:
            processor.scale = own
            attention.set_processor(processor)
        for each, own in zip(redux, scales):
            each.scale = own


def _plain(processor: Any) -> FluxAttnProcessor:
    """The processor without an adapter, which computes attention in the same way."""
    plain = FluxAttnProcessor()
    plain._attention_backend = processor._attention_backend
    plain._parallel_config = processor._parallel_config
    return plain
