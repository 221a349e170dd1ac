"""RRDBNet, the super-resolution network of ESRGAN, BSRGAN and Real-ESRGAN (Wang et al. 2018; Zhang et al. 2021).

The network is purely convolutional. A trunk of residual-in-residual dense blocks works at the small size. Then nearest
enlargements by two follow, with a convolution each. The modules have the names of BSRGAN's published weights.
`official_state` renames Real-ESRGAN's weights, and `shape_of` reads all sizes from the weights, so a file needs no
configuration beside it. This module does not deal with files, tiles or image formats.

Invariant: [N, 3, h, w] in [0, 1] -> [N, 3, scale h, scale w], not clamped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2
"""Slope of the leaky ReLUs."""
DAMPING = 0.2
"""Factor on what a block adds to its input, at both levels."""


@dataclass(frozen=True)
class RRDBShape:
    """Sizes of a network. BSRGAN's: 64 features, 23 blocks, growth 32, two enlargements (one for the x2 weights)."""

    features: int = 64
    blocks: int = 23
    growth: int = 32
    enlargements: int = 2
    unshuffle: int = 1
    """Pixels per side that are folded into channels first. 2 for Real-ESRGAN's x2 weights, which still have two
    enlargements."""

    @property
    def scale(self) -> int:
        """Output size over input size."""
        return int(2**self.enlargements) // self.unshuffle


class DenseBlock(nn.Module):
    """Five 3 x 3 convolutions, each of which reads the block's input and the outputs of all before it."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        for number in range(4):
            self.add_module(f"conv{number + 1}", nn.Conv2d(features + number * growth, growth, 3, padding=1))
        self.conv5 = nn.Conv2d(features + 4 * growth, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        known = x
        for number in range(4):
            made = F.leaky_relu(self.get_submodule(f"conv{number + 1}")(known), SLOPE)
            known = torch.cat([known, made], dim=1)
        return x + DAMPING * self.conv5(known)


class RRDB(nn.Module):
    """Three dense blocks within one more residual."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.RDB1 = DenseBlock(features, growth)
        self.RDB2 = DenseBlock(features, growth)
        self.RDB3 = DenseBlock(features, growth)

    def forward(self, x: Tensor) -> Tensor:
        return x + DAMPING * self.RDB3(self.RDB2(self.RDB1(x)))


class RRDBNet(nn.Module):
    """The network with the sizes of `shape`."""

    def __init__(self, shape: RRDBShape) -> None:
        super().__init__()
        self.shape = shape
        features = shape.features
        self.conv_first = nn.Conv2d(3 * shape.unshuffle**2, features, 3, padding=1)
        self.RRDB_trunk = nn.Sequential(*(RRDB(features, shape.growth) for _ in range(shape.blocks)))
        self.trunk_conv = nn.Conv2d(features, features, 3, padding=1)
        for number in range(shape.enlargements):
            self.add_module(f"upconv{number + 1}", nn.Conv2d(features, features, 3, padding=1))
        self.HRconv = nn.Conv2d(features, features, 3, padding=1)
        self.conv_last = nn.Conv2d(features, 3, 3, padding=1)

    @property
    def scale(self) -> int:
        """Output size over input size."""
        return self.shape.scale

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, h, w] -> [N, 3, scale h, scale w]. With pixel unshuffling, h and w must be multiples of
        `unshuffle`."""
        first = self.conv_first(F.pixel_unshuffle(x, self.shape.unshuffle))
        features = first + self.trunk_conv(self.RRDB_trunk(first))
        for number in range(self.shape.enlargements):
            large = F.interpolate(features, scale_factor=2, mode="nearest")
            features = F.leaky_relu(self.get_submodule(f"upconv{number + 1}")(large), SLOPE)
        return self.conv_last(F.leaky_relu(self.HRconv(features), SLOPE))


_RENAMED = (
    (r"body\.(\d+)\.rdb([123])\.", r"RRDB_trunk.\1.RDB\2."),
    (r"conv_body\.", "trunk_conv."),
    (r"conv_up([12])\.", r"upconv\1."),
    (r"conv_hr\.", "HRconv."),
)


def official_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with BSRGAN's names: unchanged, or renamed from Real-ESRGAN's names (`body.0.rdb1.conv1`, ...)."""
    renamed = {}
    for name, value in state.items():
        for pattern, official in _RENAMED:
            name = re.sub(f"^{pattern}", official, name)
        renamed[name] = value
    return renamed


def shape_of(state: Mapping[str, Tensor]) -> RRDBShape:
    """The shape of the network whose weights are `state` (with official names).

    Raises KeyError for weights of another network.
    """
    first = state["conv_first.weight"]
    blocks = {name.split(".")[1] for name in state if name.startswith("RRDB_trunk.")}
    return RRDBShape(
        features=first.shape[0],
        blocks=len(blocks),
        growth=state["RRDB_trunk.0.RDB1.conv1.weight"].shape[0],
        enlargements=sum(f"upconv{number}.weight" in state for number in (1, 2)),
        unshuffle=round((first.shape[1] / 3) ** 0.5),
    )


def network_of(state: Mapping[str, Tensor]) -> RRDBNet:
    """The network whose weights are `state` (with official names), loaded strictly. The tensors are not copied.

    Raises KeyError, IndexError or RuntimeError where names, shapes or numbers are not those of an RRDBNet.
    """
    with torch.device("meta"):  # so that sizes which the file only claims take no memory
        network = RRDBNet(shape_of(state))
    network.load_state_dict(dict(state), strict=True, assign=True)
    return network.eval().requires_grad_(False)
