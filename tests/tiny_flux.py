"""Tiny models of the families around FLUX.1, with random weights: right shapes and identities, no meaning."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tests.tiny_transformers import letters, quiet, t5, vae


def make_chroma(seed: int = 0) -> Any:
    """A fresh ChromaPipeline."""
    torch.manual_seed(seed)
    return quiet(
        ChromaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(),
            text_encoder=t5(),
            tokenizer=letters(48),
            transformer=ChromaTransformer2DModel(
                in_channels=64,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                axes_dims_rope=(4, 4, 8),
                approximator_num_channels=16,
                approximator_hidden_dim=32,
                approximator_layers=2,
            ),
        )
    )
