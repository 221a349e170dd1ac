"""A tiny latent enlarger with random weights for the VAE of a model, and where to put it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from resmaster_stages.models.latent_enlarger import FINGERPRINT, EnlargerShape, LatentEnlarger
from resmaster_stages.models.latent_enlarger_files import fingerprint_of
from resmaster_stages.models.parts import Models

SHAPE = EnlargerShape(channels=4, dim=8, depths=(2,), heads=2, window=4, hidden=12, layers=2)


def network(seed: int = 0, shape: EnlargerShape = SHAPE) -> LatentEnlarger:
    """A network with random weights. Its biases by relative position are not zero."""
    torch.manual_seed(seed)
    made = LatentEnlarger(shape).eval().requires_grad_(False)
    for name, value in made.named_parameters():
        if name.endswith("blocks.0.bias") or name.endswith("blocks.1.bias"):
            value.normal_()
    return made


def save(path: Path, models: Models, made: LatentEnlarger | None = None) -> Path:
    """Write a network for the VAE of `models`, by default one with random weights."""
    state = (made or network()).state_dict()
    save_file({**state, FINGERPRINT: fingerprint_of(models)}, path)
    return path
