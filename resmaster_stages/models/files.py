"""Reads what the files of a model say before its weights are loaded: whether they are on this machine, and whole.

Only JSON files and the headers of safetensors are read. Nothing is downloaded: of a hub id, the local cache is read.
This module does not import torch. It does not know families of models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from resmaster_stages.config.part import LONGEST_SHOWN
from resmaster_stages.errors import ConfigError, first_line
from resmaster_stages.models.identity import NetworkFile, own_network
from resmaster_stages.models.places import SENTENCEPIECE, at_hub, location, why_unreadable_tokenizer

Check = tuple[str, Callable[[], object]]
"""A setting, and a function that raises ConfigError if what the setting names cannot be used. The function raises
`NotOnThisMachine` if that is not known yet."""

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
"""How the names of files with weights begin, by the library that wrote them."""


class NotOnThisMachine(Exception):
    """The files are at the hub, and not in the local cache, so nothing is known of them yet."""

    def __init__(self, model_id: str) -> None:
        super().__init__(f"{model_id}, which is not on this machine yet")


def folder_with(model_id: str, name: str, revision: str | None = None, subfolder: str = "") -> Path:
    """The folder on this machine that holds the file `name` of a model: of a folder, the pack or a hub id.

    subfolder: the folder inside the pack that `name` is in; folders and hub ids have `name` at their top.
    Raises ConfigError (no such folder or file, no valid hub id, not in the local cache and no download allowed) and
    NotOnThisMachine.
    """
    place = location(model_id, subfolder)
    if not at_hub(model_id):
        if not (Path(place) / name).is_file():
            raise ConfigError(f"{model_id} has no file {name}; give the folder of a model, a hub id, or `picturebook`")
        return Path(place)
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        found = huggingface_hub.try_to_load_from_cache(model_id, name, revision=revision)
    except ValueError as error:
        raise ConfigError(
            f"{model_id!r} is neither a folder nor a hub id ({first_line(error)}); check the name"
        ) from None
    if isinstance(found, str):
        return Path(found).parents[len(Path(name).parts) - 1]
    if HF_HUB_OFFLINE:
        raise ConfigError(
            f"{model_id} has no {name} in the local cache, and HF_HUB_OFFLINE forbids a download; unset it, or set "
            "HF_HOME to a cache that has the model"
        )
    raise NotOnThisMachine(model_id)


def find_network(config: NetworkFile) -> Path:
    """The file on this machine of a network's weights. Raises ConfigError and NotOnThisMachine."""
    path = own_network(config)
    if path is not None:
        return path
    assert config.weight_name is not None
    return folder_with(config.model, config.weight_name, config.revision) / config.weight_name


def object_in(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({first_line(error)}); download the model again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a JSON object; download the model again")
    return values


def tensors_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor in a safetensors file, from its header. Raises ConfigError if the file is cut off or
    damaged there."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as safetensors ({first_line(error)}); download it again") from None


def require_weights(model_id: str, folder: Path, stem: str, variant: str | None = None) -> None:
    """Raise ConfigError unless `folder` of a model holds whole safetensors whose names begin with `stem`.

    variant: part of the names, such as `fp16`; files without the part are used where none has it. Raises
    NotOnThisMachine if the model is at the hub and its weights are still to be downloaded.
    """
    for ending in _endings(variant):
        names = _named(folder, stem + ending)
        indices = {name for name in names if name.endswith(".json")}
        for name in sorted(indices):
            listed = object_in(folder / name).get("weight_map")
            if not isinstance(listed, dict) or not names.issuperset(listed.values()):
                say_missing(model_id, f"{folder} lacks files that {name} lists")
        for name in sorted(names - indices):
            tensors_of(folder / name)
        if names - indices:
            return
    say_missing(model_id, f"{folder} has no file {stem}.safetensors")


def weight_files(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """The files that `require_weights` finds, without indices; empty if there are none."""
    for ending in _endings(variant):
        if found := [folder / name for name in sorted(_named(folder, stem + ending)) if not name.endswith(".json")]:
            return found
    return []


def _endings(variant: str | None) -> list[str]:
    return [f".{variant}", ""] if variant else [""]


def _named(folder: Path, stem: str) -> set[str]:
    """Names of the safetensors and their indices in `folder` that begin with `stem`."""
    shape = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
    return {path.name for path in folder.iterdir() if shape.fullmatch(path.name)} if folder.is_dir() else set()


def say_missing(model_id: str, what: str) -> NoReturn:
    """Raise ConfigError about a file that a model lacks, or NotOnThisMachine if the file is still to be downloaded."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if at_hub(model_id) and not HF_HUB_OFFLINE:
        raise NotOnThisMachine(model_id)
    raise ConfigError(f"{what}; download the model again, or give one with safetensors weights")


def require_tokenizer(model_id: str, folder: Path) -> None:
    """Raise ConfigError unless `folder` of a model holds the files of a tokenizer, which can be read here. Raises
    NotOnThisMachine as `require_weights` does."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        if not (folder / SENTENCEPIECE).is_file():
            say_missing(model_id, f"{folder} has no tokenizer.json, vocab.json or {SENTENCEPIECE}")
        if line := why_unreadable_tokenizer():
            raise ConfigError(line)
    if (settings := folder / "tokenizer_config.json").is_file():
        longest = object_in(settings).get("model_max_length", 1)
        if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 1:
            raise ConfigError(
                f"{settings}: model_max_length is {repr(longest)[:LONGEST_SHOWN]} and must be a number from 1; "
                "download the model again"
            )
