"""Loads latent enlargers: from a configuration to a network that is known to be for the model's VAE.

A file of weights holds, beside the network, the fingerprint of the VAE that the network was trained for: a few weights
of the VAE's encoder, and the numbers by which its latents are scaled. A VAE whose fingerprint is another one makes
other latents, and is refused.

Invariants:
- Only safetensors are read, and the weights are loaded strictly. The network computes in float32.
- Fingerprints are compared up to `ROUNDING`, so that the number format of the VAE does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.config.reference import ReferenceConfig
from resmaster_stages.errors import ConfigError, first_line
from resmaster_stages.models.enlarger import read_weights
from resmaster_stages.models.files import DIFFUSERS, find_network, folder_with, object_in, tensors_of, weight_files
from resmaster_stages.models.identity import latent_network, network_file
from resmaster_stages.models.latent_enlarger import FINGERPRINT, LatentEnlarger, network_of
from resmaster_stages.models.parts import Models

ROUNDING = 0.01
"""Greatest relative difference of two fingerprints of one VAE. A weight in bfloat16 is off by up to 0.004."""
FIRST, LAST = "encoder.conv_in.weight", "encoder.conv_out.bias"
"""Weights of a VAE that its fingerprint holds."""


def fingerprint(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """The fingerprint of the VAE with these weights and this configuration: [n], float32.

    Raises KeyError if the weights are not those of a VAE.
    """
    parts = [weights[name].detach().float().cpu().flatten() for name in (FIRST, LAST)]
    scales = [config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0]
    scales += [*(config.get("latents_mean") or ()), *(config.get("latents_std") or ())]
    return torch.cat([*parts, torch.tensor(scales, dtype=torch.float32)])


def fingerprint_of(models: Models) -> Tensor:
    """The fingerprint of a loaded model's VAE. Raises ConfigError for a VAE of an unknown kind."""
    vae = models.base.vae
    try:
        return fingerprint(vae.state_dict(), vae.config)
    except KeyError as error:
        raise ConfigError(
            f"model {models.identity}: its VAE has no {error}, so no latent enlarger is known to be for it; set "
            "upscale.reference.enlarge: image"
        ) from None


def _fingerprint_of_files(config: ModelConfig) -> Tensor | None:
    """The fingerprint of the VAE of a model that is not loaded. None if its files do not say: the check of the model
    tells of that. Raises NotOnThisMachine."""
    from safetensors import SafetensorError, safe_open

    if config.vae is not None:
        folder = folder_with(config.vae, "config.json")
    else:
        folder = folder_with(config.id, "vae/config.json", config.revision) / "vae"
    weights: dict[str, Tensor] = {}
    try:
        for path in weight_files(folder, DIFFUSERS, config.variant):
            with safe_open(path, framework="pt") as file:
                weights |= {name: file.get_tensor(name) for name in (FIRST, LAST) if name in file.keys()}  # noqa: SIM118
        return fingerprint(weights, object_in(folder / "config.json"))
    except (ConfigError, SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def same_vae(one: Tensor, other: Tensor) -> bool:
    """Whether two fingerprints are of one VAE."""
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=ROUNDING, atol=1e-4)


def _require_same(one: Tensor, other: Tensor, path: Path, model: str) -> None:
    """Raise ConfigError unless two fingerprints are of one VAE."""
    if not same_vae(one, other):
        raise ConfigError(
            f"upscale.reference.model: {path} enlarges the latents of another VAE than that of model {model}; give a "
            "network that was trained for this VAE (docs/methods.md, Latent enlargement), or set "
            "upscale.reference.enlarge: image"
        )


def _network(state: Mapping[str, Tensor], path: Path) -> LatentEnlarger:
    if FINGERPRINT not in state or "look.weight" not in state:
        raise ConfigError(f"{path}: is no latent enlarger; give a file that train_latent_enlarger wrote")
    try:
        return network_of({name: value for name, value in state.items() if name != FINGERPRINT})
    except Exception as error:  # damaged shapes and numbers raise many kinds of errors
        raise ConfigError(f"{path}: not a whole latent enlarger ({first_line(error)}); download it again") from None


def check_latent_enlarger(config: ReferenceConfig, model: ModelConfig) -> None:
    """Raise ConfigError if the network that `config` names cannot be used or is not for the VAE of `model`, as far as
    the headers of files and the fingerprints say. Raises NotOnThisMachine for files that are at the hub only."""
    from safetensors import safe_open

    path = find_network(latent_network(config))
    _network({name: torch.empty(shape, device="meta") for name, shape in tensors_of(path).items()}, path)
    found = _fingerprint_of_files(model)
    if found is None:
        return
    with safe_open(path, framework="pt") as file:
        _require_same(file.get_tensor(FINGERPRINT), found, path, model.id)


@lru_cache(maxsize=1)
def _loaded(path: Path, changed: int, device: torch.device) -> tuple[LatentEnlarger, Tensor]:
    """The network in a file and its fingerprint. The last one stays loaded. changed: the file's time, in ns."""
    state = read_weights(path)
    network = _network({name: value.float() for name, value in state.items()}, path)
    return network.to(device), state[FINGERPRINT]


def enlarge_latents(models: Models, latents: Tensor, height: int, width: int, config: ReferenceConfig) -> Tensor:
    """Latents [B, C, h, w] of `models` at `height` x `width`, by the network that `config` names.

    Raises ConfigError with one line, also if the network is for another VAE.
    """
    path = network_file(latent_network(config))
    network, wanted = _loaded(path, path.stat().st_mtime_ns, models.device)
    _require_same(wanted, fingerprint_of(models), path, models.identity)
    with torch.inference_mode():
        return network(latents.float().to(models.device), height, width)
