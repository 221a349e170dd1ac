"""An SDXL with image prompts, of random weights and of its full size, and small pieces of it that steps need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks.methods import sdxl, sdxl_shape
from resmaster_stages.models.parts import Models
from resmaster_stages.picturebook.training.train_unet import attach_adapter, set_adapter_scale

SHRINK = 16
"""What a rehearsal divides the channels and the native size by."""
TOKENS = 4
"""Tokens of an image prompt, as SDXL's plain IP-Adapter has them."""
ENCODER = "random weights in the shape of CLIP ViT-H/14 (32 layers of 1280), as ip-adapter_sdxl_vit-h reads it"
TOY_ENCODER = "random weights in the shape of a CLIP ViT of 2 layers of 32"


def embedding_width(toy: bool) -> int:
    """Numbers of an image embedding."""
    return 32 if toy else 1024


def image_encoder(toy: bool) -> CLIPVisionModelWithProjection:
    """`ENCODER`, or `TOY_ENCODER`."""
    shape = (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"image_size": 28, "patch_size": 14}
        if toy
        else {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
        | {"image_size": 224, "patch_size": 14}
    )
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**shape, projection_dim=embedding_width(toy)))


def unet(device: torch.device, dtype: torch.dtype, toy: bool) -> UNet2DConditionModel:
    """SDXL's UNet with an IP-Adapter at full weight."""
    torch.manual_seed(0)
    with torch.device(device):
        made = UNet2DConditionModel(**sdxl_shape(SHRINK if toy else 1))
        attach_adapter(made, embedding_width(toy), TOKENS)
    set_adapter_scale(made, 1.0)
    return made.to(device, dtype).eval().requires_grad_(False)


def whole(device: torch.device, dtype: torch.dtype, toy: bool) -> Models:
    """An SDXL with an IP-Adapter and its image encoder."""
    models = sdxl(device, dtype, SHRINK if toy else 1)
    with torch.device(device):
        attach_adapter(models.base.denoiser, embedding_width(toy), TOKENS)
        encoder = image_encoder(toy)
    models.base.denoiser.to(device, dtype).eval().requires_grad_(False)
    encoder.to(device, dtype).eval().requires_grad_(False)
    return replace(models, base=replace(models.base, image_encoder=encoder))


def inputs(made: Any, rows: int, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    """Random arguments of a UNet call of `rows` views."""
    edge, channels = made.config.sample_size, made.config.in_channels
    pooled = made.config.projection_class_embeddings_input_dim - 6 * made.config.addition_time_embed_dim
    embedding = made.encoder_hid_proj.image_projection_layers[0].image_embeds.in_features

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    return {
        "sample": random(rows, channels, edge, edge),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": random(rows, 77, made.config.cross_attention_dim),
        "added_cond_kwargs": {
            "text_embeds": random(rows, pooled),
            "time_ids": random(rows, 6),
            "image_embeds": [random(rows, 1, embedding)],
        },
    }


def operations_per_row(toy: bool) -> int:
    """Floating-point operations of one native view through the UNet, counted without computing them."""
    meta = torch.device("meta")
    made = unet(meta, torch.float32, toy)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        made(**inputs(made, 1, meta, torch.float32), return_dict=False)
    return counter.get_total_flops()
