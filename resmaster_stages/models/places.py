"""Resolves the place of a model's files, the device of its parts and their number format.

This module imports torch only in the functions for the device and the number format.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resmaster_stages.config.part import LONGEST_SHOWN
from resmaster_stages.errors import ConfigError, did_you_mean, first_line
from resmaster_stages.models.identity import PACK_MODELS, as_folder, pack_folder

if TYPE_CHECKING:
    import torch


def location(identifier: str, subfolder: str = "") -> str:
    """`identifier` as `from_pretrained` takes it: a folder (for the pack its `subfolder`), or the hub id unchanged.

    Raises ConfigError for a path that is not a folder, and if the pack is not installed.
    """
    if identifier in PACK_MODELS:
        return str(pack_folder() / subfolder)
    return str(as_folder(identifier) or identifier)


def at_hub(identifier: str) -> bool:
    """Whether `identifier` is a hub id. Raises ConfigError for a path that is not a folder."""
    return identifier not in PACK_MODELS and as_folder(identifier) is None


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
    except (OSError, ValueError, RecursionError) as error:
        # OSError: no such file, no network, or not in the cache. ValueError: not JSON, or not a valid hub id.
        # RecursionError: JSON that is nested too deeply.
        raise ConfigError(
            f"model {identifier!r}{did_you_mean(identifier, PACK_MODELS)}: cannot read {name} ({first_line(error)}); "
            "give the top folder of a model in diffusers format, a hub id that is in the local cache (HF_HOME), or "
            "`picturebook`"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"model {identifier!r}: {name} is not a JSON object; download the model again")
    return values


@contextmanager
def loading(model_id: str, what: str) -> Iterator[None]:
    """Turns errors of loading in the block into a ConfigError of one line that names the model."""
    try:
        with whole_weights(model_id):
            yield
    except ConfigError:
        raise
    except Exception as error:  # loaders raise many kinds of errors; the user's remedy is the same
        if "tiktoken" in str(error) and (line := why_unreadable_tokenizer()):  # what Transformers tries in the end
            raise ConfigError(f"model {model_id}: {line}") from error
        raise ConfigError(
            f"model {model_id}: cannot load {what} ({reason_of(error, model_id)}); check the name, give a folder "
            "with safetensors, or set HF_HOME to a cache that has it"
        ) from error


SENTENCEPIECE = "spiece.model"
"""File of a T5 tokenizer in models that were published without `tokenizer.json` (PixArt)."""


def why_unreadable_tokenizer() -> str:
    """Why `SENTENCEPIECE` cannot be read on this machine; "" if it can."""
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    here = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    missing = [package for package, found in here.items() if not found]
    if not missing:
        return ""
    return (
        f"its tokenizer is a {SENTENCEPIECE}, and reading that needs {' and '.join(missing)}; pip install "
        "'resmaster-pipeline[t5]'"
    )


class _Reports(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


_FILLED = re.compile(r"^(.+?)\s*\|\s*MISSING|newly initialized: \['([^']+)'", re.MULTILINE)
"""How Transformers and diffusers log that they made weights up."""


@contextmanager
def whole_weights(place: str) -> Iterator[None]:
    """Raises ValueError after the block if a model was loaded in it whose files lack weights.

    Transformers and diffusers fill them with random numbers, and only log that. Raises ValueError before the block if a
    configuration in the folder `place` asks for so many layers that making them would not end.
    """
    _refuse_endless(place)
    logs = [logging.getLogger(f"{library}.modeling_utils") for library in ("transformers", "diffusers.models")]
    reports, before = _Reports(), [(log, log.level, log.propagate) for log in logs]
    for log in logs:
        log.addHandler(reports)
        log.setLevel(logging.WARNING)
        log.propagate = False
    try:
        yield
    finally:
        for log, level, propagate in before:
            log.removeHandler(reports)
            log.setLevel(level)
            log.propagate = propagate
    for text in reports.texts:
        if missing := _FILLED.search(re.sub(r"\x1b\[[0-9;]*m", "", text)):
            raise ValueError(f"its files lack the weights {missing[1] or missing[2]}")


def _files(place: str, pattern: str) -> list[Path]:
    """The files of a model in the folder `place`, its parts' included; none for a hub id."""
    folder = Path(place).expanduser()
    return sorted([*folder.glob(pattern), *folder.glob(f"*/{pattern}")])


MAX_LAYERS = 10_000
"""Far more layers than any model has."""


def _refuse_endless(place: str) -> None:
    """Raises ValueError for a model's configuration with more than `MAX_LAYERS` layers."""
    for file in _files(place, "config.json"):
        found = re.findall(r'"(\w*layers\w*)"\s*:\s*(\d+)', file.read_text(encoding="utf-8", errors="replace"))
        for name, number in found:
            if len(number) > 9 or int(number) > MAX_LAYERS:
                raise ValueError(f"{file}: {name} is larger than {MAX_LAYERS:,}")


MAX_HEADER_BYTES = 100_000_000
"""Longest header of a safetensors file, as its own library has it."""


def reason_of(error: Exception, place: str) -> str:
    """Why a model does not load, in a few words: the first damaged file in the folder `place`, if one is found, else
    what the loader said."""
    found = ((file, _damage(file)) for kind in ("json", "safetensors") for file in _files(place, f"*.{kind}"))
    file, damage = next(((file, damage) for file, damage in found if damage), (None, ""))
    return f"{file}: {damage}" if file else first_line(error).rstrip(".")


def _damage(file: Path) -> str:
    """What is wrong with a JSON or safetensors file, as far as a look at its header shows; "" if nothing is."""
    try:
        if file.suffix == ".json":
            values = json.loads(file.read_text(encoding="utf-8"))
            return "" if isinstance(values, dict) else "is not a JSON object"
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            rest = file.stat().st_size - 8 - length
            if length > MAX_HEADER_BYTES or rest < 0:
                return "is cut off, or its header is damaged"
            tensors = json.loads(opened.read(length))
            ends = [facts["data_offsets"][1] for name, facts in tensors.items() if name != "__metadata__"]
            return "" if max(ends, default=0) == rest else "is cut off, or its header is damaged"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"cannot be read ({first_line(error)})"


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


def resolve_dtype(name: str, device: torch.device, half: str = "float16") -> torch.dtype:
    """The number format that a configuration names. `auto` is `half` on CUDA and float32 elsewhere."""
    import torch

    if name == "auto":
        name = half if device.type == "cuda" else "float32"
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
