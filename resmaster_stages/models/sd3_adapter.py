"""Image prompts of Stable Diffusion 3.5: an IP-Adapter that reads SigLIP's states and the timestep.

At every step a resampler makes tokens of the states. The attention processors add scale * Attn(Q, [K; K_I], [V; V_I])
to the image's tokens.

Invariants:
- Scales are restored when the block is left, also after an exception.
- Without image prompts, the transformer computes the same as without an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from torch import Tensor

from resmaster_stages.models.ip_adapter import IpAdapter

SIGLIP = (0.5, 0.5, 0.5)
"""Mean, and standard deviation, of RGB in [0, 1] for SigLIP."""


@dataclass(frozen=True, eq=False)
class StableDiffusion3Adapter(IpAdapter):
    """Makes the states that the IP-Adapter reads: SigLIP's penultimate ones."""

    def nothing(self, image: Tensor) -> Tensor:
        """Zeros, as diffusers' pipeline has it."""
        return torch.zeros_like(image)


def adapter_of(transformer: Any, encoder: Any) -> StableDiffusion3Adapter | None:
    """The IP-Adapter that is loaded with the image encoder `encoder`, or None."""
    if encoder is None or not isinstance(getattr(transformer, "image_proj", None), IPAdapterTimeImageProjection):
        return None
    return StableDiffusion3Adapter(encoder, SIGLIP, SIGLIP, plus=True)


@contextmanager
def adapter_scale(transformer: Any, scale: float) -> Iterator[None]:
    """Within the block, the transformer's IP-Adapter (if any) has weight `scale`. With 0 it is not computed at all."""
    processors = [
        module.processor
        for module in transformer.modules()
        if isinstance(getattr(module, "processor", None), SD3IPAdapterJointAttnProcessor2_0)
    ]
    before = [processor.scale for processor in processors]
    try:
        for processor in processors:
            processor.scale = scale
        yield
    finally:
        for processor, own in zip(processors, before):
            processor.scale = own
