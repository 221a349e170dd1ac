"""Finds out from a UNet model's files, before its weights are loaded, whether the engine can use the model.

Invariant: what is refused here is refused, in the same words, when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from resmaster_stages.config.model import IpAdapterConfig, ModelConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.bases import adapter_files, control_files, few_step, few_step_files
from resmaster_stages.models.bases.base import NO_ADAPTER, NO_CONTROL, NO_TIME_SHIFT, Demand
from resmaster_stages.models.files import (
    DIFFUSERS,
    TRANSFORMERS,
    Check,
    NotOnThisMachine,
    folder_with,
    object_in,
    require_tokenizer,
    require_weights,
    say_missing,
)
from resmaster_stages.models.identity import PICTUREBOOK
from resmaster_stages.models.schedule import require_path

PACK_ADAPTER = IpAdapterConfig(
    id=PICTUREBOOK, subfolder="ip_adapter", weight_name="ip-adapter.safetensors", image_encoder_folder="image_encoder"
)
"""The place of the embedded pack's IP-Adapter."""

OTHER_ADAPTERS = ("image_proj.proj.3.", "image_proj.perceiver_resampler.", "image_proj.norm.weight")
"""How tensors of IP-Adapters begin that are neither plain nor Plus: full-face, and the kinds of FaceID."""


def configured_adapter(config: ModelConfig) -> IpAdapterConfig | None:
    """The place of the model's IP-Adapter, or None."""
    return config.ip_adapter or (PACK_ADAPTER if config.id == PICTUREBOOK else None)


def require_plain(told_sizes: bool, unet: Mapping[str, Any], latent_channels: Any, encoders: int) -> None:
    """Raise ConfigError for variants that this engine cannot use.

    told_sizes: whether the UNet is one of SDXL. unet: its configuration. latent_channels: of the VAE. encoders: number
    of text encoders.
    """
    if told_sizes and encoders < 2:
        raise ConfigError("it looks like an SDXL refiner (one text encoder); give an SDXL base model")
    if unet.get("addition_embed_type") != ("text_time" if told_sizes else None):
        raise ConfigError(f"its UNet reads {unet.get('addition_embed_type')}; give a plain base model")
    if unet.get("in_channels", 4) != latent_channels or unet.get("time_cond_proj_dim") is not None:
        raise ConfigError("it is an inpainting, editing or LCM variant; give a plain base model")


def checks(told_sizes: bool, config: ModelConfig, demand: Demand) -> Iterator[Check]:
    """What can be checked of a model before its weights are loaded."""
    yield "model.id", partial(_check_parts, told_sizes, config)
    if config.vae is not None:
        yield "model.vae", partial(_check_vae, config)
    adapter = configured_adapter(config)
    if adapter is not None:
        yield "model.ip_adapter", partial(_check_adapter, adapter)
        yield "model.ip_adapter", partial(_check_encoder, config, adapter)
    elif demand.image_prompts:
        yield "model.ip_adapter", partial(_refuse, NO_ADAPTER.format(config.id))
    if config.controlnet is not None:
        yield "model.controlnet", partial(_check_control, config, demand.control)
    elif demand.control is not None:
        yield "model.controlnet", partial(_refuse, NO_CONTROL.format(config.id))
    if demand.time_shift:
        yield "upscale.time_shift", partial(_refuse, NO_TIME_SHIFT.format(config.id))
    for asked in demand.sampling:
        yield f"{asked.part}.steps", partial(_check_path, config, asked.steps or 1)
    if config.few_step is not None:
        yield "model.few_step", partial(few_step_files.check, config)
        for asked in demand.sampling:
            if asked.part == "upscale":
                yield "upscale", partial(few_step.check_sampling, config, asked)


def _refuse(message: str) -> None:
    raise ConfigError(message)


def _folder(config: ModelConfig) -> Path:
    return folder_with(config.id, "model_index.json", config.revision)


def _json_of(config: ModelConfig, name: str) -> dict[str, Any]:
    return object_in(folder_with(config.id, name, config.revision) / name)


def _vae_config(config: ModelConfig) -> dict[str, Any]:
    if config.vae is None:
        return _json_of(config, "vae/config.json")
    return object_in(folder_with(config.vae, "config.json") / "config.json")


def _check_parts(told_sizes: bool, config: ModelConfig) -> None:
    """The kind of the UNet, and the files of all parts but a VAE and an image encoder from elsewhere."""
    index, unet = _json_of(config, "model_index.json"), _json_of(config, "unet/config.json")
    encoders = sum(index.get(name) not in (None, [None, None]) for name in ("text_encoder", "text_encoder_2"))
    try:
        channels = _latent_channels(config, unet)
    except (ConfigError, NotOnThisMachine):  # the check of model.vae tells of it
        channels = unet.get("in_channels", 4)
    require_plain(told_sizes, unet, channels, encoders)
    folder = _folder(config)
    if config.variant and not any(f".{config.variant}" in path.name for path in folder.glob("*/*.safetensors")):
        say_missing(config.id, f"model.variant: no weights in {folder} are of the variant {config.variant!r}")
    weights = {"unet": DIFFUSERS, "text_encoder": TRANSFORMERS}
    if told_sizes:
        weights["text_encoder_2"] = TRANSFORMERS
    if config.vae is None:
        weights["vae"] = DIFFUSERS
    for part, stem in weights.items():
        require_weights(config.id, folder / part, stem, config.variant)
    for part in ("tokenizer", "tokenizer_2")[: 1 + told_sizes]:
        require_tokenizer(config.id, folder / part)


def _latent_channels(config: ModelConfig, unet: Mapping[str, Any]) -> Any:
    """Of the VAE; of the UNet if what is given as a VAE is none, of which the check of model.vae tells."""
    vae = _vae_config(config)
    known = config.vae is None or vae.get("_class_name") == "AutoencoderKL"
    return vae.get("latent_channels", 4 if known else unet.get("in_channels", 4))


def _check_vae(config: ModelConfig) -> None:
    assert config.vae is not None
    kind = _vae_config(config).get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise ConfigError(f"{config.vae} is {kind!r}, not an AutoencoderKL; give another VAE, or null")
    require_weights(config.vae, folder_with(config.vae, "config.json"), DIFFUSERS)


def _check_adapter(adapter: IpAdapterConfig) -> None:
    tensors = adapter_files.tensors(adapter)
    if not all(any(tensor.startswith(part) for tensor in tensors) for part in ("image_proj.", "ip_adapter.")):
        raise ConfigError(f"{adapter.weight_name} of {adapter.id} holds no IP-Adapter; choose another weight_name")
    if "image_proj.proj.weight" not in tensors and any(tensor.startswith(OTHER_ADAPTERS) for tensor in tensors):
        raise ConfigError(f"{adapter.weight_name} is an IP-Adapter of an unsupported kind; choose a plain or Plus one")


def _check_encoder(config: ModelConfig, adapter: IpAdapterConfig) -> None:
    if _json_of(config, "model_index.json").get("image_encoder") not in (None, [None, None]):
        require_weights(config.id, _folder(config) / "image_encoder", TRANSFORMERS, config.variant)
        return
    adapter_files.require_encoder(adapter)


def _check_control(config: ModelConfig, image: str | None) -> None:
    assert config.controlnet is not None
    levels = _json_of(config, "vae/config.json").get("block_out_channels")
    if not isinstance(levels, list):  # the check of the sizes tells of it
        return
    control_files.check(config.controlnet, _json_of(config, "unet/config.json"), 2 ** (len(levels) - 1), image)


def _check_path(config: ModelConfig, steps: int) -> None:
    index = _json_of(config, "model_index.json").get("scheduler")
    kind = index[1] if isinstance(index, list) and len(index) == 2 else "scheduler"
    require_path({"_class_name": kind, **_json_of(config, "scheduler/scheduler_config.json")}, steps)
