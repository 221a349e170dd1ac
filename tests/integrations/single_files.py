"""Writes a Stable Diffusion pipeline as the single file that other programs have, under the original names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def _renamed(name: str, names: dict[str, str]) -> str:
    for new, old in names.items():
        name = re.sub(rf"(^|\.){re.escape(new)}(?=\.)", rf"\g<1>{old}", name)
    return name


def unet_name(name: str, layers: int) -> str:
    """The original name of a tensor of a UNet with `layers` layers per block."""
    if found := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name):
        way, block, part, layer, rest = found.groups()
        first, each = (1, "input_blocks") if way == "down" else (0, "output_blocks")
        number = first + int(block) * (layers + 1) + (layers if part.endswith("samplers") else int(layer))
        if part == "downsamplers":
            place, rest = "0", rest.replace("conv", "op")
        elif part == "upsamplers":
            place = "1" if int(block) == 0 else "2"  # after the attention, which the first block does not have
        else:
            place = "0" if part == "resnets" else "1"
        name = f"{each}.{number}.{place}.{rest}"
    name = _renamed(name, UNET)
    return name if ".transformer_blocks." in name else _renamed(name, RESNET)


def vae_name(name: str, blocks: int) -> str:
    """The original name of a tensor of a VAE with `blocks` blocks."""
    blocks_of = r"(encoder|decoder)\.(down|up)_blocks\.(\d)\.(resnets|downsamplers|upsamplers)\.(\d)\.(.*)"
    if found := re.match(blocks_of, name):
        side, way, block, part, layer, rest = found.groups()
        number = int(block) if way == "down" else blocks - 1 - int(block)
        part = f"block.{layer}" if part == "resnets" else part.removesuffix("rs")
        name = f"{side}.{way}.{number}.{part}.{rest}"
    return _renamed(name, VAE)


def write(pipe: Any, path: Path) -> None:
    """Writes a StableDiffusionPipeline into one file."""
    layers, blocks = pipe.unet.config.layers_per_block, len(pipe.vae.config.block_out_channels)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in pipe.unet.state_dict().items():
        tensors[f"model.diffusion_model.{unet_name(name, layers)}"] = value
    for name, value in pipe.vae.state_dict().items():
        attention = ".attentions." in name and value.ndim == 2
        tensors[f"first_stage_model.{vae_name(name, blocks)}"] = value[:, :, None, None] if attention else value
    for name, value in pipe.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
