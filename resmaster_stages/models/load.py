"""From a model's name to its parts on a device: SDXL or Stable Diffusion 1.x and 2.x by hub id or folder, the embedded
pack, or a user's own pipeline.

Knows nothing about methods. Only safetensors are read and no remote code runs; `HF_HUB_OFFLINE=1` is respected.

Invariants:
- A user's own pipeline is never changed for good: what the engine must alter, it restores.
- The parts are in inference use only; nothing here trains.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPVisionModelWithProjection

from resmaster_stages.config.model import IpAdapterConfig, ModelConfig
from resmaster_stages.errors import ConfigError, OutOfMemory
from resmaster_stages.models.acceleration import can_compile, compile_blocks, quantise_fp8, require_fp8
from resmaster_stages.models.faults import device_faults
from resmaster_stages.models.identity import PICTUREBOOK, as_folder, model_identity, pack_folder
from resmaster_stages.models.parts import Models

PACK_ADAPTER = IpAdapterConfig(
    id=PICTUREBOOK, subfolder="ip_adapter", weight_name="ip-adapter.safetensors", image_encoder_folder="image_encoder"
)
"""Where the embedded pack keeps its IP-Adapter."""


def resolve_device(name: str) -> torch.device:
    """The device that a configuration names; `auto` is CUDA if there is one, else the CPU. Raises ConfigError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"model.device: {name!r} is no device; use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"model.device: {name} is not there ({torch.cuda.device_count()} CUDA devices); use auto or cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("model.device: mps is not there; use auto or cpu")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format that a configuration names; `auto` is float16 on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """The number format of the VAE beside a UNet in `dtype`: float32 beside bfloat16, else the same.

    An encoder's last layers subtract large numbers from each other, and 8 bits of a weight are too few for that:
    rounding picturebook's `quant_conv` alone shifts the first channel of the reference's latents by 3 % of their
    spread, and the low-frequency swap draws the shift into the picture. The weights must be loaded in float32: a VAE
    that was rounded stays so when it is upcast. The VAE is a few percent of a picture's time (docs/speed.md).
    """
    return torch.float32 if dtype == torch.bfloat16 else dtype


@contextmanager
def _explained(model_id: str, what: str) -> Iterator[None]:
    """Turns what loading can raise into one line that names the model."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"model {model_id}: cannot load {what} ({reason[:200].rstrip('.')}); check the name, give a folder with "
            "safetensors, or set HF_HOME to a cache that has it"
        ) from error


def _location(model_id: str) -> str:
    """What to hand to `from_pretrained`: a folder's path, or the hub id itself."""
    if model_id == PICTUREBOOK:
        return str(pack_folder())
    folder = as_folder(model_id)
    return str(folder) if folder else model_id


def _check_folder(model_id: str, folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ConfigError(f"model {model_id}: no model_index.json in it; give the top folder of a diffusers model")
    try:
        json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"model {model_id}: its model_index.json cannot be read; download the model again") from None


def _kind(model_id: str, name: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline class for what a model's index calls itself, and what else its loader is told. Raises
    ConfigError."""
    if name.startswith("StableDiffusionXL"):
        return StableDiffusionXLPipeline, {"add_watermarker": False}
    if name == "StableDiffusionPipeline":
        return StableDiffusionPipeline, {"safety_checker": None, "requires_safety_checker": False}
    raise ConfigError(
        f"model {model_id}: is a {name}, not SDXL or Stable Diffusion 1.x or 2.x; give a base model of theirs"
    )


def _load_adapter(pipe: Any, adapter: IpAdapterConfig, dtype: torch.dtype) -> None:
    """Image encoder and IP-Adapter weights into `pipe`."""
    if not adapter.weight_name.endswith(".safetensors"):
        raise ConfigError(
            f"model.ip_adapter.weight_name: {adapter.weight_name} is not a .safetensors file; choose one that is"
        )
    location = _location(adapter.id)
    if pipe.image_encoder is None:
        with _explained(adapter.id, "the image encoder of the IP-Adapter"):
            pipe.register_modules(
                image_encoder=CLIPVisionModelWithProjection.from_pretrained(
                    location,
                    subfolder=adapter.image_encoder_folder,
                    revision=adapter.revision,
                    dtype=dtype,
                    use_safetensors=True,
                )
            )
    with _explained(adapter.id, "the IP-Adapter"):
        pipe.load_ip_adapter(
            location,
            subfolder=adapter.subfolder,
            weight_name=adapter.weight_name,
            image_encoder_folder=None,
            revision=adapter.revision,
        )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without diffusers' progress bars, which would tear the display of a build."""
    diffusers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers.utils.logging.enable_progress_bar()


def load_pipeline(config: ModelConfig) -> Any:
    """The pipeline that `config` names, on the CPU, with its IP-Adapter and VAE. Raises ConfigError."""
    location = _location(config.id)
    if Path(location).is_dir():
        _check_folder(config.id, Path(location))
    dtype = resolve_dtype(config.dtype, resolve_device(config.device))
    extra: dict[str, Any] = {}
    if config.vae:
        with _explained(config.vae, "the VAE"):
            extra["vae"] = AutoencoderKL.from_pretrained(
                _location(config.vae), dtype=vae_dtype(dtype), use_safetensors=True
            )
    with _explained(config.id, "it"), _no_bars():
        index = DiffusionPipeline.load_config(location, revision=config.revision)
        kind, more = _kind(config.id, str(index.get("_class_name")))
        pipe = kind.from_pretrained(
            location,
            revision=config.revision,
            variant=config.variant,
            dtype={"default": dtype, "vae": vae_dtype(dtype)},
            use_safetensors=True,
            **more,
            **extra,
        )
    adapter = PACK_ADAPTER if config.id == PICTUREBOOK and config.ip_adapter is None else config.ip_adapter
    if adapter is not None:
        _load_adapter(pipe, adapter, dtype)
    return pipe


@lru_cache(maxsize=1)
def load_models(config: ModelConfig) -> Models:
    """The model that `config` names, ready to use. The last one stays loaded. Raises ConfigError, one line."""
    device = resolve_device(config.device)
    pipe = load_pipeline(config)
    offload = config.offload == "model" and device.type != "cpu"
    if not offload:
        try:
            with device_faults(f"model {config.id} does not fit; set model.offload: model, or model.dtype: float16"):
                pipe.to(device)
        except OutOfMemory as error:  # no smaller batch helps
            raise ConfigError(str(error)) from error
    models = Models.from_pipeline(pipe, identity=model_identity(config), offload=offload)
    if device.type == "cuda":  # convolutions in half precision want it there; on CPUs it made no measurable difference
        models.unet.to(memory_format=torch.channels_last)
        models.vae.to(memory_format=torch.channels_last)
    _accelerate(models.unet, config, device)
    return replace(models, device=device, same_bytes=config.exactness == "bytes")


def _accelerate(unet: Any, config: ModelConfig, device: torch.device) -> None:
    """Quantises and compiles `unet` as `config` says. Raises ConfigError."""
    wanted = config.compile == "blocks" or (config.compile == "auto" and device.type == "cuda")
    compiled = wanted and can_compile(device)
    if config.quantise == "fp8":
        require_fp8(device, compiled)
        quantise_fp8(unet)
    if compiled:
        compile_blocks(unet)
