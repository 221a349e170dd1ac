"""A tiny Stable Diffusion 3 or 3.5 with random weights. Sizes as in `tests.tiny_transformers`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests.tiny_models import tokenizer
from tests.tiny_transformers import letters, quiet, t5, vae


def clip_with_projection() -> CLIPTextModelWithProjection:
    """CLIP's text encoder of two layers with a projection."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=16,
            bos_token_id=58,
            eos_token_id=59,
            pad_token_id=59,
        )
    )


def make_sd3(version: str = "3.5", t5_too: bool = True, seed: int = 0, **transformer: Any) -> Any:
    """A fresh StableDiffusion3Pipeline. transformer: parts of its configuration."""
    torch.manual_seed(seed)
    newer = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if version == "3.5" else {}
    shape: dict[str, Any] = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 64,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 24,
    }
    return quiet(
        StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(**{**shape, **newer, **transformer}),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(scaling_factor=1.5305, shift_factor=0.0609),
            text_encoder=clip_with_projection(),
            tokenizer=tokenizer(),
            text_encoder_2=clip_with_projection(),
            tokenizer_2=tokenizer(),
            text_encoder_3=t5(64) if t5_too else None,
            tokenizer_3=letters(48) if t5_too else None,
        )
    )
