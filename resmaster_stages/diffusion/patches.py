"""Temporary changes of a UNet: chooses layers, replaces their computation and restores it.

Invariants:
- Every replacement is undone when its block is left, also after an exception. Blocks may be nested, and the
  innermost replacement is active.
- Layers are chosen by their place in the UNet, not by number: `down_blocks.-1` is the deepest block of a UNet of any
  depth.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from resmaster_stages.errors import ConfigError
from resmaster_stages.models.bases.base import network_of


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the block, `module` computes `forward` instead of its own forward."""
    before = module.__dict__.get("forward")
    object.__setattr__(module, "forward", forward)
    try:
        yield
    finally:
        if before is None:
            object.__delattr__(module, "forward")
        else:
            object.__setattr__(module, "forward", before)


@contextmanager
def replaced_forwards(
    layers: Iterable[tuple[str, nn.Module]], forward_of: Callable[[str, nn.Module], Callable[..., Any]]
) -> Iterator[None]:
    """Within the block, each of `layers` (name, module) computes what `forward_of` gives for it."""
    with ExitStack() as stack:
        for name, module in layers:
            stack.enter_context(replaced_forward(module, forward_of(name, module)))
        yield


def layers_named(unet: Any, *endings: str) -> list[tuple[str, nn.Module]]:
    """(name, module) of each layer of the UNet whose name ends so: `.attn1` is self-attention, `.attn2`
    cross-attention."""
    return [(name, module) for name, module in network_of(unet).named_modules() if name.endswith(endings)]


def chosen_layers(unet: Any, patterns: Mapping[str, float], method: str) -> dict[str, float]:
    """The convolutions that `patterns` name, each with its pattern's value. Raises ConfigError if there are none.

    A pattern is a place in the UNet: `down_blocks.-1.resnets` (both 3 x 3 convolutions of every residual block there),
    `mid_block.resnets`, `up_blocks.0.upsamplers`, `down_blocks.-2.downsamplers`. -1 is the deepest down block (on SDXL
    `down_blocks.2`) and 0 is the deepest up block. Places that the UNet does not have are left out.
    """
    names = [name for name, module in network_of(unet).named_modules() if isinstance(module, nn.Conv2d)]
    depth = len(network_of(unet).down_blocks)
    chosen: dict[str, float] = {}
    for pattern, value in patterns.items():
        place = re.sub(r"\.(-\d+)\.", lambda match: f".{depth + int(match[1])}.", pattern)
        part = r"\d+\.conv[12]" if place.endswith("resnets") else r"\d+\.conv"
        chosen |= {name: value for name in names if re.fullmatch(rf"{re.escape(place)}\.{part}", name)}
    if patterns and not chosen:
        raise ConfigError(
            f"method {method}: the model's UNet has none of its layers ({', '.join(patterns)}); use an SDXL or Stable "
            "Diffusion model"
        )
    return chosen


def level_of(height: int, width: int, tokens: int) -> int:
    """How often the UNet halved an input of `height` x `width` latents where it has `tokens` tokens."""
    for level in range(8):
        if -(-height // 2**level) * -(-width // 2**level) == tokens:
            return level
    raise ValueError(f"{tokens} tokens are no level of {height} x {width} latents")


def level_size(height: int, width: int, tokens: int) -> tuple[int, int]:
    """(height, width) of the UNet's level with `tokens` tokens, for an input of `height` x `width` latents."""
    factor = 2 ** level_of(height, width, tokens)
    return -(-height // factor), -(-width // factor)


Layer = Callable[[nn.Conv2d, Tensor], Tensor]
"""Computes a convolution layer on features [N, C, h, w]."""
