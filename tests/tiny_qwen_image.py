"""A tiny Qwen-Image with random weights. Its files do not tell a native size, so `model.native_px` is 64."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.tiny_transformers import DYNAMIC, quiet
from tests.tiny_z_image import VOCABULARY, chat_tokenizer

SCHEDULER = {**DYNAMIC, "shift": 1.0, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
"""The scheduler of Qwen-Image."""


def video_vae(**values: Any) -> AutoencoderKLQwenImage:
    """A VAE of factor 4 with the channels' means and spreads of Qwen-Image's."""
    shape: dict[str, Any] = {
        "base_dim": 8,
        "z_dim": 16,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
    }
    return AutoencoderKLQwenImage(**{**shape, **values})


def text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL of two layers."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            vision_start_token_id=124,
            vision_end_token_id=125,
            image_token_id=126,
            video_token_id=127,
        )
    )


def make_qwen_image(seed: int = 0, **values: Any) -> Any:
    """A fresh QwenImagePipeline. values: fields of the transformer's configuration."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 4, 4),
    }
    return quiet(
        QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            vae=video_vae(),
            text_encoder=text_encoder(),
            tokenizer=chat_tokenizer(None),
            transformer=QwenImageTransformer2DModel(**{**shape, **values}),
        )
    )
