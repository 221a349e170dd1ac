"""Tiny models of the families around FLUX.1, with random weights: right shapes and identities, no meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, SiglipVisionConfig, SiglipVisionModel

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


CLIP_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def clip_vision(projection: int = 12, seed: int = 2) -> CLIPVisionModelWithProjection:
    """CLIP's image encoder of two layers."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(**CLIP_VISION, projection_dim=projection)
    return CLIPVisionModelWithProjection(config).eval().requires_grad_(False)


def siglip_vision(seed: int = 3) -> SiglipVisionModel:
    """SigLIP's image encoder of two layers."""
    torch.manual_seed(seed)
    return SiglipVisionModel(SiglipVisionConfig(**CLIP_VISION)).eval().requires_grad_(False)


def redux(seed: int = 4) -> ReduxImageEncoder:
    """Redux' projection to the width of the tiny T5."""
    torch.manual_seed(seed)
    return ReduxImageEncoder(CLIP_VISION["hidden_size"], 32).eval().requires_grad_(False)


def adapter_state(transformer: Any, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random weights of a plain IP-Adapter with 4 tokens, under XLabs' names, loud enough to matter."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    width, inner = transformer.config.joint_attention_dim, transformer.inner_dim
    state = {
        "ip_adapter_proj_model.proj.weight": draw(4 * width, 12),
        "ip_adapter_proj_model.proj.bias": torch.zeros(4 * width),
        "ip_adapter_proj_model.norm.weight": torch.ones(width),
        "ip_adapter_proj_model.norm.bias": torch.zeros(width),
    }
    for block in range(transformer.config.num_layers):
        for part in ("k", "v"):
            name = f"double_blocks.{block}.processor.ip_adapter_double_stream_{part}_proj"
            state |= {f"{name}.weight": draw(inner, width), f"{name}.bias": torch.zeros(inner)}
    return state


def save_adapters(folder: Path, transformer: Any) -> Path:
    """An IP-Adapter and Redux with their image encoders in `folder`: ip_adapter.safetensors and image_encoder,
    image_embedder and siglip."""
    folder.mkdir()
    save_file(adapter_state(transformer), folder / "ip_adapter.safetensors")
    clip_vision().save_pretrained(folder / "image_encoder")
    siglip_vision().save_pretrained(folder / "siglip")
    redux().save_pretrained(folder / "image_embedder")
    return folder


def with_adapter(pipe: Any, folder: Path) -> Any:
    """`pipe` with the IP-Adapter of `save_adapters`, as users load it."""
    pipe.load_ip_adapter(
        str(folder),
        weight_name="ip_adapter.safetensors",
        image_encoder_pretrained_model_name_or_path=str(folder / "image_encoder"),
        image_encoder_dtype=torch.float32,
    )
    return quiet(pipe)
