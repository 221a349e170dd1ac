"""A tiny Stable Diffusion 3 or 3.5 with random weights. Sizes as in `tests.tiny_transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, SiglipVisionConfig, SiglipVisionModel

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


def siglip_vision(width: int = 16, seed: int = 3) -> SiglipVisionModel:
    """SigLIP's image encoder of two layers, for images of 32 px."""
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return SiglipVisionModel(SiglipVisionConfig(**shape, image_size=32, patch_size=8)).eval().requires_grad_(False)


def adapter_state(layers: int = 3, width: int = 32, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random weights of an IP-Adapter with 4 tokens, loud enough to matter."""
    torch.manual_seed(seed)
    shape = {"embed_dim": 16, "output_dim": width, "hidden_dim": 24, "heads": 1, "num_queries": 4}
    resampler = IPAdapterTimeImageProjection(**shape, timestep_in_dim=16)
    state = {f"image_proj.{name}": each for name, each in resampler.state_dict().items()}
    for layer in range(layers):
        processor = SD3IPAdapterJointAttnProcessor2_0(width, width, head_dim=8, timesteps_emb_dim=24)
        torch.nn.init.normal_(processor.to_v_ip.weight)
        state |= {f"ip_adapter.{layer}.{name}": each for name, each in processor.state_dict().items()}
    return state


def save_adapter(folder: Path, **values: Any) -> Path:
    """A folder with an IP-Adapter, `ip-adapter.safetensors`, and SigLIP in `image_encoder`."""
    folder.mkdir(parents=True)
    save_file(adapter_state(**values), folder / "ip-adapter.safetensors")
    siglip_vision().save_pretrained(folder / "image_encoder")
    return folder
