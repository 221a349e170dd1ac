"""Loads a base model: from a model's name to its parts on a device.

The name is a hub id or a folder of a known family of base models, or the embedded pack. What is special to a family is
in `models.bases`. Only safetensors are read, and no remote code runs. `HF_HUB_OFFLINE=1` is respected.

Invariants:
- A user's own pipeline is never changed permanently. The engine restores everything that it must alter.
- The parts are used for inference only. Nothing here trains.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from diffusers.utils import logging as of_diffusers

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.errors import ConfigError, OutOfMemory
from resmaster_stages.models import occupancy
from resmaster_stages.models.acceleration import can_compile, compile_blocks, has_blocks, quantise_fp8, require_fp8
from resmaster_stages.models.bases import family_of, offload_of, require
from resmaster_stages.models.faults import device_faults
from resmaster_stages.models.identity import model_identity
from resmaster_stages.models.parts import Models
from resmaster_stages.models.places import resolve_device, resolve_dtype
from resmaster_stages.models.quiet import quiet

log = logging.getLogger(__name__)


def load_pipeline(config: ModelConfig) -> Any:
    """The pipeline that `config` names, on the CPU, with its VAE, IP-Adapter and ControlNet. Raises ConfigError."""
    family = family_of(config)
    if config.ip_adapter is not None and "image_prompts" not in family.abilities:
        raise ConfigError(
            f"model.ip_adapter: model {config.id} is a {family.name}, which takes none; set model.ip_adapter: null"
        )
    if config.few_step is not None:
        require(family, config.id, {"few_step_weights": "model.few_step"})
    if config.controlnet is not None:
        require(family, config.id, {"control": "model.controlnet"})
    with quiet(of_diffusers):
        return family.load(config, resolve_dtype(config.dtype, resolve_device(config.device), family.half))


_last: ModelConfig | None = None
"""The model that was loaded last."""


def _take_turns(one: ModelConfig, other: ModelConfig | None, device: torch.device) -> bool:
    """Whether two models are a base model and itself with few-step weights, of which one can wait in the CPU's memory.

    The stages of a shard use the one and then the other. On a Mac both would be in one memory.
    """
    can_wait = occupancy.has_own_memory(device) and device.type != "mps"
    return can_wait and other is not None and (one.base == other or other.base == one)


@lru_cache(maxsize=2)
def load_models(config: ModelConfig) -> Models:
    """The model that `config` names, ready to use. Raises ConfigError with one line.

    The last model stays loaded. Where the device has memory of its own, so does the base model of one with few-step
    weights, in the CPU's memory.
    """
    global _last
    device = resolve_device(config.device)
    loaded = load_models.cache_info().currsize
    if loaded > 1 or (loaded == 1 and not _take_turns(config, _last, device)):
        load_models.cache_clear()  # so that the other models' memory is free before this one takes its own
    models = _loaded(config, device)
    _last = config
    return models


def _loaded(config: ModelConfig, device: torch.device) -> Models:
    pipe = load_pipeline(config)
    models = replace(
        Models.from_pipeline(pipe, identity=model_identity(config), config=config),
        device=device,
        offload="none" if device.type == "cpu" else offload_of(config),
        gives_way=True,
        same_bytes=config.exactness == "bytes",
    )
    try:
        with device_faults(f"model {config.id} does not fit; set model.offload: model, or model.dtype: float16"):
            models.come()
    except OutOfMemory as error:  # no smaller batch helps
        raise ConfigError(str(error)) from error
    unet: Any = models.base.denoiser
    if device.type == "cuda":  # convolutions in half precision prefer it; no measurable difference on CPUs
        unet.to(memory_format=torch.channels_last)
        models.base.vae.to(memory_format=torch.channels_last)
        if models.control_net is not None:
            models.control_net.to(memory_format=torch.channels_last)
    _accelerate(unet, config, device)
    log.debug("model %s: on %s in %s, offload: %s", models.identity, device, models.dtype, models.offload)
    return models


def _accelerate(unet: Any, config: ModelConfig, device: torch.device) -> None:
    """Quantises and compiles `unet` as `config` says. Raises ConfigError."""
    automatic = config.compile == "auto" and device.type == "cuda" and has_blocks(unet)
    wanted = config.compile == "blocks" or automatic
    compiled = wanted and can_compile(device)
    if config.quantise == "fp8":
        require_fp8(device, compiled)
        quantise_fp8(unet)
    if compiled:
        compile_blocks(unet)
