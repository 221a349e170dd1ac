"""A tiny SDXL with random weights, built from configurations: right shapes and identities, no meaning, no download.

Latent factor 4, native size 16 latents = 64 px.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    ControlNetUnionModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from resmaster_stages.models.parts import Models

NATIVE_PX = 64
LATENT_FACTOR = 4
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def tokenizer() -> CLIPTokenizer:
    letters = string.ascii_lowercase + ",.-"
    words = [*letters, *(letter + "</w>" for letter in letters)]
    vocab = {word: number for number, word in enumerate(words)}
    vocab["<|startoftext|>"] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _text_config(hidden: int, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection,
        bos_token_id=58,
        eos_token_id=59,
        pad_token_id=59,
    )


def _vae(**values: Any) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=NATIVE_PX,
        **values,
    )


def make_pipeline(seed: int = 0) -> Any:
    """A fresh StableDiffusionXLPipeline with an image encoder, without IP-Adapter weights."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=NATIVE_PX // LATENT_FACTOR,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        cross_attention_dim=16 + 16,
        norm_num_groups=8,
    )
    vae = _vae(scaling_factor=0.13025, force_upcast=True)
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(_text_config(16, 16)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(16, 16)),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
        image_encoder=CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
                projection_dim=12,
            )
        ),
        feature_extractor=None,
        add_watermarker=False,
    )
    for name in ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder"):
        getattr(pipe, name).eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_stable_diffusion(prediction_type: str = "epsilon", seed: int = 0) -> Any:
    """A fresh StableDiffusionPipeline with the four blocks of Stable Diffusion 1.5 (epsilon) or 2.1 (v_prediction)."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=NATIVE_PX // LATENT_FACTOR,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=2,
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        attention_head_dim=2,
        use_linear_projection=prediction_type == "v_prediction",
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    pipe = StableDiffusionPipeline(
        vae=_vae(scaling_factor=0.18215, force_upcast=False),
        text_encoder=CLIPTextModel(_text_config(16, 16)),
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(
            **SCHEDULER, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for name in ("unet", "vae", "text_encoder"):
        getattr(pipe, name).eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def adapter_state(unet: Any, seed: int = 1) -> dict[str, dict[str, torch.Tensor]]:
    """Random weights of a plain IP-Adapter with 4 tokens for `unet`, loud enough to matter."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    state: dict[str, dict[str, torch.Tensor]] = {
        "image_proj": {
            "proj.weight": draw(4 * 32, 12),
            "proj.bias": torch.zeros(4 * 32),
            "norm.weight": torch.ones(32),
            "norm.bias": torch.zeros(32),
        },
        "ip_adapter": {},
    }
    modules = dict(unet.named_modules())
    for place, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            channels = modules[name.removesuffix(".processor")].to_q.weight.shape[0]
            for part in ("to_k_ip", "to_v_ip"):
                state["ip_adapter"][f"{place}.{part}.weight"] = draw(channels, 32)
    return state


def make_adapted_pipeline(seed: int = 0) -> Any:
    """A fresh pipeline with an IP-Adapter."""
    pipe = make_pipeline(seed)
    pipe.load_ip_adapter(adapter_state(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    return pipe


def make_control_net(unet: Any, union: bool = False, seed: int = 2) -> Any:
    """A ControlNet for `unet`, a copy of its encoder, whose other weights are random and loud enough to matter."""
    torch.manual_seed(seed)
    net: Any = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 12, 16))
    if union:
        width = unet.config.block_out_channels[0]
        sizes = {"num_control_type": 8, "num_trans_channel": width, "num_trans_head": 2, "num_proj_channel": width}
        known = {name: value for name, value in net.config.items() if name not in ("mid_block_type",)}
        net = ControlNetUnionModel.from_config({**known, **sizes})
        net.load_state_dict(
            {**net.state_dict(), **{k: v for k, v in unet.state_dict().items() if k in net.state_dict()}}
        )
    for layer in [net.controlnet_mid_block, *net.controlnet_down_blocks, *([net.spatial_ch_projs] if union else [])]:
        torch.nn.init.normal_(layer.weight, std=0.3)
        torch.nn.init.normal_(layer.bias, std=0.1)
    torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=3.0)
    return net.eval().requires_grad_(False)


@lru_cache(maxsize=1)
def tiny() -> Any:
    """The shared pipeline without an adapter. Do not change it."""
    return make_pipeline()


@lru_cache(maxsize=1)
def tiny_adapted() -> Any:
    """The shared pipeline with an adapter: same weights otherwise. Do not change it."""
    return make_adapted_pipeline()


def save(folder: Path) -> Path:
    """The tiny pipeline as a diffusers folder, with ip_adapter/ip-adapter.safetensors beside it."""
    from safetensors.torch import save_file

    pipe = make_pipeline()
    pipe.save_pretrained(folder)
    state = {
        f"{part}.{name}": value for part, values in adapter_state(pipe.unet).items() for name, value in values.items()
    }
    (folder / "ip_adapter").mkdir()
    save_file(state, folder / "ip_adapter" / "ip-adapter.safetensors")
    return folder


@contextmanager
def counted(unet: Any) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the calls of a UNet or a transformer within the block."""
    shapes: list[tuple[int, ...]] = []
    original = unet.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        sample = args[0] if args else kwargs["hidden_states"]
        shapes.append(tuple(sample.shape))
        return original(*args, **kwargs)

    unet.forward = forward
    try:
        yield shapes
    finally:
        del unet.forward


def with_base(models: Models, **changed: Any) -> Models:
    """`models` with other parts of the base model: `denoiser`, `vae`, `family`, ..."""
    return replace(models, base=replace(models.base, **changed))
