"""HiDiffusion's layers: deep features of the native size on a larger canvas, and self-attention inside quarters.

- `STRIDED`: a down-sampling convolution that makes features 4 times smaller instead of 2, with taps two cells apart.
- `pooled`: from one layer on the way down to one layer on the way up, features are half as large.
- `sizes_forwarded`: features are enlarged to the size of those that they are joined with, whatever the factor.
- `quartered`: self-attention inside the four quarters of a canvas that is rolled anew at every step and layer.

This module does not decide which layers are changed at which steps.

Invariants:
- Sides of any length are served. Where a side is odd, self-attention stays plain.
- Constants stay constant when they are pooled and restored. Everything is undone at the end of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resmaster_stages.diffusion.guidance import DenoiserCall
from resmaster_stages.diffusion.patches import level_size, replaced_forward, replaced_forwards
from resmaster_stages.models.bases.base import network_of

MOVES = 4
"""The number of rolls that a layer draws from: by none to three quarters of a quarter's side."""

_ANY_FACTOR = 12
"""Up-samplings that are feigned. The UNet then takes no canvas for one whose sides are halved without remainder."""


@dataclass(frozen=True)
class Strided:
    """A down-sampling convolution with twice its stride, and its taps two cells apart."""

    def __call__(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, C', h / 4, w / 4], rounded up, for a convolution of stride 2."""
        down, across = (2 * stride for stride in conv.stride)
        return F.conv2d(x, conv.weight, conv.bias, (down, across), 2, 2, conv.groups)


STRIDED = Strided()


@contextmanager
def sizes_forwarded(unet: Any) -> Iterator[None]:
    """Within the block, up-sampling layers get the size that they have to enlarge to."""
    network = network_of(unet)
    before = network.num_upsamplers
    try:
        network.num_upsamplers = before + _ANY_FACTOR
        yield
    finally:
        network.num_upsamplers = before


def pool(x: Tensor) -> Tensor:
    """[N, C, h, w] -> [N, C, h / 2, w / 2], rounded up: means of 2 x 2 cells, or of what is left of them at borders."""
    return F.avg_pool2d(x, 2, ceil_mode=True)


def restore(x: Tensor, size: Sequence[int]) -> Tensor:
    """`x` [N, C, h, w] at `size` (height, width), bicubic."""
    return F.interpolate(x, size=tuple(size), mode="bicubic", align_corners=False)


def _layers(block: Any) -> nn.ModuleList:
    """The layers of a block after which features are joined or kept: its attentions or, if it has none, its resnets."""
    return getattr(block, "attentions", None) or block.resnets


@contextmanager
def pooled(unet: Any, call: DenoiserCall, level: int, steps: Container[int]) -> Iterator[None]:
    """Within the block, at the steps `steps`, features are pooled after the first layer of down block `level` and
    restored before the last layer of the up block beside it.

    So the last layer there sees what was kept before pooling, and all between see small features.
    """
    network, size = network_of(unet), [0, 0]
    first = _layers(network.down_blocks[level])[0]
    last = _layers(network.up_blocks[len(network.down_blocks) - 1 - level])[-2]

    def smaller(x: Tensor) -> Tensor:
        size[:] = x.shape[-2:]
        return pool(x)

    def after(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        plain = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = plain(*args, **kwargs)
            if call.index not in steps:
                return output
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        return forward

    with (
        replaced_forward(first, after(first, smaller)),
        replaced_forward(last, after(last, lambda x: restore(x, size))),
    ):
        yield


def draw_moves(generators: Sequence[torch.Generator], steps: int, layers: int) -> list[list[list[int]]]:
    """How far each layer rolls the canvas at each step, from 0 to MOVES - 1: [sample][step][layer], from each sample's
    own generator."""
    return [torch.randint(MOVES, (steps, layers), generator=each).tolist() for each in generators]


def quarters(tokens: Tensor, size: Sequence[int], moves: Sequence[int]) -> Tensor:
    """`tokens` [N, T, C] of canvases of `size`, rolled up and left by its move each, as quarters [4 N, T / 4, C]."""
    canvas = _rolled(tokens.unflatten(1, tuple(size)), moves, -1)
    cells = canvas.unflatten(2, (2, -1)).unflatten(1, (2, -1))  # [N, 2, h, 2, w, C]
    return cells.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def whole(parts: Tensor, size: Sequence[int], moves: Sequence[int]) -> Tensor:
    """The inverse of `quarters`: [4 N, T / 4, C] -> [N, T, C]."""
    cells = parts.unflatten(1, (size[0] // 2, size[1] // 2)).unflatten(0, (-1, 2, 2))  # [N, 2, 2, h, w, C]
    return _rolled(cells.transpose(2, 3).flatten(3, 4).flatten(1, 2), moves, 1).flatten(1, 2)


def _rolled(canvas: Tensor, moves: Sequence[int], sign: int) -> Tensor:
    """Each canvas of [N, h, w, C] rolled along both axes by its move, in units of an eighth of a side."""
    units = [side // (2 * MOVES) for side in canvas.shape[1:3]]
    return torch.stack([each.roll([sign * move * unit for unit in units], (0, 1)) for each, move in zip(canvas, moves)])


@contextmanager
def quartered(
    unet: Any, call: DenoiserCall, names: Sequence[str], size: Sequence[int], moves: Sequence[Sequence[Sequence[int]]]
) -> Iterator[None]:
    """Within the block, the self-attentions `names` look inside quarters.

    size: (height, width) of the canvas in latents. moves: as `draw_moves` gives them, for the layers in the order of
    `names`.
    """
    height, width = size

    def forward_of(name: str, layer: Any) -> Callable[..., Tensor]:
        number, plain = names.index(name), layer.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            level = level_size(height, width, x.shape[1])
            if any(side % 2 for side in level):
                return plain(x, *args, **kwargs)
            samples = call.canvases(len(moves))
            drawn = [moves[sample][call.index][number] for sample in samples] * (len(x) // len(samples))
            return whole(plain(quarters(x, level, drawn), *args, **kwargs), level, drawn)

        return forward

    with replaced_forwards([(name, network_of(unet).get_submodule(name)) for name in names], forward_of):
        yield
