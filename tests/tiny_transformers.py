"""Tiny transformer models with random weights: right shapes and identities, no meaning, no download.

Latent factor 4, native size 16 latents = 64 px, 16 latent channels.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from tests.tiny_models import NATIVE_PX, tokenizer

DYNAMIC = {
    "use_dynamic_shifting": True,
    "shift": 3.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
"""The scheduler of FLUX.1-dev."""


def letters(length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of letters that ends every text with </s>, as T5's does."""
    vocab = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *string.ascii_lowercase, ",", "."])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def t5(width: int = 32) -> T5EncoderModel:
    """A T5 encoder of two layers."""
    return T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4))


def clip_text(width: int = 32) -> CLIPTextModel:
    """CLIP's text encoder of two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=58,
            eos_token_id=59,
            pad_token_id=59,
        )
    )


def vae(channels: int = 16, **values: Any) -> AutoencoderKL:
    """A VAE of factor 4 with FLUX's scaling and shift."""
    shape = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
    return AutoencoderKL(
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=NATIVE_PX,
        **{**shape, **values},
    )


def quiet(pipe: Any) -> Any:
    """`pipe` for inference, without a progress bar."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_flux(guidance_embeds: bool = True, scheduler: dict[str, Any] | None = None, seed: int = 0) -> Any:
    """A fresh FluxPipeline: dev, or schnell without `guidance_embeds`."""
    torch.manual_seed(seed)
    return quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**(scheduler or (DYNAMIC if guidance_embeds else {}))),
            vae=vae(),
            text_encoder=clip_text(),
            tokenizer=tokenizer(),
            text_encoder_2=t5(),
            tokenizer_2=letters(48),
            transformer=FluxTransformer2DModel(
                in_channels=64,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                axes_dims_rope=(4, 4, 8),
                guidance_embeds=guidance_embeds,
            ),
        )
    )
