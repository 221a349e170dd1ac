"""Few-step weights from files: a LoRA, the state of a whole UNet, or the folder of one.

What a file holds is recognised by the names of its tensors. A LoRA is fused into the UNet, so the denoiser is as fast
as without one. The two usual ways of naming its tensors are known: with underscores (`lora_unet_..`, `lora_down`,
`lora_up`, `alpha`) and with dots (`unet.`, `lora_A`, `lora_B`).

Invariants:
- What is refused here is refused, in the same words, when the weights are loaded.
- Every tensor is used. A tensor that belongs to no layer, or has another shape, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resmaster_stages.config.model import FewStepConfig, ModelConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.bases.adapter_files import Shapes
from resmaster_stages.models.bases.few_step import few_step_of
from resmaster_stages.models.files import (
    DIFFUSERS,
    NotOnThisMachine,
    folder_with,
    object_in,
    require_weights,
    tensors_of,
    weight_files,
)
from resmaster_stages.models.places import at_hub, loading, location

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_PART = re.compile(r"(.+?)\.(?:(lora_down|lora_A|lora\.down)|(lora_up|lora_B|lora\.up))\.weight|(.+)\.alpha")
"""The name of a LoRA's tensor: of a layer's down or up matrix, or of its alpha."""

_LCM = "time_embedding.cond_proj.weight"
"""A tensor that only whole LCM UNets have."""


@dataclass(frozen=True)
class Low:
    """The names of the tensors that change one layer by `up` x `down` x alpha / rank. No alpha: alpha is the rank."""

    down: str
    up: str
    alpha: str | None


def check(config: ModelConfig) -> None:
    """Raise ConfigError unless few-step weights fit the UNet of a model, by the headers of their files.

    Raises NotOnThisMachine if one of the two is still to be downloaded.
    """
    own = config.few_step
    assert own is not None
    few_step_of(own)
    found = _shapes(config, own)
    folder = folder_with(config.id, "model_index.json", config.revision) / "unet"
    if not (files := weight_files(folder, DIFFUSERS, config.variant)):
        raise NotOnThisMachine(config.id)
    unet = {name: shape for file in files for name, shape in tensors_of(file).items()}
    if is_lora(found):
        lora_layers(found, unet, _name(own), config.id)
    else:
        require_unet(found, unet, _name(own), config.id)


def _name(config: FewStepConfig) -> str:
    return few_step_of(config).name


def _file(config: FewStepConfig) -> str:
    """The weights' file inside the repository or folder. Raises ConfigError if it is pickled."""
    assert config.weight_name is not None
    if not config.weight_name.endswith(".safetensors"):
        raise ConfigError(
            f"model.few_step.weight_name: {config.weight_name} is not a .safetensors file; choose one that is"
        )
    return (Path(config.subfolder) / config.weight_name).as_posix()


def _shapes(config: ModelConfig, own: FewStepConfig) -> Shapes:
    """Name -> shape of each tensor of the weights. Raises ConfigError and NotOnThisMachine."""
    if own.weight_name is not None:
        name = _file(own)
        return tensors_of(folder_with(own.id, name, own.revision) / name)
    name = (Path(own.subfolder) / "config.json").as_posix()
    folder = folder_with(own.id, name, own.revision) / own.subfolder
    if object_in(folder / "config.json").get("time_cond_proj_dim") is not None:
        raise ConfigError(_whole_lcm(_name(own)))
    require_weights(own.id, folder, DIFFUSERS, config.variant)
    found = weight_files(folder, DIFFUSERS, config.variant)
    return {tensor: shape for file in found for tensor, shape in tensors_of(file).items()}


def is_lora(tensors: Iterable[str]) -> bool:
    """Whether tensors are those of a LoRA."""
    return any("lora" in name for name in tensors)


def _whole_lcm(name: str) -> str:
    return (
        f"model.few_step: {name} is a whole LCM UNet, which reads the guidance scale with the time; give the LCM-LoRA, "
        "or weights of another kind"
    )


def require_unet(found: Shapes, unet: Shapes, name: str, model: str) -> None:
    """Raise ConfigError unless the tensors `found` are those of a UNet with the tensors `unet`."""
    if _LCM in found and _LCM not in unet:
        raise ConfigError(_whole_lcm(name))
    for tensor in sorted(found.keys() ^ unet.keys()):
        which = "has no tensor" if tensor in unet else "has a tensor"
        raise ConfigError(
            f"model.few_step: {name} is not the UNet of {model} (it {which} {tensor}); give a LoRA or a UNet in "
            "diffusers format that was made for this model"
        )
    for tensor, shape in found.items():
        _require_shape(shape, unet[tensor], f"{tensor} of {name}", model)


def _require_shape(found: tuple[int, ...], wanted: tuple[int, ...], what: str, model: str) -> None:
    if found != wanted:
        raise ConfigError(
            f"model.few_step: {what} is {spell(found)}, and {spell(wanted)} in {model}; give weights that were made "
            "for this model"
        )


def spell(shape: tuple[int, ...]) -> str:
    """A shape for a message."""
    return " x ".join(str(side) for side in shape) or "one number"


def lora_layers(found: Shapes, unet: Shapes, name: str, model: str) -> dict[str, Low]:
    """Layer of the UNet -> the LoRA's tensors that change it. Raises ConfigError unless all tensors fit.

    found, unet: the shapes of the LoRA's and the UNet's tensors. name, model: of both, for messages.
    """
    layers = [tensor.removesuffix(".weight") for tensor in unet if tensor.endswith(".weight")]
    known = {each: layer for layer in layers for each in (layer, f"unet.{layer}")}
    known |= {f"lora_unet_{layer.replace('.', '_')}": layer for layer in layers}
    parts: dict[str, dict[str, str]] = {}
    for tensor in found:
        match = _PART.fullmatch(tensor)
        layer = known.get(match[1] or match[4]) if match else None
        if match is None or layer is None:
            raise ConfigError(
                f"model.few_step: {tensor} of {name} belongs to no layer of the UNet of {model}; give a LoRA that was "
                "made for this model"
            )
        parts.setdefault(layer, {})["down" if match[2] else "up" if match[3] else "alpha"] = tensor
    return {layer: _low(layer, each, found, unet, name, model) for layer, each in parts.items()}


def _low(layer: str, parts: Mapping[str, str], found: Shapes, unet: Shapes, name: str, model: str) -> Low:
    """One layer of `lora_layers`."""
    if not {"down", "up"} <= parts.keys():
        raise ConfigError(f"model.few_step: {name} lacks a matrix for the layer {layer}; download it again")
    down, up, weight = found[parts["down"]], found[parts["up"]], unet[f"{layer}.weight"]
    wanted = (weight[0], prod(weight[1:]))
    made = (up[0] if up else 0, prod(down[1:]))
    if len(weight) < 2 or len(down) < 2 or prod(up[1:]) != down[0] or made != wanted:
        raise ConfigError(
            f"model.few_step: the matrices {spell(up)} and {spell(down)} of {name} do not make the {spell(weight)} of "
            f"{layer} in {model}; give a LoRA that was made for this model"
        )
    return Low(parts["down"], parts["up"], parts.get("alpha"))


# ----------------------------------------------------------------------------------------------------- loading


def _downloaded(config: FewStepConfig) -> Path:
    """The weights' file, downloaded from the hub if need be. Raises ConfigError."""
    name = _file(config)
    if at_hub(config.id):
        import huggingface_hub

        with loading(config.id, "the few-step weights"):
            huggingface_hub.hf_hub_download(config.id, name, revision=config.revision)
    return folder_with(config.id, name, config.revision) / name


def load_unet(config: ModelConfig, dtype: torch.dtype) -> Any | None:
    """The whole UNet that `model.few_step` names, on the CPU. None if it names a LoRA. Raises ConfigError."""
    import diffusers

    own = config.few_step
    assert own is not None
    few_step_of(own)
    kind = diffusers.UNet2DConditionModel
    if own.weight_name is None:
        with loading(own.id, "the few-step UNet"):
            unet = kind.from_pretrained(
                location(own.id),
                subfolder=own.subfolder,
                revision=own.revision,
                variant=config.variant,
                dtype=dtype,
                use_safetensors=True,
            )
        if unet.config.time_cond_proj_dim is not None:
            raise ConfigError(_whole_lcm(_name(own)))
        return unet
    file = _downloaded(own)
    shapes = tensors_of(file)
    if is_lora(shapes):
        return None
    return _filled(config, file, shapes, dtype)


def _filled(config: ModelConfig, file: Path, shapes: Shapes, dtype: torch.dtype) -> Any:
    """A UNet like the base model's with the weights in `file`. The base model's own are not read."""
    import diffusers
    import torch
    from safetensors.torch import load_file

    assert config.few_step is not None
    kind = diffusers.UNet2DConditionModel
    with loading(config.id, "the configuration of its UNet"):
        values = kind.load_config(location(config.id), subfolder="unet", revision=config.revision)
    with torch.device("meta"):
        unet = kind.from_config(values)
    require_unet(shapes, shapes_in(unet.state_dict()), _name(config.few_step), config.id)
    unet.load_state_dict({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, assign=True)
    return unet.eval()


def shapes_in(tensors: Mapping[str, Tensor]) -> Shapes:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def fuse_lora(unet: Any, config: ModelConfig) -> None:
    """Make the LoRA that `model.few_step` names part of the weights of `unet`. Raises ConfigError."""
    import torch
    from safetensors.torch import load_file

    own = config.few_step
    assert own is not None
    tensors = load_file(_downloaded(own))
    with torch.no_grad():
        for layer, low in lora_layers(shapes_in(tensors), shapes_in(unet.state_dict()), _name(own), config.id).items():
            weight, down = unet.get_submodule(layer).weight, tensors[low.down].float()
            share = 1.0 if low.alpha is None else float(tensors[low.alpha]) / len(down)
            change = share * (tensors[low.up].float().flatten(1) @ down.flatten(1))
            weight.copy_(weight.float() + change.view_as(weight))
