"""Image adapters of FLUX.1 and Chroma from files: the plain IP-Adapter (XLabs) and Redux.

The kind of an adapter is recognised by the names of its tensors. An adapter that fits another base model is refused
before its weights are loaded.

Invariant: what is refused here is refused, in the same words, when the model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from resmaster_stages.config.model import IpAdapterConfig, ModelConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.bases import adapter_files
from resmaster_stages.models.places import loading

if TYPE_CHECKING:
    import torch

AdapterKind = Literal["plain", "redux"]

_KEYS = re.compile(
    r"double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_k_proj\.weight|ip_adapter\.(\d+)\.to_k_ip\.weight"
)
"""Names of the tensors that make an image's keys, by XLabs and by diffusers. The number is that of the block."""


_IMAGE = ("ip_adapter_proj_model.proj.weight", "image_proj.proj.weight")
"""Names of the tensor that reads an image's embedding."""


def kind_of(tensors: Mapping[str, tuple[int, ...]], adapter: IpAdapterConfig) -> AdapterKind:
    """The kind of an adapter with `tensors` (name -> shape). Raises ConfigError for other kinds."""
    matrices = [name for name, shape in tensors.items() if len(shape) == 2]
    if {"redux_up.weight", "redux_down.weight"} <= set(matrices):
        return "redux"
    if not set(matrices).isdisjoint(_IMAGE) and any(_KEYS.fullmatch(name) for name in matrices):
        return "plain"
    raise ConfigError(
        f"{adapter.weight_name} of {adapter.id} is no IP-Adapter that FLUX.1 can use; choose a plain one, such as "
        "XLabs-AI/flux-ip-adapter-v2, or Redux"
    )


def require_fit(
    tensors: Mapping[str, tuple[int, ...]], adapter: IpAdapterConfig, transformer: Mapping[str, Any]
) -> AdapterKind:
    """The kind of an adapter that fits a transformer with the configuration `transformer`.

    Raises ConfigError for other kinds, and for adapters of another base model.
    """
    kind, read = kind_of(tensors, adapter), transformer.get("joint_attention_dim")
    if kind == "redux":
        _require_equal(adapter, "numbers per text token", tensors["redux_down.weight"][0], read)
        return kind
    keys = [shape for name, shape in tensors.items() if _KEYS.fullmatch(name) and len(shape) == 2]
    _require_equal(adapter, "double blocks", len(keys), transformer.get("num_layers"))
    _require_equal(adapter, "numbers per text token", keys[0][1], read)
    return kind


def _require_equal(adapter: IpAdapterConfig, what: str, found: int, needed: Any) -> None:
    if found != needed:
        raise ConfigError(
            f"{adapter.weight_name} of {adapter.id} is for a transformer with {found} {what}, and this one has "
            f"{needed}; choose the adapter of this base model"
        )


def require_encoder_fit(
    tensors: Mapping[str, tuple[int, ...]], adapter: IpAdapterConfig, encoder: Mapping[str, Any]
) -> None:
    """Raise ConfigError unless an adapter reads what an image encoder with the configuration `encoder` makes."""
    vision = encoder.get("vision_config", encoder)  # a whole CLIP or SigLIP, or its image encoder alone
    if not isinstance(vision, dict):
        raise ConfigError(f"{adapter.encoder_place()[0]} is no image encoder; set model.ip_adapter.image_encoder")
    if kind_of(tensors, adapter) == "redux":
        read, made = tensors["redux_up.weight"][1], vision.get("hidden_size", 768)
    else:
        read = next(shape[1] for name, shape in tensors.items() if name in _IMAGE and len(shape) == 2)
        made = vision.get("projection_dim", 512)
    if read != made:
        raise ConfigError(
            f"{adapter.weight_name} of {adapter.id} reads {read} numbers of an image, and the image encoder of "
            f"{adapter.encoder_place()[0]} makes {made}; set model.ip_adapter.image_encoder to the adapter's own, "
            "which is openai/clip-vit-large-patch14 for XLabs' adapters"
        )


checks = partial(adapter_files.checks_of, require_fit, require_encoder_fit)
"""What can be checked of `model.ip_adapter` before anything is loaded."""


def load(pipe: Any, config: ModelConfig, dtype: torch.dtype) -> None:
    """Load `model.ip_adapter` and its image encoder into `pipe`. Raises ConfigError."""
    adapter = config.ip_adapter
    assert adapter is not None
    adapter_files.require_safetensors(adapter)
    with loading(adapter.id, "the IP-Adapter"):
        tensors = adapter_files.downloaded(adapter)
        kind = require_fit(tensors, adapter, pipe.transformer.config)
        if kind == "redux":
            _load_redux(pipe, adapter, dtype)
            return
        encoder = adapter_files.load_encoder("CLIPVisionModelWithProjection", adapter, dtype)
        require_encoder_fit(tensors, adapter, encoder.config.to_dict())
        pipe.register_modules(image_encoder=encoder)
        adapter_files.load_weights(pipe, adapter, "image_encoder_pretrained_model_name_or_path")


def _load_redux(pipe: Any, adapter: IpAdapterConfig, dtype: torch.dtype) -> None:
    """Load Redux' projection and its SigLIP into `pipe`, as one image encoder."""
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
    from safetensors.torch import load_file

    from resmaster_stages.models.flux_adapters import ReduxEncoder

    state = load_file(adapter_files.weights_file(adapter))
    projection = ReduxImageEncoder(state["redux_up.weight"].shape[1], state["redux_down.weight"].shape[0])
    projection.load_state_dict(state)
    vision = adapter_files.load_encoder("SiglipVisionModel", adapter, dtype)
    require_encoder_fit(adapter_files.tensors(adapter), adapter, vision.config.to_dict())
    pipe.register_modules(image_encoder=ReduxEncoder(vision, projection.to(dtype)).eval())
