"""Names the exact weights of models without loading them. The names are part of the stages' identities.

This module does not import torch. It cannot see that a hub id without a revision has got new weights on the hub. Name a
commit as the revision where that matters.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from resmaster_stages.config.dataset import SCORES, DatasetConfig, ScoreConfig
from resmaster_stages.config.model import FewStepConfig, ModelConfig
from resmaster_stages.config.reference import ReferenceConfig
from resmaster_stages.errors import ConfigError, first_line

PICTUREBOOK = "picturebook"
"""The id of the embedded model pack."""

PICTUREBOOK_AS_FLOW = "picturebook-as-flow"
"""The id of the pack's base model as a flow-matching model (`models.bases.as_flow`)."""

PACK_MODELS = (PICTUREBOOK, PICTUREBOOK_AS_FLOW)
"""The ids of base models whose files are the pack's."""

PACK_NETWORKS = ("captioner", "classifier", "clip", "control_net", "few_step", "super_resolution")
"""Folders of the pack that do not belong to its diffusion pipeline. Each is a separate model with its own identity."""


def pack_folder() -> Path:
    """The folder of the embedded pack. Raises ConfigError if it is not installed."""
    folder = Path(__file__).resolve().parent.parent / "picturebook" / "pack"
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"model picturebook: its weights are not installed ({folder}); reinstall, or name another model.id"
        )
    return folder


def _path_of(name: str) -> Path | None:
    """The path that a name may mean. None if it can mean none: too long, or the home folder of nobody."""
    try:
        path = Path(name).expanduser()
        path.is_dir()
    except (OSError, RuntimeError):
        return None
    return path


def as_folder(model_id: str) -> Path | None:
    """The local folder that a model id names, or None for a hub id.

    Raises ConfigError if the id is a file or a URL, or is written as a path and there is no such folder.
    """
    path = _path_of(model_id)
    if path is not None and path.is_dir():
        return path.resolve()
    if path is not None and path.is_file():
        raise ConfigError(f"model {model_id}: is a file; give the folder of a whole model, or a hub id")
    if "://" in model_id:
        raise ConfigError(f"model {model_id}: is a URL; give a hub id, which is owner/name, or a local folder")
    if model_id.startswith(("/", "./", "../", "~")) or model_id.count("/") > 1:
        raise ConfigError(f"model {model_id}: no such folder; check the path, or give a hub id such as owner/name")
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def _in_pack(name: Path, network: str | None) -> bool:
    """Whether a file of the pack belongs to `network`. None: to the diffusion pipeline and its IP-Adapter."""
    if network is not None:
        return name.parts[0] == network
    return name.parts[0] not in (*PACK_NETWORKS, "card.json")  # the card describes the weights and is not part of them


@lru_cache(maxsize=8)
def _pack_digest(folder: Path, network: str | None) -> str:
    """sha256 over the names and bytes of the pack's files, for one network or for the pipeline (None)."""
    hasher = hashlib.sha256()
    for path in _files(folder):
        if not _in_pack(path.relative_to(folder), network):
            continue
        hasher.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            hasher.update(hashlib.file_digest(file, "sha256").digest())
    return hasher.hexdigest()


def _folder_digest(folder: Path) -> str:
    """sha256 over the folder's JSON files and the names and sizes of all files. It is quick for many gigabytes."""
    hasher = hashlib.sha256()
    for path in _files(folder):
        content = path.read_bytes() if path.suffix == ".json" else b""
        hasher.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode() + content)
    return hasher.hexdigest()


def _source_identity(source: str, revision: str | None, network: str | None = None) -> str:
    """Name of the weights at `source`. `network`: which model of the embedded pack (default: its pipeline)."""
    if source in PACK_MODELS:
        return f"{source}@{_pack_digest(pack_folder(), network)[:16]}"
    folder = as_folder(source)
    if folder is not None:
        return f"{folder.name}@{_folder_digest(folder)[:16]}"
    return f"{source}@{revision or 'main'}"


def model_identity(config: ModelConfig) -> str:
    """Name of the weights that `config` loads, e.g. `picturebook@0123456789abcdef` or `owner/name@revision`.

    The embedded pack is named by its content, a folder by its JSON files and file sizes, a hub id by its revision. The
    names of a separate VAE and of an IP-Adapter are appended. Raises ConfigError for a folder that does not exist.
    """
    parts = [_source_identity(config.id, config.revision)]
    if config.vae:
        parts.append("vae=" + _source_identity(config.vae, None))
    if config.ip_adapter:
        adapter = config.ip_adapter
        where = json.dumps([adapter.subfolder, adapter.weight_name, adapter.image_encoder_folder])
        name = hashlib.sha256(where.encode()).hexdigest()[:8]
        parts.append(f"ip_adapter={_source_identity(adapter.id, adapter.revision)}#{name}")
        if adapter.image_encoder:
            parts.append("image_encoder=" + _source_identity(adapter.image_encoder, None))
    if config.few_step:
        parts.append("few_step=" + few_step_identity(config.few_step))
    return "+".join(parts)


def few_step_identity(config: FewStepConfig) -> str:
    """Name of the exact few-step weights: of a file by its content, of a folder as `model_identity` does.

    Raises ConfigError for a folder that does not exist.
    """
    name = "/".join(filter(None, (config.subfolder, config.weight_name)))
    folder = None if config.id in PACK_MODELS else as_folder(config.id)
    if folder is not None and (path := folder / name).is_file():
        found = path.stat()
        return f"{path.name}@{_file_digest(path, found.st_size, found.st_mtime_ns)[:16]}"
    return _source_identity(config.id, config.revision, "few_step") + (f"#{name}" if name else "")


def control_identity(config: ModelConfig) -> str | None:
    """Name of the ControlNet's exact weights, or None. Raises ConfigError for a folder that does not exist."""
    net = config.controlnet
    if net is None:
        return None
    inside = "#" + "/".join((net.subfolder, net.variant or "")) if net.subfolder or net.variant else ""
    return _source_identity(net.id, net.revision, "control_net") + inside


@dataclass(frozen=True)
class NetworkFile:
    """The place of the weights of a method's own network."""

    model: str
    """`picturebook` (the embedded pack's), a file, or a hub id together with `weight_name`."""
    weight_name: str | None = None
    """File on the hub."""
    revision: str | None = None
    """Commit or tag on the hub."""
    setting: str = "upscale.model"
    """The setting that names the place, for messages."""
    in_pack: bool = True
    """Whether the pack has a network of this kind."""


def latent_network(config: ReferenceConfig) -> NetworkFile:
    """The place of the weights of the network that enlarges latents, which must be given."""
    assert config.model is not None
    return NetworkFile(config.model, config.weight_name, config.revision, "upscale.reference.model", in_pack=False)


def own_network(config: NetworkFile) -> Path | None:
    """The file of a network's weights in the pack or of the user, or None for one at the hub.

    Raises ConfigError if there is no such file.
    """
    if config.in_pack and config.model == PICTUREBOOK:
        return pack_folder() / "super_resolution" / "model.safetensors"
    path = _path_of(config.model)
    if path is not None and path.is_file():
        return path.resolve()
    if config.weight_name is None:
        raise ConfigError(
            f"{config.setting}: {config.model} is no file; give {'picturebook, ' if config.in_pack else ''}a file of "
            "weights, or a hub id and weight_name"
        )
    return None


def network_file(config: NetworkFile) -> Path:
    """The file of a network's weights, downloaded from the hub if needed. Raises ConfigError."""
    if (path := own_network(config)) is not None:
        return path
    assert config.weight_name is not None
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(config.model, config.weight_name, revision=config.revision))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{config.setting}: cannot get {config.weight_name} of {config.model} ({first_line(error)}); "
            "check the name, or give a file"
        ) from None


@lru_cache(maxsize=4)
def _file_digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def network_identity(config: NetworkFile) -> str:
    """Name of a network's exact weights. A file is named by its content, a hub id by its revision.

    Raises ConfigError.
    """
    if config.in_pack and config.model == PICTUREBOOK:
        return _source_identity(PICTUREBOOK, None, "super_resolution")
    path = own_network(config)
    if path is None:
        return f"{config.model}/{config.weight_name}@{config.revision or 'main'}"
    found = path.stat()
    return f"{path.name}@{_file_digest(path, found.st_size, found.st_mtime_ns)[:16]}"


def score_identity(config: ScoreConfig) -> str:
    """Name of the exact weights of a score's model and head. A head is named by its content.

    Raises ConfigError for a folder or file that does not exist.
    """
    if config.head is None:
        return _source_identity(config.model, config.revision, "classifier")
    path = head_file(config)
    found = path.stat()
    head = f"{path.name}@{_file_digest(path, found.st_size, found.st_mtime_ns)[:16]}"
    return f"{_source_identity(config.model, config.revision, 'clip')}+head={head}"


def head_file(config: ScoreConfig) -> Path:
    """The file of a score's head, which must be given. Raises ConfigError if there is no such file."""
    assert config.head is not None
    path = _path_of(config.head)
    if path is None or not path.is_file():
        raise ConfigError(f"head: {config.head} is no file; give a file of linear layers as safetensors")
    return path.resolve()


def weights_of(config: DatasetConfig) -> Weights:
    """The names of all weights that a dataset is made with. Raises ConfigError for a folder that does not exist."""
    captions, quality = config.captions, config.quality
    local = captions.source == "model"
    judge = config.caption_clip()
    return Weights(
        model=model_identity(config.model.base),
        captioner=_source_identity(captions.model, captions.revision, "captioner") if local else None,
        clip=_source_identity(quality.clip, quality.clip_revision, "clip") if quality.clip else None,
        features=_source_identity(PICTUREBOOK, None, "classifier") if quality.features == "picturebook" else None,
        upscaler=config.upscale.weights(),
        caption_check=_source_identity(*judge, "clip") if judge else None,
        few_step=few_step_identity(config.model.few_step) if config.model.few_step else None,
        control=control_identity(config.model) if config.upscale.uses("control") else None,
        scores=tuple((name, score_identity(score)) for name in SCORES if (score := getattr(quality, name)) is not None),
        recaptioner=_recaptioner_identity(config),
    )


def _recaptioner_identity(config: DatasetConfig) -> str | None:
    captioner = config.recaptioner()
    if not config.recaption.styles or captioner.source != "model":
        return None
    return _source_identity(captioner.model, captioner.revision, "captioner")


@dataclass(frozen=True)
class Weights:
    """Names of the exact weights that a dataset is made with (`resmaster_stages.models.identity.weights_of`)."""

    model: str
    """The base model with its VAE and IP-Adapter."""
    captioner: str | None = None
    """The captioner. None if no model writes captions."""
    clip: str | None = None
    """The CLIP model of the quality stage. None if there is none."""
    features: str | None = None
    """The classifier of the pack, if it gives the quality stage's features. None if another network does, or none."""
    upscaler: str | None = None
    """The upscaling method's own network. None if it has none."""
    caption_check: str | None = None
    """The CLIP model that checks captions. None if captions are not checked."""
    few_step: str | None = None
    """The few-step weights of the high_res stage. None if the base model's denoiser makes all images."""
    control: str | None = None
    """The ControlNet. None if no image depends on one."""
    scores: tuple[tuple[str, str], ...] = ()
    """(field of `QualityConfig`, model with its head) of each score that the quality stage computes by a model."""
    recaptioner: str | None = None
    """The captioner of finished images. None if no model describes them."""
