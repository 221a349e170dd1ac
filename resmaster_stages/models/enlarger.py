"""Loads super-resolution networks: from a configuration to a network on a device.

RRDBNets (BSRGAN, Real-ESRGAN, the embedded pack's) are read here. Weights of every other architecture are read by
spandrel, which is not installed by default (it brings torchvision). This module does not deal with tiles or images.

Invariants:
- Pickled files must be allowed by the configuration. Only their tensors are read, and no code in them runs.
- The weights of an RRDBNet are loaded strictly.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from resmaster_stages.errors import ConfigError, first_line
from resmaster_stages.models.files import find_network, tensors_of
from resmaster_stages.models.identity import NetworkFile, network_file
from resmaster_stages.models.rrdbnet import RRDBNet, network_of, official_state

_WRAPPERS = ("params_ema", "params", "state_dict")
"""Keys under which training programs keep the weights, the preferred key first."""


@dataclass(frozen=True, eq=False)
class Enlarger:
    """A network that makes images `scale` times larger."""

    network: Callable[[Tensor], Tensor]
    scale: int
    device: torch.device
    dtype: torch.dtype
    multiple: int = 1
    """The sides of the input must be multiples of this number."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """[N, 3, h, w] in [0, 1] -> [N, 3, scale h, scale w], float32 on the CPU, not clamped."""
        with torch.inference_mode():
            return self.network(pixels.to(self.device, self.dtype)).float().cpu()


def read_weights(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The state dict in a file: safetensors, or the tensors of a pickle. Raises ConfigError if there is no state
    dict. device: with `meta`, tensors of a pickle have names and shapes but no values."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # a damaged file raises many kinds of errors
            raise ConfigError(
                f"{path}: cannot be read as safetensors ({first_line(error)}); download it again"
            ) from None
    try:
        state: Any = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # a damaged file raises many kinds of errors
        raise ConfigError(f"{path}: is no file of tensors alone; give the published weights, or .safetensors") from None
    for name in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"{path}: holds no state dict; give a super-resolution network's weights")
    return dict(state)


def _require_spandrel(path: Path) -> None:
    if importlib.util.find_spec("spandrel") is None:
        raise ConfigError(
            f"{path}: not an RRDBNet's weights; for other architectures: pip install 'resmaster-pipeline[spandrel]'"
        )


def _by_spandrel(state: dict[str, Tensor], path: Path, device: torch.device, dtype: torch.dtype) -> Enlarger:
    """The network of any architecture that spandrel recognises by its weights."""
    _require_spandrel(path)
    try:
        import spandrel
    except (ImportError, RuntimeError) as error:  # a torchvision of another build than torch's
        raise ConfigError(
            f"spandrel cannot be imported ({first_line(error)}); install the torchvision that belongs to your torch"
        ) from None
    try:
        model = spandrel.ModelLoader(device="cpu").load_from_state_dict(state)
    except spandrel.UnsupportedModelError:
        raise ConfigError(f"{path}: spandrel does not know this architecture; give another network's weights") from None
    except Exception as error:  # weights of an architecture that it knows, but damaged
        raise ConfigError(f"{path}: spandrel cannot load it ({first_line(error)}); download it again") from None
    if not isinstance(model, spandrel.ImageModelDescriptor) or model.purpose not in ("SR", "FaceSR"):
        raise ConfigError(
            f"{path}: is a network for {model.purpose}, not for super-resolution; give another one's weights"
        )
    if (model.input_channels, model.output_channels) != (3, 3):
        raise ConfigError(f"{path}: reads {model.input_channels} channels, not RGB; give another network's weights")
    supported = {torch.float16: model.supports_half, torch.bfloat16: model.supports_bfloat16}
    dtype = dtype if supported.get(dtype, True) else torch.float32
    model.to(device=device, dtype=dtype).eval()
    return Enlarger(model, model.scale, device, dtype)  # the descriptor pads its input to multiples by itself


def _rrdbnet(official: Mapping[str, Tensor], path: Path) -> RRDBNet:
    try:
        return network_of(official)
    except Exception as error:  # damaged shapes and numbers raise many kinds of errors
        raise ConfigError(f"{path}: not a whole RRDBNet ({first_line(error)}); download it again") from None


def check_network(config: NetworkFile) -> None:
    """Raise ConfigError if the network that `config` names cannot be used, as far as the names and shapes of its
    tensors say. Reads no weights. Raises NotOnThisMachine for a file that is at the hub only."""
    path = find_network(config)
    if path.suffix == ".safetensors":
        state = {name: torch.empty(shape, device="meta") for name, shape in tensors_of(path).items()}
    else:
        state = read_weights(path, "meta")
    official = official_state(state)
    if "conv_first.weight" not in official or "RRDB_trunk.0.RDB1.conv1.weight" not in official:
        _require_spandrel(path)
        return
    with torch.device("meta"):
        _rrdbnet(official, path)


@lru_cache(maxsize=1)
def load_enlarger(config: NetworkFile, device: torch.device, dtype: torch.dtype) -> Enlarger:
    """The network that `config` names, ready to use. The last one stays loaded. Raises ConfigError with one line."""
    path = network_file(config)
    state = read_weights(path)
    official = official_state(state)
    if "conv_first.weight" not in official or "RRDB_trunk.0.RDB1.conv1.weight" not in official:
        return _by_spandrel(state, path, device, dtype)
    network = _rrdbnet(official, path)
    network.to(device, dtype)
    return Enlarger(network, network.scale, device, dtype, network.shape.unshuffle)
