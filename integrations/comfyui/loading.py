"""Nodes that load a base model: by name, as everywhere in this project, or from a single file of ComfyUI's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, get_args

import folder_paths
import torch

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import DEFAULT, with_method
from resmaster_stages.config.model import SDXL, ModelConfig
from resmaster_stages.errors import ConfigError, UserError
from resmaster_stages.library import single
from resmaster_stages.models.identity import PICTUREBOOK
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from resmaster_stages.models.places import loading, resolve_device, resolve_dtype

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


def configuration(
    model: Loaded | None, method: Mapping[str, Any], seed: int = 0, captioner: str = "prompt"
) -> DatasetConfig:
    """The configuration of one upscaling. model: None for methods without a base model. Raises ConfigError."""
    name, models = (model.name, model.models) if model else (PICTUREBOOK, None)
    base = single(name, captioner, models)
    values = {**with_method(base["upscale"], method.get("method", DEFAULT)), **method}
    part = model.part if model else base["model"]
    config = parse_config({**base, "model": dict(part), "seed": seed, "upscale": values}, "ResMaster")
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


class LoadCheckpoint:
    """Loads a single file of a whole model."""

    CATEGORY = "ResMaster"
    DESCRIPTION = (
        "Loads a single file of a whole model: a file of models/checkpoints. Save Checkpoint writes such a file."
    )
    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    FUNCTION = "load"
    SUFFIX: ClassVar[str] = ".safetensors"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = [name for name in folder_paths.get_filename_list("checkpoints") if name.endswith(cls.SUFFIX)]
        prompts = "Loads SDXL's IP-Adapter from the Hugging Face hub, so that each view is shown its own crop."
        config = (
            "A hub id or folder in diffusers' format with the same kind of model. Its JSON files and tokenizers are "
            "used. Empty: found by the file's tensors, from the Hugging Face hub."
        )
        return {
            "required": {
                "ckpt_name": (names,),
                "dtype": (choices("dtype"), {"default": "auto"}),
                "image_prompts": ("BOOLEAN", {"default": False, "tooltip": prompts}),
            },
            "optional": {"config": ("STRING", {"default": "", "tooltip": config})},
        }

    def load(self, ckpt_name: str, dtype: str, image_prompts: bool, config: str = "") -> tuple[Loaded]:
        path = folder_paths.get_full_path_or_raise("checkpoints", ckpt_name)
        device = resolve_device("auto")
        with at_work(device), loading(ckpt_name, "it"):
            pipe = single_file(path, config.strip(), resolve_dtype(dtype, device))
            if image_prompts:
                load_adapter(pipe)
            models = replace(Models.from_pipeline(pipe, identity=ckpt_name), device=device, gives_way=True)
        return (Loaded(models, {"id": ckpt_name, "dtype": dtype}, by_name=False),)


def single_file(path: str, config: str, dtype: torch.dtype) -> Any:
    """The pipeline in a single file, on the CPU. config: as the node takes it."""
    import diffusers
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

    if not config:
        config = fetch_diffusers_config(load_single_file_checkpoint(path))["pretrained_model_name_or_path"]
    kind = diffusers.DiffusionPipeline.load_config(config)["_class_name"]
    return getattr(diffusers, kind).from_single_file(path, config=config, torch_dtype=dtype)


def load_adapter(pipe: Any) -> None:
    """Loads SDXL's IP-Adapter into `pipe`. Raises UserError for another kind of model."""
    if type(pipe).__name__ != "StableDiffusionXLPipeline":
        raise UserError(f"image_prompts: there is an adapter for SDXL, not for {type(pipe).__name__}; switch it off")
    adapter = SDXL["ip_adapter"]
    pipe.load_ip_adapter(
        adapter["id"],
        subfolder=adapter["subfolder"],
        weight_name=adapter["weight_name"],
        image_encoder_folder=adapter["image_encoder_folder"],
    )
