"""Resolves the place of a model's files, the device of its parts and their number format.

This module imports torch only in the functions for the device and the number format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.config.part import LONGEST_SHOWN
from resmaster_stages.errors import ConfigError, first_line
from resmaster_stages.models.identity import PICTUREBOOK, as_folder, pack_folder

if TYPE_CHECKING:
    import torch


def location(identifier: str, subfolder: str = "") -> str:
    """`identifier` as `from_pretrained` takes it: a folder (for the pack its `subfolder`), or the hub id unchanged.

    Raises ConfigError for a path that is not a folder, and if the pack is not installed.
    """
    if identifier == PICTUREBOOK:
        return str(pack_folder() / subfolder)
    return str(as_folder(identifier) or identifier)


def at_hub(identifier: str) -> bool:
    """Whether `identifier` is a hub id. Raises ConfigError for a path that is not a folder."""
    return identifier != PICTUREBOOK and as_folder(identifier) is None


def to_be_downloaded(model: ModelConfig) -> bool:
    """Whether loading the model begins with a download: it is at the hub, and the local cache has no weights of it."""
    if not at_hub(model.id):
        return False
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return False
    try:
        found = huggingface_hub.try_to_load_from_cache(model.id, "model_index.json", revision=model.revision)
    except ValueError:  # no valid hub id, which loading will say
        return False
    return not isinstance(found, str) or not any(Path(found).parent.rglob("*.safetensors"))


@dataclass(frozen=True)
class ModelFiles:
    """The JSON files of the pack, a folder or a hub id (from the local cache if it has them)."""

    id: str
    revision: str | None = None

    def json(self, name: str) -> dict[str, Any]:
        """The object in file `name`, e.g. `vae/config.json`. Raises ConfigError."""
        return _read_json(self.id, self.revision, name)


@lru_cache(maxsize=64)
def _read_json(identifier: str, revision: str | None, name: str) -> dict[str, Any]:
    place = location(identifier)
    try:
        if place != identifier or Path(place).is_dir():
            path = Path(place) / name
        else:
            import huggingface_hub

            path = Path(huggingface_hub.hf_hub_download(identifier, name, revision=revision))
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        # OSError: no such file, no network, or not in the cache. ValueError: not JSON, or not a valid hub id.
        raise ConfigError(
            f"model {identifier!r}: cannot read {name} ({first_line(error)}); give the top folder of a model in "
            "diffusers format, a hub id that is in the local cache (HF_HOME), or `picturebook`"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"model {identifier!r}: {name} is not a JSON object; download the model again")
    return values


@contextmanager
def loading(model_id: str, what: str) -> Iterator[None]:
    """Turns errors of loading in the block into a ConfigError of one line that names the model."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"model {model_id}: cannot load {what} ({first_line(error).rstrip('.')}); check the name, give a folder "
            "with safetensors, or set HF_HOME to a cache that has it"
        ) from error


def require_device_name(name: str, setting: str = "model.device") -> None:
    """Raise ConfigError if `name` is no device, on whatever machine."""
    if not re.fullmatch(r"auto|mps|(cpu|cuda)(:\d{1,3})?", name):
        raise ConfigError(f"{setting}: {name[:LONGEST_SHOWN]!r} is no device; use auto, cpu, cuda, cuda:1 or mps")


def resolve_device(name: str, setting: str = "model.device") -> torch.device:
    """The device that a configuration's `setting` names. `auto` is CUDA if there is a CUDA device, else the CPU.

    Raises ConfigError.
    """
    import torch

    require_device_name(name, setting)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{setting}: {name} is not there ({torch.cuda.device_count()} CUDA devices); use auto or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"{setting}: mps is not there; use auto or cpu")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format that a configuration names. `auto` is float16 on CUDA and float32 elsewhere."""
    import torch

    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """The number format of the VAE beside a denoiser in `dtype`: float32 beside bfloat16, else `dtype`.

    The last layers of an encoder subtract large numbers from each other, and the 8 bits of a bfloat16 weight are too
    few for that. Rounding picturebook's `quant_conv` alone shifts the first channel of the reference's latents by 3 %
    of their spread, and the low-frequency swap carries the shift into the image. The weights must be loaded in float32,
    because a VAE that was rounded stays rounded when it is upcast. The VAE takes a few percent of an image's time
    (docs/speed.md).
    """
    import torch

    return torch.float32 if dtype == torch.bfloat16 else dtype
