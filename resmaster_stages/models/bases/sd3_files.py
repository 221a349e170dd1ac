"""The IP-Adapter of Stable Diffusion 3.5 (InstantX) from files: a resampler of SigLIP's states that reads the timestep.

Invariant: what is refused here is refused, in the same words, when the model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from resmaster_stages.config.model import IpAdapterConfig, ModelConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.bases import adapter_files
from resmaster_stages.models.places import loading

if TYPE_CHECKING:
    import torch

_PARTS = (
    "image_proj.proj_in.weight",
    "image_proj.proj_out.weight",
    "image_proj.latents",
    "image_proj.time_embedding.linear_1.weight",
    "ip_adapter.0.norm_ip.linear.weight",
    "ip_adapter.0.to_k_ip.weight",
)
"""Tensors that only an adapter of this kind has."""


def require_fit(tensors: adapter_files.Shapes, adapter: IpAdapterConfig, transformer: Mapping[str, Any]) -> None:
    """Raise ConfigError unless an adapter with `tensors` (name -> shape) fits a transformer with the configuration
    `transformer`."""
    if not all(part in tensors for part in _PARTS):
        raise ConfigError(
            f"{adapter.weight_name} of {adapter.id} is no IP-Adapter that Stable Diffusion 3.5 can use; choose one in "
            "diffusers' format, such as guiyrt/InstantX-SD3.5-Large-IP-Adapter-diffusers"
        )
    try:
        width = transformer.get("attention_head_dim", 64) * transformer.get("num_attention_heads", 18)
        layers = transformer.get("num_layers", 18) + len(transformer.get("dual_attention_layers", ()))
    except TypeError:
        raise ConfigError("transformer/config.json does not tell its layers; download the model again") from None
    found = sum(re.fullmatch(r"ip_adapter\.\d+\.to_k_ip\.weight", name) is not None for name in tensors)
    if (found, tensors["ip_adapter.0.to_k_ip.weight"][0]) != (layers, width):
        raise ConfigError(
            f"{adapter.weight_name} of {adapter.id} is for {found} layers of width "
            f"{tensors['ip_adapter.0.to_k_ip.weight'][0]}, and the transformer has {layers} of width {width}; choose "
            "the adapter of this base model"
        )


def require_encoder_fit(tensors: adapter_files.Shapes, adapter: IpAdapterConfig, encoder: Mapping[str, Any]) -> None:
    """Raise ConfigError unless an adapter reads what an image encoder with the configuration `encoder` makes."""
    vision = encoder.get("vision_config", encoder)  # a whole SigLIP, or its image encoder alone
    made = vision.get("hidden_size") if isinstance(vision, dict) else None
    read = tensors["image_proj.proj_in.weight"][1]
    if read != made:
        raise ConfigError(
            f"{adapter.weight_name} of {adapter.id} reads {read} numbers of a part of an image, and the image encoder "
            f"of {adapter.encoder_place()[0]} makes {made}; set model.ip_adapter.image_encoder to the adapter's own, "
            "which is google/siglip-so400m-patch14-384 for InstantX' adapter"
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
        require_fit(tensors, adapter, pipe.transformer.config)
        encoder = adapter_files.load_encoder("SiglipVisionModel", adapter, dtype)
        require_encoder_fit(tensors, adapter, encoder.config.to_dict())
        pipe.register_modules(image_encoder=encoder)
        adapter_files.load_weights(pipe, adapter)
