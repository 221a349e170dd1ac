"""The files of image adapters, whatever the base model: what must be there, and the image encoder beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resmaster_stages.config.model import IpAdapterConfig, ModelConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.files import TRANSFORMERS, Check, folder_with, object_in, require_weights, tensors_of
from resmaster_stages.models.places import ModelFiles, at_hub, loading, location

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]
"""Name -> shape of the tensors of a file."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of RGB in [0, 1] that is subtracted for a CLIP image encoder if nothing else is configured."""

CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of RGB that goes with `CLIP_MEAN`."""


def require_safetensors(adapter: IpAdapterConfig) -> None:
    """Raise ConfigError if the adapter's weights are pickled."""
    if not adapter.weight_name.endswith(".safetensors"):
        raise ConfigError(
            f"model.ip_adapter.weight_name: {adapter.weight_name} is not a .safetensors file; choose one that is"
        )


def weights_file(adapter: IpAdapterConfig) -> Path:
    """The file of the adapter's weights on this machine. Raises ConfigError and NotOnThisMachine."""
    require_safetensors(adapter)
    name = (Path(adapter.subfolder) / adapter.weight_name).as_posix()
    return folder_with(adapter.id, name, adapter.revision) / name


def tensors(adapter: IpAdapterConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor of the adapter. Raises ConfigError and NotOnThisMachine."""
    return tensors_of(weights_file(adapter))


def checks_of(
    fits: Callable[[Shapes, IpAdapterConfig, Mapping[str, Any]], object],
    encoder_fits: Callable[[Shapes, IpAdapterConfig, Mapping[str, Any]], object],
    config: ModelConfig,
) -> Iterator[Check]:
    """What can be checked of `model.ip_adapter` of a transformer before anything is loaded.

    fits: (tensors, adapter, the transformer's configuration) raises ConfigError unless they fit each other.
    encoder_fits: (tensors, adapter, the image encoder's configuration) does so for these. It gets tensors that fit.
    """
    adapter = config.ip_adapter
    assert adapter is not None

    def fitting() -> Shapes:
        found = tensors(adapter)
        fits(found, adapter, ModelFiles(config.id, config.revision).json("transformer/config.json"))
        return found

    yield "model.ip_adapter", fitting
    yield "model.ip_adapter", lambda: encoder_fits(fitting(), adapter, require_encoder(adapter))


def downloaded(adapter: IpAdapterConfig) -> dict[str, tuple[int, ...]]:
    """`tensors`, of a file that is downloaded from the hub if need be."""
    if at_hub(adapter.id):
        import huggingface_hub

        name = (Path(adapter.subfolder) / adapter.weight_name).as_posix()
        huggingface_hub.hf_hub_download(adapter.id, name, revision=adapter.revision)
    return tensors(adapter)


def require_encoder(adapter: IpAdapterConfig) -> dict[str, Any]:
    """The configuration of the adapter's image encoder, whose weights are there. Raises ConfigError and
    NotOnThisMachine."""
    place, inside, revision = adapter.encoder_place()
    name = (Path(inside) / "config.json").as_posix()
    folder = folder_with(place, name, revision) / inside
    require_weights(place, folder, TRANSFORMERS)
    return object_in(folder / "config.json")


def load_weights(pipe: Any, adapter: IpAdapterConfig, encoder_option: str = "image_encoder_folder") -> None:
    """Load the adapter's weights into `pipe`, which has its image encoder.

    encoder_option: what the pipeline's loader calls the place of an image encoder, of which it shall load none.
    """
    pipe.load_ip_adapter(
        location(adapter.id),
        subfolder=adapter.subfolder,
        weight_name=adapter.weight_name,
        revision=adapter.revision,
        **{encoder_option: None},
    )


def load_encoder(kind: str, adapter: IpAdapterConfig, dtype: torch.dtype) -> Any:
    """The adapter's image encoder on the CPU. kind: its class in Transformers. Raises ConfigError."""
    import transformers

    place, inside, revision = adapter.encoder_place()
    with loading(place, "the image encoder of the IP-Adapter"):
        return getattr(transformers, kind).from_pretrained(
            location(place), subfolder=inside, revision=revision, dtype=dtype, use_safetensors=True
        )
