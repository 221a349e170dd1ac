"""Rotary positions of a transformer for canvases that are larger than the images it was trained on.

A rotary embedding turns each pair k of a query's and a key's numbers by an angle, position x frequency, where the
frequency is omega_k = theta^(-2k/d) for an axis with d numbers. Beyond the trained size, angles occur that were never
trained. Two changes of the frequencies bring the lowest ones back within what was trained, and leave the highest ones,
which tell neighbours apart, as they are. s is how many times longer the axis is than at the native size L:

    ntk     max((10 theta)^(-2k/d), omega_k / s)                    I-Max: NTK scaling with a floor
    yarn    omega_k (1 - ramp_k) + omega_k / s ramp_k               YaRN by parts: the ramp goes from 0 to 1 between the
                                                                    pairs that turn 32 times and once within L

Attention over more tokens is flatter. The scores are multiplied by (0.1 ln s + 1)^2 (YaRN's temperature) or by
sqrt(log L' / log L), with the tokens L' here and L at the native size (proportional attention, I-Max). Queries and keys
are both multiplied by the length of the rotary embedding, so the root of the factor goes into that length.

Invariants:
- At the native size and below, frequencies and attention are the transformer's own.
- Only rows and columns of the image are scaled. The axes of text and of time are as they were.
- The transformer is restored when the block is left, also after an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, floor, log, pi, sqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn

from resmaster_stages.diffusion.patches import replaced_forward
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.bases.base import network_of

_NTK_FACTOR = 10.0
"""I-Max's factor on theta."""
_FAST, _SLOW = 32, 1
"""YaRN's bounds of the ramp, in turns within the native size."""
_AXES = (1, 2)
"""The axes of rows and columns. In all known transformers axis 0 is another one."""


def own_frequencies(dim: int, theta: float) -> Tensor:
    """The frequency of each pair of `dim` numbers: [dim / 2], float64, falling from 1."""
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def ntk_frequencies(dim: int, theta: float, stretch: float) -> Tensor:
    """I-Max's frequencies [dim / 2] for an axis that is `stretch` times longer."""
    return torch.maximum(own_frequencies(dim, _NTK_FACTOR * theta), own_frequencies(dim, theta) / stretch)


def yarn_frequencies(dim: int, theta: float, stretch: float, native: int) -> Tensor:
    """YaRN's frequencies [dim / 2] for an axis that is `stretch` times longer than `native` positions.

    The ramp is linear in the number of the pair, as in the authors' code.
    """

    def pair(turns: int) -> float:
        """The number of the pair that turns so often within the native size."""
        return dim * log(native / (2 * pi * turns)) / (2 * log(theta))

    first, last = max(floor(pair(_FAST)), 0), min(ceil(pair(_SLOW)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float64) - first) / max(last - first, 1e-3)
    own = own_frequencies(dim, theta)
    return torch.lerp(own, own / stretch, ramp.clamp(0, 1))


def yarn_temperature(stretch: float) -> float:
    """YaRN's factor on queries and on keys."""
    return 0.1 * log(stretch) + 1


def proportional_factor(tokens: int, native_tokens: int) -> float:
    """I-Max's factor on the scores of attention over `tokens` tokens."""
    return sqrt(log(tokens) / log(native_tokens))


@dataclass(frozen=True)
class Scaling:
    """The positions of one canvas."""

    kind: Literal["own", "ntk", "yarn"]
    attention: Literal["plain", "proportional"]
    height: int
    """Rows of the canvas, in the transformer's patches."""
    width: int
    native: int
    """Edge of an image of the native size, in patches."""
    text: int
    """Tokens of text beside those of the image."""

    @property
    def stretches(self) -> tuple[float, float]:
        """How many times longer rows and columns are than at the native size; at least 1."""
        return max(1.0, self.height / self.native), max(1.0, self.width / self.native)

    def frequencies(self, axis: int, dim: int, theta: float) -> Tensor:
        """The frequencies [dim / 2] of the axis number `axis`."""
        if self.kind == "own" or axis not in _AXES:
            return own_frequencies(dim, theta)
        stretch = self.stretches[_AXES.index(axis)]
        if self.kind == "ntk":
            return ntk_frequencies(dim, theta, stretch)
        return yarn_frequencies(dim, theta, stretch, self.native)

    @property
    def length(self) -> float:
        """The factor on queries and on keys. Proportional attention takes the place of YaRN's temperature."""
        if self.attention == "proportional":
            here, native = self.height * self.width, self.native**2
            return sqrt(proportional_factor(max(here, native) + self.text, native + self.text))
        rows, cols = self.stretches
        return yarn_temperature(sqrt(rows * cols)) if self.kind == "yarn" else 1.0


@lru_cache(maxsize=16)
def _frequencies_on(scaling: Scaling, dims: tuple[int, ...], theta: float, device: torch.device) -> tuple[Tensor, ...]:
    """The frequencies of each axis on `device`, kept there because uploading them at every step would make the device
    wait."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return tuple(scaling.frequencies(axis, dim, theta).to(device, dtype) for axis, dim in enumerate(dims))


def angles(ids: Tensor, dims: Sequence[int], theta: float, scaling: Scaling) -> Tensor:
    """The angle of each pair of each token [S, sum of dims / 2], for positions `ids` [S, axes]."""
    frequencies = _frequencies_on(scaling, tuple(dims), float(theta), ids.device)
    return torch.cat([ids[:, axis, None] * each for axis, each in enumerate(frequencies[: ids.shape[1]])], dim=1)


def _complex(turned: Tensor, length: float) -> Tensor:
    turned = turned.float()
    return torch.polar(torch.full_like(turned, length), turned)


def _real(own: Any, scaling: Scaling) -> Callable[..., Any]:
    """FLUX.1, Chroma and FLUX.2: positions [S, axes] -> (cos, sin), each [S, D], pairs side by side."""

    def forward(ids: Tensor) -> tuple[Tensor, Tensor]:
        turned = angles(ids, own.axes_dim, own.theta, scaling).repeat_interleave(2, dim=1)
        return (turned.cos() * scaling.length).float(), (turned.sin() * scaling.length).float()

    return forward


def _z_image(own: Any, scaling: Scaling) -> Callable[..., Any]:
    """Z-Image: positions [S, 3] -> complex [S, D / 2]. Its own table ends at 512 positions; this does not."""
    return lambda ids: _complex(angles(ids, own.axes_dims, own.theta, scaling), scaling.length)


def _qwen(own: Any, scaling: Scaling) -> Callable[..., Any]:
    """Qwen-Image: sizes in patches -> complex [S, D / 2] of the images and of the text.

    Rows and columns are counted from the middle of the image. The text comes after the longest image.
    """

    def forward(video_fhw: Any, device: Any = None, max_txt_seq_len: Any = None) -> tuple[Tensor, Tensor]:
        sizes = video_fhw[0] if isinstance(video_fhw, list) else video_fhw
        sizes = sizes if isinstance(sizes, list) else [sizes]
        ids, begin = [], 0
        for number, (frames, height, width) in enumerate(sizes):
            places = [torch.arange(number, number + frames, device=device)]
            for side in (height, width):
                before = side - side // 2 if own.scale_rope else 0
                places.append(torch.arange(-before, side - before, device=device))
                begin = max(begin, side // 2 if own.scale_rope else side)
            ids.append(torch.cartesian_prod(*places))
        text = torch.arange(begin, begin + int(max_txt_seq_len), device=device)[:, None].expand(-1, 3)
        return turned(torch.cat(ids)), turned(text)

    def turned(ids: Tensor) -> Tensor:
        return _complex(angles(ids, own.axes_dim, own.theta, scaling), scaling.length)

    return forward


_KINDS: dict[str, Callable[[Any, Scaling], Callable[..., Any]]] = {
    "FluxPosEmbed": _real,
    "Flux2PosEmbed": _real,
    "QwenEmbedRope": _qwen,
    "RopeEmbedder": _z_image,
}
"""Class of diffusers' rotary embedding -> what takes the place of its computation."""


@contextmanager
def _replaced(network: Any, name: str, computed: Callable[..., Any]) -> Iterator[None]:
    """Within the block, the embedding `name` of `network` computes `computed`. Z-Image's is no torch module."""
    own = getattr(network, name)
    if isinstance(own, nn.Module):
        with replaced_forward(own, computed):
            yield
        return
    setattr(network, name, computed)
    try:
        yield
    finally:
        setattr(network, name, own)


@contextmanager
def scaled_positions(denoiser: Any, scaling: Scaling) -> Iterator[None]:
    """Within the block, the transformer has the positions of `scaling`.

    denoiser: a transformer of diffusers, or an object that holds one as `network`. Raises ConfigError if its positions
    are of no known kind.
    """
    network = network_of(denoiser)
    for name in ("pos_embed", "rope_embedder"):
        own = getattr(network, name, None)
        if make := _KINDS.get(type(own).__name__):
            with _replaced(network, name, make(own, scaling)):
                yield
            return
    raise ConfigError(
        f"upscale.positions: a {type(network).__name__} has no rotary positions that can be scaled; set "
        "upscale.positions: own and upscale.attention: plain"
    )
