"""Sizes of a base model, read from its JSON files: no weights are loaded and torch is not imported.

Knows nothing about what the sizes are used for. The picturebook pack, a folder and a hub id are read alike; a hub id
needs only two small files, from the local cache if they are there.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.identity import PICTUREBOOK, as_folder, pack_folder


def model_location(identifier: str, subfolder: str = "") -> str:
    """What `from_pretrained` takes for `identifier`: a folder (of the pack: its `subfolder`), or the hub id as it is.

    Raises ConfigError for a path that is no folder, and where the pack is not installed.
    """
    if identifier == PICTUREBOOK:
        return str(pack_folder() / subfolder)
    return str(as_folder(identifier) or identifier)


def native_px(model: ModelConfig) -> int:
    """The height and width in px at which the model was trained: `unet.sample_size` times the latent factor."""
    unet = _read_json(model.id, model.revision, "unet/config.json")
    size = unet.get("sample_size")
    if not isinstance(size, int):
        raise ConfigError(
            f"model {model.id!r}: unet/config.json has no whole number `sample_size`; use an SDXL or Stable Diffusion "
            "model"
        )
    return size * latent_factor(model)


def latent_factor(model: ModelConfig) -> int:
    """Pixels per latent cell along an axis: 2 to the power of the VAE's down-samplings (8 for SDXL)."""
    vae = _read_json(model.id, model.revision, "vae/config.json")
    channels = vae.get("block_out_channels")
    if not isinstance(channels, list) or not channels:
        raise ConfigError(
            f"model {model.id!r}: vae/config.json has no list `block_out_channels`; use an SDXL or Stable Diffusion "
            "model"
        )
    return 2 ** (len(channels) - 1)


@lru_cache(maxsize=64)
def _read_json(identifier: str, revision: str | None, name: str) -> dict[str, Any]:
    location = model_location(identifier)
    try:
        if location != identifier or Path(location).is_dir():
            path = Path(location) / name
        else:
            import huggingface_hub

            path = Path(huggingface_hub.hf_hub_download(identifier, name, revision=revision))
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        # OSError: no such file, no network, not in the cache. ValueError: not JSON, or not a valid hub id.
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model {identifier!r}: cannot read {name} ({reason}); give a folder in diffusers format, "
            "a hub id that is in the local cache, or `picturebook`"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"model {identifier!r}: {name} is not a JSON object; download the model again")
    return values
