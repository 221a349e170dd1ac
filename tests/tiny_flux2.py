"""Tiny FLUX.2 models with random weights: dev with a Mistral 3, klein with a Qwen 3. No meaning, no download.

Latent factor 4, native size 16 latents = 64 px, 8 latent channels. The language models have as many layers as the
pipelines look at.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.tiny_models import NATIVE_PX
from tests.tiny_transformers import letters, quiet

WIDTH, CHANNELS = 8, 8
SCHEDULER = {"use_dynamic_shifting": True, "shift": 3.0}
"""As FLUX.2 has it; `base_shift` and so on are there, and its pipelines do not read them."""
MISTRAL_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:{% for part in message.content %}{{ part.text }}{% endfor %},"
    "{% endfor %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:{{ message.content }},{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if not enable_thinking %}no thoughts,{% endif %}{% endif %}"
)
LAYERS: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.3,
}


def tokenizer(length: int, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of letters with a chat template."""
    made = letters(length)
    made.chat_template = template
    return made


def mistral() -> Mistral3ForConditionalGeneration:
    """Mistral 3, its vision tower included."""
    vision = PixtralVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=32,
        patch_size=16,
    )
    text = MistralConfig(num_hidden_layers=30, **LAYERS)
    return Mistral3ForConditionalGeneration(Mistral3Config(vision_config=vision, text_config=text))


def qwen() -> Qwen3ForCausalLM:
    """Qwen 3."""
    return Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=27, **LAYERS))


def vae(**values: Any) -> AutoencoderKLFlux2:
    """A VAE of factor 4 whose batch norm has seen something."""
    made = AutoencoderKLFlux2(
        latent_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=NATIVE_PX,
        **values,
    )
    made.bn.running_mean.normal_()
    made.bn.running_var.uniform_(0.2, 3.0)
    return made


def transformer(guidance_embeds: bool, **values: Any) -> Flux2Transformer2DModel:
    """One double and one single block."""
    return Flux2Transformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
        **values,
    )


def make_dev(seed: int = 0) -> Any:
    """A fresh Flux2Pipeline."""
    torch.manual_seed(seed)
    return quiet(
        Flux2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            vae=vae(),
            text_encoder=mistral(),
            tokenizer=tokenizer(320, MISTRAL_TEMPLATE),
            transformer=transformer(guidance_embeds=True),
        )
    )


def make_klein(distilled: bool = True, seed: int = 0) -> Any:
    """A fresh Flux2KleinPipeline: klein, or klein-base."""
    torch.manual_seed(seed)
    return quiet(
        Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            vae=vae(),
            text_encoder=qwen(),
            tokenizer=tokenizer(96, QWEN_TEMPLATE),
            transformer=transformer(guidance_embeds=False),
            is_distilled=distilled,
        )
    )


MAKERS = {"dev": make_dev, "klein": make_klein, "klein-base": lambda: make_klein(distilled=False)}
