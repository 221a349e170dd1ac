"""The latent enlarger: a network that makes the latents of an image larger, by any factor (LSRNA, CVPR 2025).

Bicubic interpolation gives the coarse part. A network adds the rest. Its encoder is SwinIR's for small models (Liang et
al. 2021) without an upsampler: attention in windows that are shifted in every second block. Its head is LIIF's (Chen et
al. 2021): every latent of the result asks the four nearest cells, whose features say by a perceptron what lies at this
offset for this size of cell. The four answers are weighted by nearness.

Ours: the first layer of the perceptron reads 3 x 3 features, so it is a convolution that runs once per cell. The last
layer is linear and the four weights sum to one, so it runs once per latent of the result. Borders are continued instead
of filled with zeros, so a constant has the same neighbourhood everywhere.

`shape_of` reads all sizes from the weights, so a file needs no configuration beside it. This module does not deal with
files or VAEs.

Invariants:
- [B, C, h, w] -> [B, C, H, W], float32. A head whose last layer is zero gives exactly the bicubic enlargement.
- Encoding by tiles gives the same as encoding in one piece, up to rounding: the halo covers all that a cell can see.
- Memory depends on the tile, on the number of cells, and on `QUERIES`, not on the area of the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEED_FORWARD = 2
"""Width of a block's feed-forward layer, in widths of the block."""
CORE = 128
"""Edge of the part of a tile that goes into the result, in cells. A 1024 px image of SDXL is one such part."""
QUERIES = 256 * 256
"""The most latents of the result that the head computes at once."""
FINGERPRINT = "vae"
"""Tensor in a file of weights that says for which VAE they are (`models.latent_enlarger_files`)."""


@dataclass(frozen=True)
class EnlargerShape:
    """Sizes of a network. Those of LSRNA for SDXL: 60 wide, depths 6 6 6 6, 6 heads, windows of 8, a head of 4 layers
    that are 256 wide."""

    channels: int
    """Channels of the latents."""
    dim: int = 60
    depths: tuple[int, ...] = (6, 6, 6, 6)
    """Blocks of each layer."""
    heads: int = 6
    window: int = 8
    """Edge of the attention windows, in cells. Even."""
    hidden: int = 256
    """Width of the head."""
    layers: int = 4
    """Hidden layers of the head."""

    @property
    def halo(self) -> int:
        """Cells beyond an edge of aligned windows that can change what lies within it: a multiple of `window`."""
        reach = 3  # the head's convolution, the encoder's last one and that of the last layer
        for depth in reversed(self.depths):
            for number in reversed(range(depth)):
                reach = _to_border(reach, self.window, self.window // 2 if number % 2 else 0)
            reach += 1
        return -(-reach // self.window) * self.window


def _to_border(reach: int, window: int, shift: int) -> int:
    """`reach` cells beyond a border of windows, rounded up to the next border of windows that are moved by `shift`."""
    return -(-(reach - shift) // window) * window + shift


class WindowBlock(nn.Module):
    """Attention within windows, and a feed-forward layer. Tokens are [B, h, w, dim], sides multiples of the window."""

    def __init__(self, dim: int, heads: int, window: int, shifted: bool) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.widen = nn.Linear(dim, FEED_FORWARD * dim)
        self.narrow = nn.Linear(FEED_FORWARD * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attended(self.norm1(x))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))

    def _attended(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        w, rows, cols = self.window, height // self.window, width // self.window
        moved = x.roll((-self.shift, -self.shift), (1, 2)) if self.shift else x
        cells = moved.view(batch, rows, w, cols, w, dim).transpose(2, 3).reshape(batch, rows * cols, w * w, dim)
        q, k, v = self.qkv(cells).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)  # [B, N, heads, w w, d]
        bias = self.bias[_offsets(w).to(x.device)].permute(2, 0, 1)  # [heads, w w, w w]
        if self.shift:
            bias = bias + _wrapped(rows, cols, w).to(x.device, x.dtype)[:, None]  # [N, heads, w w, w w]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(2, 3).flatten(3)
        out = self.proj(out).view(batch, rows, cols, w, w, dim).transpose(2, 3).reshape(batch, height, width, dim)
        return out.roll((self.shift, self.shift), (1, 2)) if self.shift else out


@lru_cache(maxsize=4)
def _offsets(window: int) -> Tensor:
    """For each pair of a window's cells the row of the table of biases by relative position: [w w, w w]."""
    places = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    dy, dx = (places[:, None] - places[None] + window - 1).unbind(-1)
    return dy * (2 * window - 1) + dx


@lru_cache(maxsize=8)
def _wrapped(rows: int, cols: int, window: int) -> Tensor:
    """Mask [rows cols, w w, w w] of shifted windows: minus infinity between cells that only touch around the border."""
    down = (torch.arange(rows * window) >= rows * window - window // 2).long()
    across = (torch.arange(cols * window) >= cols * window - window // 2).long()
    side = 2 * down[:, None] + across
    parts = side.view(rows, window, cols, window).transpose(1, 2).reshape(rows * cols, -1)
    return torch.zeros(()).masked_fill(parts[:, None] != parts[:, :, None], -torch.inf)


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="replicate")


class Layer(nn.Module):
    """Blocks whose windows are shifted in turn, and a convolution, within a residual."""

    def __init__(self, shape: EnlargerShape, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(WindowBlock(shape.dim, shape.heads, shape.window, number % 2 == 1) for number in range(depth))
        )
        self.conv = _convolution(shape.dim, shape.dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.blocks(x.permute(0, 2, 3, 1))
        return x + self.conv(tokens.permute(0, 3, 1, 2).contiguous())


class LatentEnlarger(nn.Module):
    """The network with the sizes of `shape`."""

    def __init__(self, shape: EnlargerShape) -> None:
        super().__init__()
        self.shape = shape
        self.first = _convolution(shape.channels, shape.dim)
        self.layers = nn.ModuleList(Layer(shape, depth) for depth in shape.depths)
        self.norm = nn.LayerNorm(shape.dim)
        self.last = _convolution(shape.dim, shape.dim)
        self.look = _convolution(shape.dim, shape.hidden)
        self.place = nn.Linear(4, shape.hidden, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(shape.hidden, shape.hidden) for _ in range(shape.layers - 1))
        self.out = nn.Linear(shape.hidden, shape.channels)

    def encode(self, latents: Tensor) -> Tensor:
        """What the head asks: [B, C, h, w] -> [B, hidden, h, w], sides multiples of the window, in one piece."""
        first = self.first(latents)
        x = first
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
        return self.look(first + self.last(x))

    def encode_by_tiles(self, latents: Tensor, core: int = CORE) -> Tensor:
        """As `encode`, for sides of any length. Large inputs are cut into tiles: `core` cells and a halo around."""
        shape, (height, width) = self.shape, latents.shape[-2:]
        whole = F.pad(latents, (0, -width % shape.window, 0, -height % shape.window), mode="replicate")
        if max(whole.shape[-2:]) <= core + 2 * shape.halo:
            return self.encode(whole)[..., :height, :width]
        rows, cols = ([*_tiles(side, core, shape.halo)] for side in whole.shape[-2:])
        made = latents.new_zeros(len(latents), shape.hidden, *whole.shape[-2:])
        for (y0, y1), (top, bottom) in rows:
            for (x0, x1), (left, right) in cols:
                tile = self.encode(whole[..., top:bottom, left:right])
                made[..., y0:y1, x0:x1] = tile[..., y0 - top : y1 - top, x0 - left : x1 - left]
        return made[..., :height, :width]

    def answer(self, asked: Tensor, rows: Places, cols: Places) -> Tensor:
        """What the head adds to the bicubic enlargement at the places `rows` x `cols`: [B, C, rows, cols].

        asked: [B, hidden, h, w], from `encode`.
        """
        total = asked.new_zeros(len(asked), len(rows), len(cols), asked.shape[1])
        for down in (0, 1):
            (y, dy, near_y) = rows.neighbour(down)
            features = asked.index_select(2, y)
            for right in (0, 1):
                (x, dx, near_x) = cols.neighbour(right)
                at_y, at_x, cell_y, cell_x = self.place.weight.unbind(1)  # [hidden] each
                across = dx[:, None] * at_x + cols.cell * cell_x + rows.cell * cell_y  # [cols, hidden]
                known = features.index_select(3, x).permute(0, 2, 3, 1)
                known = F.relu(known + (dy[:, None] * at_y)[:, None] + across)
                for layer in self.hidden:
                    known = F.relu(layer(known))
                total = total + (near_y[:, None] * near_x)[..., None] * known
        return self.out(total).permute(0, 3, 1, 2)

    def forward(self, latents: Tensor, height: int, width: int) -> Tensor:
        """[B, C, h, w] -> [B, C, height, width], one sample and some rows of the result at a time."""
        made = F.interpolate(latents, size=(height, width), mode="bicubic", align_corners=False)
        rows, cols = (
            Places.of(size, wanted, latents.device) for size, wanted in zip(latents.shape[-2:], (height, width))
        )
        at_once = max(1, QUERIES // width)
        for number, sample in enumerate(latents):
            asked = self.encode_by_tiles(sample[None])
            for top in range(0, height, at_once):
                made[number, :, top : top + at_once] += self.answer(asked, rows[top : top + at_once], cols)[0]
        return made


def _tiles(side: int, core: int, halo: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """The cores [start, end) of an axis and the tiles around them."""
    for start in range(0, side, core):
        end = min(start + core, side)
        yield (start, end), (max(0, start - halo), min(side, end + halo))


@dataclass(frozen=True, eq=False)
class Places:
    """Places on one axis of a result, in cells of the input."""

    before: Tensor
    """The cell whose centre lies before each place: [n], -1 if there is none."""
    after: Tensor
    """How far each place lies behind that centre, from 0 to 1: [n]."""
    cells: int
    """Cells of the axis."""
    cell: float
    """Length of the axis of one place, in cells."""

    @classmethod
    def of(cls, cells: int, places: int, device: torch.device) -> Places:
        """The centres of `places` equal parts of an axis of `cells` cells."""
        at = (torch.arange(places, dtype=torch.float64) + 0.5) * cells / places - 0.5
        before = at.floor()
        return cls(before.long().to(device), (at - before).float().to(device), cells, cells / places)

    def __len__(self) -> int:
        return len(self.before)

    def __getitem__(self, part: slice) -> Places:
        return Places(self.before[part], self.after[part], self.cells, self.cell)

    def neighbour(self, which: int) -> tuple[Tensor, Tensor, Tensor]:
        """(cell, offset from its centre in cells, weight) of each place's neighbour before (0) or behind (1) it."""
        near = self.after if which else 1 - self.after
        return (self.before + which).clamp(0, self.cells - 1), self.after - which, near


def shape_of(state: Mapping[str, Tensor]) -> EnlargerShape:
    """The shape of the network whose weights are `state`. Raises KeyError for weights of another network."""
    table, head = state["layers.0.blocks.0.bias"], state["look.weight"]
    depths: dict[int, int] = {}
    hidden = 0
    for name in state:
        match name.split("."):
            case ["layers", layer, "blocks", block, "bias"]:
                depths[int(layer)] = max(depths.get(int(layer), 0), int(block) + 1)
            case ["hidden", _, "weight"]:
                hidden += 1
    return EnlargerShape(
        channels=state["out.weight"].shape[0],
        dim=head.shape[1],
        depths=tuple(depths[number] for number in range(len(depths))),
        heads=table.shape[1],
        window=(round(table.shape[0] ** 0.5) + 1) // 2,
        hidden=head.shape[0],
        layers=hidden + 1,
    )


def network_of(state: Mapping[str, Tensor]) -> LatentEnlarger:
    """The network whose weights are `state`, loaded strictly. The tensors are not copied.

    Raises KeyError, RuntimeError or ValueError where names, shapes or numbers are not those of a latent enlarger.
    """
    with torch.device("meta"):  # so that sizes which the file only claims take no memory
        network = LatentEnlarger(shape_of(state))
    network.load_state_dict(dict(state), strict=True, assign=True)
    return network.eval().requires_grad_(False)
