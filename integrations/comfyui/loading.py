"""Nodes that load a base model: by name, as everywhere in this project, from a single file, or from ComfyUI."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import folder_paths
import torch
from comfy.sd import save_checkpoint

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import DEFAULT, with_method
from resmaster_stages.config.model import SDXL, ModelConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.library.models import single
from resmaster_stages.models.identity import PICTUREBOOK
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from resmaster_stages.models.places import loading, resolve_device, resolve_dtype, vae_dtype

from .host import at_work
from .written import WIDGET, settings_in

MODEL = "RESMASTER_MODEL"


@dataclass(frozen=True, eq=False)
class Loaded:
    """A base model, as the nodes hand it on."""

    models: Models
    part: Mapping[str, Any]
    """The part `model` of a configuration."""
    by_name: bool = True
    """Whether `part` is enough to load the model. It is not for a single file."""

    @property
    def name(self) -> str:
        """The model's name, as a user wrote it."""
        return str(self.part["id"])


def configuration(model: Loaded | None, method: Mapping[str, Any], captioner: str = "prompt") -> DatasetConfig:
    """The configuration of one upscaling. model: None for methods without a base model. Raises ConfigError."""
    name, models = (model.name, model.models) if model else (PICTUREBOOK, None)
    base = single(name, captioner, models)
    values = {**with_method(base["upscale"], method.get("method", DEFAULT)), **method}
    part = model.part if model else base["model"]
    config = parse_config({**base, "model": dict(part), "upscale": values}, "ResMaster")
    if config.upscale.base_model and model is None:
        raise ConfigError(f"method {config.upscale.method} needs a base model; connect one to `model`")
    return config


def of_diffusers_folder(name: str) -> str:
    """The folder `name` of ComfyUI's folders for diffusers models; `name` itself if there is none."""
    for folder in folder_paths.get_folder_paths("diffusers"):
        if (Path(folder) / name / "model_index.json").is_file():
            return str(Path(folder) / name)
    return name


def choices(field: str) -> list[str]:
    """The values that a setting of `model` may have."""
    return list(get_args(ModelConfig.model_fields[field].annotation))


class LoadModel:
    """Loads a base model in diffusers' format."""

    CATEGORY = "ResMaster"
    DESCRIPTION = "Loads a base model in diffusers' format: from the Hugging Face hub, a folder, or the embedded one."
    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        name = {
            "default": SDXL["id"],
            "tooltip": "A hub id, a folder, a folder of models/diffusers, or `picturebook`, the small embedded model.",
        }
        return {
            "required": {
                "model": ("STRING", name),
                "dtype": (choices("dtype"), {"default": "auto"}),
                "offload": (choices("offload"), {"default": "auto", "tooltip": "`model` needs the least GPU memory."}),
            },
            "optional": {"settings": WIDGET},
        }

    def load(self, model: str, dtype: str, offload: str, settings: str = "") -> tuple[Loaded]:
        name = of_diffusers_folder(model.strip())
        part = {**single(name)["model"], "dtype": dtype, "offload": offload, **settings_in(settings)}
        config = parse_config({"name": "single", "model": part}, "ResMaster").model
        with at_work(resolve_device(config.device)):
            return (Loaded(load_models(config), part),)


def further_inputs() -> dict[str, Any]:
    """The inputs of nodes that read a single file, beside the file."""
    prompts = "Loads SDXL's IP-Adapter from the Hugging Face hub, so that each view is shown its own crop."
    config = (
        "A hub id or folder in diffusers' format with the same kind of model. Its JSON files and tokenizers are used. "
        "Empty: found by the file's tensors, from the Hugging Face hub."
    )
    return {
        "dtype": (choices("dtype"), {"default": "auto"}),
        "image_prompts": ("BOOLEAN", {"default": False, "tooltip": prompts}),
        "config": ("STRING", {"default": "", "tooltip": config}),
    }


class LoadCheckpoint:
    """Loads a single file of a whole model."""

    CATEGORY = "ResMaster"
    DESCRIPTION = "Loads a single file of a whole model: a safetensors file of models/checkpoints."
    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = [name for name in folder_paths.get_filename_list("checkpoints") if name.endswith(".safetensors")]
        return {"required": {"ckpt_name": (names,), **further_inputs()}}

    def load(self, ckpt_name: str, dtype: str, image_prompts: bool, config: str) -> tuple[Loaded]:
        path = folder_paths.get_full_path_or_raise("checkpoints", ckpt_name)
        return (from_single_file(path, ckpt_name, dtype, image_prompts, config),)


class TakeModel:
    """Takes over a model that ComfyUI has loaded, with its LoRAs."""

    CATEGORY = "ResMaster"
    DESCRIPTION = (
        "Takes over a model that ComfyUI has loaded, Stable Diffusion or SDXL, with the LoRAs that are applied to it. "
        "For a while the model lies in ComfyUI's temporary folder."
    )
    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    FUNCTION = "take"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",), **further_inputs()}}

    def take(self, model: Any, clip: Any, vae: Any, dtype: str, image_prompts: bool, config: str) -> tuple[Loaded]:
        folder = folder_paths.get_temp_directory()
        os.makedirs(folder, exist_ok=True)
        with TemporaryDirectory(prefix="resmaster-", dir=folder) as place:
            path = str(Path(place) / "model.safetensors")
            save_checkpoint(path, model, clip=clip, vae=vae)
            return (from_single_file(path, "ComfyUI's model", dtype, image_prompts, config),)


def from_single_file(path: str, name: str, dtype: str, image_prompts: bool, config: str) -> Loaded:
    """The model in a single file. name: for messages. The others: as the nodes take them. Raises ConfigError."""
    device = resolve_device("auto")
    kind = resolve_dtype(dtype, device)
    with at_work(device), loading(name, "it"):
        pipe = pipeline_in(path, config.strip(), kind)
        pipe.vae.to(vae_dtype(kind))
        if image_prompts:
            load_adapter(pipe)
        models = replace(Models.from_pipeline(pipe, identity=name), device=device, gives_way=True)
    return Loaded(models, {"id": name, "dtype": dtype}, by_name=False)


def pipeline_in(path: str, config: str, dtype: torch.dtype) -> Any:
    """The pipeline in a single file, on the CPU."""
    import diffusers
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

    if not config:
        config = fetch_diffusers_config(load_single_file_checkpoint(path))["pretrained_model_name_or_path"]
    kind = diffusers.DiffusionPipeline.load_config(config)["_class_name"]
    return getattr(diffusers, kind).from_single_file(path, config=config, torch_dtype=dtype)


def load_adapter(pipe: Any) -> None:
    """Loads SDXL's IP-Adapter into `pipe`. Raises ConfigError for another kind of model."""
    if type(pipe).__name__ != "StableDiffusionXLPipeline":
        raise ConfigError(f"image_prompts: there is an adapter for SDXL, not for {type(pipe).__name__}; switch it off")
    adapter = SDXL["ip_adapter"]
    pipe.load_ip_adapter(
        adapter["id"],
        subfolder=adapter["subfolder"],
        weight_name=adapter["weight_name"],
        image_encoder_folder=adapter["image_encoder_folder"],
    )
