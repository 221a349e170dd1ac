"""A tiny PixArt-alpha or PixArt-Sigma with random weights. Latent factor 4, native size 16 latents = 64 px."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

from tests.tiny_transformers import letters, quiet, t5, vae

BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}
"""Of the scheduler of both models."""


def make_pixart(
    alpha: bool = False, told: bool | None = None, scheduler: Any = None, sample_size: int = 16, seed: int = 0
) -> Any:
    """A fresh pipeline. told: whether the transformer reads sizes; None: if `sample_size` is 128."""
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        sample_size=sample_size,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=4,
        caption_channels=32,
        cross_attention_dim=48,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=told,
    )
    return quiet(
        (PixArtAlphaPipeline if alpha else PixArtSigmaPipeline)(
            tokenizer=letters(48),
            text_encoder=t5(),
            vae=vae(4, scaling_factor=0.13025, shift_factor=None, use_quant_conv=True, use_post_quant_conv=True),
            transformer=transformer,
            scheduler=scheduler or DPMSolverMultistepScheduler(**BETAS),
        )
    )
