"""A stand-in for ComfyUI, made to the documented contract between ComfyUI and nodes of class-based packs.

It is no ComfyUI: it has no models, no server and no cache. It does what a pack of nodes relies on:
- a pack is a folder that is imported from its `__init__.py`, under a name that is no identifier;
- a prompt is validated before anything runs: links by type, numbers by range, choices, and `VALIDATE_INPUTS`;
- every output is a list. A node runs once for each element, the last element of a shorter list is repeated, and nodes
  with `INPUT_IS_LIST` get the lists themselves;
- nodes run in torch's inference mode, after the nodes that they are linked to;
- the user may stop the queue, which `throw_exception_if_processing_interrupted` raises.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from tests.integrations.single_files import write

Prompt = dict[str, dict[str, Any]]
"""A workflow in API format: number of a node -> its class and its inputs."""


class InterruptProcessingException(Exception):
    """The user stopped the queue."""


class LatentPreviewMethod(Enum):
    """Which previews the user wants."""

    NoPreviews = "none"
    Auto = "auto"


@dataclass
class ComfyUI:
    """A stand-in with folders in `folder`. `nodes` are the classes of nodes by name."""

    folder: Path
    stop_at: int | None = None
    """The user stops the queue once the bar shows this many steps."""
    shown: list[tuple[int, int]] = field(default_factory=list)
    """What the progress bar showed: (value, total)."""
    previews: list[Any] = field(default_factory=list)
    """The previews that came with steps."""
    emptied: int = 0
    """How often ComfyUI's own models were taken off the device."""
    args: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(preview_method=LatentPreviewMethod.NoPreviews)
    )
    """The options of ComfyUI's command line."""
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    nodes: dict[str, type[Any]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("input", "output", "checkpoints", "diffusers"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for kind in (*CORE, EachBrightness, Latent):
            self.nodes[kind.__name__] = type(kind.__name__, (kind,), {"comfy": self})

    def modules(self) -> dict[str, ModuleType]:
        """The modules of ComfyUI that packs import."""
        stand_in = self

        class ProgressBar:
            def __init__(self, total: int, node_id: str | None = None) -> None:
                self.total = total

            def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
                self.total = self.total if total is None else total
                stand_in.previews += [] if preview is None else [preview]
                stand_in.shown.append((min(value, self.total), self.total))

        def throw_exception_if_processing_interrupted() -> None:
            if stand_in.stop_at is not None and stand_in.shown and stand_in.shown[-1][0] >= stand_in.stop_at:
                raise InterruptProcessingException

        def unload_all_models() -> None:
            stand_in.emptied += 1

        def get_full_path_or_raise(folder_name: str, filename: str) -> str:
            path = self.folder / folder_name / filename
            if not path.is_file():
                raise FileNotFoundError(f"Model in folder {folder_name!r} with filename {filename!r} not found.")
            return str(path)

        def get_filename_list(folder_name: str) -> list[str]:
            return sorted(path.name for path in (self.folder / folder_name).iterdir() if path.is_file())

        utils = _module("comfy.utils", ProgressBar=ProgressBar)
        management = _module(
            "comfy.model_management",
            throw_exception_if_processing_interrupted=throw_exception_if_processing_interrupted,
            unload_all_models=unload_all_models,
            soft_empty_cache=lambda force=False: None,
            InterruptProcessingException=InterruptProcessingException,
        )
        paths = _module(
            "folder_paths",
            get_filename_list=get_filename_list,
            get_full_path_or_raise=get_full_path_or_raise,
            get_folder_paths=lambda folder_name: [str(self.folder / folder_name)],
            get_temp_directory=lambda: str(self.folder / "temp"),
        )

        def save_checkpoint(output_path: str, model: Any, clip: Any = None, vae: Any = None) -> None:
            assert model is clip is vae
            write(model, Path(output_path))

        sd = _module("comfy.sd", save_checkpoint=save_checkpoint)
        cli = _module("comfy.cli_args", args=self.args, LatentPreviewMethod=LatentPreviewMethod)
        comfy = _module("comfy", utils=utils, model_management=management, sd=sd, cli_args=cli, __path__=[])
        known = (comfy, utils, management, sd, cli, paths)
        return {module.__name__: module for module in known}

    @contextmanager
    def with_pack(self, pack: Path) -> Iterator[ComfyUI]:
        """Within the block, the nodes of `pack` are known, as if the folder lay in `custom_nodes`."""
        name = str(pack).replace(".", "_x_")
        before = dict(sys.modules)
        sys.modules.update(self.modules())
        try:
            spec = importlib.util.spec_from_file_location(name, pack / "__init__.py")
            assert spec
            assert spec.loader
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            self.nodes.update(module.NODE_CLASS_MAPPINGS)
            self.names.update(module.NODE_DISPLAY_NAME_MAPPINGS)
            yield self
        finally:
            for each in [each for each in sys.modules if each.startswith((name, "comfy", "folder_paths"))]:
                del sys.modules[each]
            sys.modules.update({each: old for each, old in before.items() if each not in sys.modules})

    def mistakes(self, prompt: Prompt) -> list[str]:
        """What validation says of a prompt: `number: input: mistake`."""
        found = []
        for number, node in prompt.items():
            kind = self.nodes.get(node["class_type"])
            if kind is None:
                found.append(f"{number}: no node {node['class_type']}")
                continue
            found += [f"{number}: {each}" for each in self._mistakes_of(kind, node["inputs"], prompt)]
        if not any(getattr(self.nodes.get(node["class_type"]), "OUTPUT_NODE", False) for node in prompt.values()):
            found.append("the prompt has no outputs")
        return found

    def _mistakes_of(self, kind: type[Any], inputs: dict[str, Any], prompt: Prompt) -> Iterator[str]:
        known = inputs_of(kind)
        validate = getattr(kind, "VALIDATE_INPUTS", None)
        checked = inspect.getfullargspec(validate).args[1:] if validate else []
        yield from (f"{name}: no such input" for name in inputs if name not in known)
        for name, (wanted, options, required) in known.items():
            if name not in inputs:
                if required:
                    yield f"{name}: required input is missing"
                continue
            value = inputs[name]
            if isinstance(value, list):
                source, place = value
                given = self.nodes[prompt[source]["class_type"]].RETURN_TYPES[place]
                if given != wanted:
                    yield f"{name}: {given} linked to {wanted}"
            elif isinstance(wanted, str) and wanted not in CONVERTED:
                yield f"{name}: {wanted} can only be linked"
            elif name not in checked:
                yield from _unfit(name, value, wanted, options)
        if validate is not None:
            asked = {
                name: None if isinstance(inputs[name], list) else inputs[name] for name in checked if name in inputs
            }
            answer = validate(**asked)
            if answer is not True:
                yield f"{', '.join(asked)}: {answer}"

    def run(self, prompt: Prompt) -> None:
        """Validates a prompt and runs its nodes. `outputs` holds what each node gave, a list for each output."""
        assert self.mistakes(prompt) == []
        self.outputs.clear()
        with torch.inference_mode():
            for number, node in prompt.items():
                if getattr(self.nodes[node["class_type"]], "OUTPUT_NODE", False):
                    self._run(number, prompt)

    def _run(self, number: str, prompt: Prompt) -> None:
        if number in self.outputs:
            return
        node = prompt[number]
        kind, lists = self.nodes[node["class_type"]], {}
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                source, place = value
                self._run(source, prompt)
                lists[name] = self.outputs[source][place]
            else:
                lists[name] = [_converted(inputs_of(kind)[name][0], value)]
        call: Callable[..., Any] = getattr(kind(), kind.FUNCTION)
        if getattr(kind, "INPUT_IS_LIST", False):
            results = [call(**lists)]
        else:
            longest = max(map(len, lists.values()), default=1)
            results = [
                call(**{name: all_[min(i, len(all_) - 1)] for name, all_ in lists.items()}) for i in range(longest)
            ]
        assert all(len(result) == len(kind.RETURN_TYPES) for result in results)
        as_lists = getattr(kind, "OUTPUT_IS_LIST", (False,) * len(kind.RETURN_TYPES))
        self.outputs[number] = [
            [each for result in results for each in (result[place] if many else [result[place]])]
            for place, many in enumerate(as_lists)
        ]


CONVERTED: dict[Any, Callable[[Any], Any]] = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
"""Types of inputs that have a widget, beside choices -> what their values are converted by."""


def inputs_of(kind: type[Any]) -> dict[str, tuple[Any, dict[str, Any], bool]]:
    """Name -> type, options, and whether it is required."""
    return {
        name: (entry[0], entry[1] if len(entry) > 1 else {}, group == "required")
        for group, entries in kind.INPUT_TYPES().items()
        if group != "hidden"
        for name, entry in entries.items()
    }


def _converted(wanted: Any, value: Any) -> Any:
    return value if isinstance(wanted, list) else CONVERTED[wanted](value)


def _unfit(name: str, value: Any, wanted: Any, options: dict[str, Any]) -> Iterator[str]:
    if isinstance(wanted, list):
        if value not in wanted:
            yield f"{name}: {value!r} is not in the list"
        return
    value = _converted(wanted, value)
    if "min" in options and value < options["min"]:
        yield f"{name}: {value} is smaller than {options['min']}"
    if "max" in options and value > options["max"]:
        yield f"{name}: {value} is greater than {options['max']}"


def _module(name: str, **names: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(names)
    return module


class LoadImage:
    """As ComfyUI's: a file of the folder `input`, as an image [1, H, W, 3] and a mask of what is transparent."""

    comfy: ClassVar[ComfyUI]
    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "load_image"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": (sorted(path.name for path in (cls.comfy.folder / "input").iterdir()),)}}

    def load_image(self, image: str) -> tuple[torch.Tensor, torch.Tensor]:
        loaded = Image.open(self.comfy.folder / "input" / image)
        alpha = torch.from_numpy(np.asarray(loaded.convert("RGBA").getchannel("A")) / np.float32(255))
        return torch.from_numpy(np.asarray(loaded.convert("RGB")) / np.float32(255))[None], 1 - alpha[None]


class SaveImage:
    """As ComfyUI's: a PNG of each image in the folder `output`."""

    comfy: ClassVar[ComfyUI]
    RETURN_TYPES = ()
    FUNCTION = "save_images"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "ComfyUI"})},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def save_images(self, images: torch.Tensor, filename_prefix: str = "ComfyUI") -> tuple[()]:
        folder = self.comfy.folder / "output"
        for image in images:
            number = len(list(folder.iterdir())) + 1
            pixels = (image.numpy() * 255).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{filename_prefix}_{number:05}_.png")
        return ()


class CheckpointLoaderSimple:
    """As ComfyUI's, but that the model is one that a test puts beside it."""

    comfy: ClassVar[ComfyUI]
    pipe: ClassVar[Any]
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load_checkpoint"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"ckpt_name": (sorted(path.name for path in (cls.comfy.folder / "checkpoints").iterdir()),)}
        }

    def load_checkpoint(self, ckpt_name: str) -> tuple[Any, Any, Any]:
        return self.pipe, self.pipe, self.pipe


class CLIPTextEncode:
    """As ComfyUI's, but that nothing is encoded."""

    comfy: ClassVar[ComfyUI]
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"text": ("STRING", {"multiline": True}), "clip": ("CLIP",)}}

    def encode(self, text: str, clip: Any) -> tuple[str]:
        return (text,)


class EmptyLatentImage:
    """As ComfyUI's, for latents of a sixteenth of the size, which tests have time for."""

    comfy: ClassVar[ComfyUI]
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "generate"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = {"default": 512, "min": 16, "max": 16384, "step": 8}
        number = {"default": 1, "min": 1, "max": 4096}
        return {"required": {"width": ("INT", side), "height": ("INT", side), "batch_size": ("INT", number)}}

    def generate(self, width: int, height: int, batch_size: int) -> tuple[dict[str, torch.Tensor]]:
        return ({"samples": torch.zeros(batch_size, 4, height // 64, width // 64)},)


class KSampler:
    """As ComfyUI's, but that the noise stays what it is."""

    comfy: ClassVar[ComfyUI]
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1}),
                "steps": ("INT", {"default": 20, "min": 1, "max": 10000}),
                "cfg": ("FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0}),
                "sampler_name": (["euler", "dpmpp_2m"],),
                "scheduler": (["normal", "karras"],),
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "latent_image": ("LATENT",),
                "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0}),
            }
        }

    def sample(self, seed: int, latent_image: dict[str, torch.Tensor], **others: Any) -> tuple[dict[str, torch.Tensor]]:
        noise = torch.Generator().manual_seed(seed)
        return ({"samples": torch.randn(latent_image["samples"].shape, generator=noise)},)


class ImageSharpen:
    """As ComfyUI's, but that it mirrors."""

    comfy: ClassVar[ComfyUI]
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "sharpen"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE",),
                "sharpen_radius": ("INT", {"default": 1, "min": 1, "max": 31}),
                "sigma": ("FLOAT", {"default": 1.0, "min": 0.1, "max": 10.0}),
                "alpha": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 5.0}),
            }
        }

    def sharpen(self, image: torch.Tensor, sharpen_radius: int, sigma: float, alpha: float) -> tuple[torch.Tensor]:
        return (image.flip(2),)


CORE = (LoadImage, SaveImage, CheckpointLoaderSimple, CLIPTextEncode, EmptyLatentImage, KSampler, ImageSharpen)
"""Nodes of ComfyUI that the example workflows use."""


class EachBrightness:
    """Stands for a captioner of another pack, which knows nothing of lists: one text for one image."""

    comfy: ClassVar[ComfyUI]
    RETURN_TYPES = ("STRING",)
    FUNCTION = "caption"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("IMAGE",)}}

    def caption(self, image: torch.Tensor) -> tuple[str]:
        return (f"a house of brightness {image.mean().item():.3f}",)


class Latent:
    """Stands for VAE Encode: the latents that a test puts beside it."""

    comfy: ClassVar[ComfyUI]
    samples: ClassVar[torch.Tensor]
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "give"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def give(self) -> tuple[dict[str, torch.Tensor]]:
        return ({"samples": self.samples},)
