"""Says which models are fetched from the hub before an image can be upscaled, and how much that is.

Nothing is fetched here but the list of a repository's files, and only for models that the local cache lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.models.places import at_hub

PATIENCE_SECONDS = 10.0
"""How long the hub may take to say how large a model is."""
INDEX, CONFIG = "model_index.json", "config.json"
"""Files that say that a folder is a pipeline of diffusers, or a model."""
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
_VARIANTS = (".fp16.", ".bf16.", ".non_ema.")


@dataclass(frozen=True)
class Download:
    """A model that is fetched before the work begins."""

    model: str
    bytes: int | None
    """None: the hub does not say."""


@dataclass(frozen=True)
class _Needed:
    """Weights at the hub: a file, or those in the folder of a file that says what is there."""

    model: str
    revision: str | None
    file: str
    variant: str | None = None


def downloads_of(config: DatasetConfig) -> tuple[Download, ...]:
    """What is fetched before `config.upscale` can work. Empty if nothing is fetched, or nothing may be."""
    at_the_hub = [needed for needed in _needed(config) if at_hub(needed.model)]
    if not at_the_hub:
        return ()
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return ()
    absent: dict[str, list[_Needed]] = {}
    for needed in at_the_hub:
        if not _is_cached(needed):
            absent.setdefault(needed.model, []).append(needed)
    return tuple(Download(model, _bytes_of(parts)) for model, parts in absent.items())


def _needed(config: DatasetConfig) -> Iterator[_Needed]:
    """The weights that upscaling reads."""
    method, captions = config.upscale, config.captions
    if method.base_model:
        yield from _of_model(config.model)
        adapter, control = config.model.ip_adapter, config.model.controlnet
        if adapter is not None and method.uses("image_prompt"):
            yield _Needed(adapter.id, adapter.revision, _inside(adapter.subfolder, adapter.weight_name))
            encoder, folder, revision = adapter.encoder_place()
            yield _Needed(encoder, revision, _inside(folder, CONFIG))
        if control is not None and method.uses("control"):
            yield _Needed(control.id, control.revision, _inside(control.folder, CONFIG), control.variant)
    if method.uses("captions") and captions.source == "model":
        yield _Needed(captions.model, captions.revision, CONFIG)
    if method.uses("captions") and (judge := config.caption_clip()):
        yield _Needed(*judge, CONFIG)


def _of_model(model: ModelConfig) -> Iterator[_Needed]:
    yield _Needed(model.id, model.revision, INDEX, model.variant)
    if model.vae is not None:
        yield _Needed(model.vae, None, CONFIG)
    if (few := model.few_step) is not None:
        yield _Needed(few.id, few.revision, _inside(few.subfolder, few.weight_name or CONFIG))


def _inside(folder: str, file: str) -> str:
    return f"{folder}/{file}" if folder else file


def _is_cached(needed: _Needed) -> bool:
    """Whether the local cache has weights of it. It may have the small files alone, which `plan` reads."""
    import huggingface_hub

    try:
        found = huggingface_hub.try_to_load_from_cache(needed.model, needed.file, revision=needed.revision)
    except ValueError:  # no valid hub id, which loading will say
        return True
    if not isinstance(found, str):
        return False
    return found.endswith(_WEIGHTS) or any(path.suffix in _WEIGHTS for path in Path(found).parent.rglob("*"))


def _bytes_of(parts: Sequence[_Needed]) -> int | None:
    """The size of the weights of one model; None if the hub does not say."""
    import huggingface_hub
    from httpx2 import HTTPError

    sizes: dict[str, int] = {}
    for needed in parts:
        try:
            found = huggingface_hub.HfApi().model_info(
                needed.model, revision=needed.revision, files_metadata=True, timeout=PATIENCE_SECONDS
            )
        except (HTTPError, OSError, ValueError):  # out of reach, gone, or locked
            return None
        files = {each.rfilename: each.size or 0 for each in found.siblings or ()}
        sizes |= {name: files[name] for name in _fetched(needed, files)}
    return sum(sizes.values()) or None


def _fetched(needed: _Needed, files: dict[str, int]) -> Iterator[str]:
    """Which of a repository's files are fetched, as loaders choose them: safetensors of the variant in each folder."""
    if needed.file.endswith(_WEIGHTS):
        yield from {needed.file} & files.keys()
        return
    folder, _, name = needed.file.rpartition("/")
    weights: dict[str, list[str]] = {}  # by folder
    for each in files:
        if each.endswith(".safetensors"):
            weights.setdefault(each.rpartition("/")[0], []).append(each)
    # a pipeline's weights lie in the folders of its parts, a model's beside its configuration
    folders = [each for each in weights if each != ""] if name == INDEX else [folder]
    for each in folders:
        here = weights.get(each, [])
        of_variant = [file for file in here if needed.variant and f".{needed.variant}." in file]
        yield from of_variant or [file for file in here if not any(mark in file for mark in _VARIANTS)]
