"""A cross-attention composer: the whole image's attention decides what each view takes from the global prompt.

At every step, the small image with the canvas's noise level is predicted once with the global prompt (`capturing`).
The map of every cross-attention layer, averaged over heads, is kept. The same layer of a view then computes

    (1 - share) * attention to the view's own text + share * (map of the view's part of the image) @ global values

so a view attends to a word of the global prompt only as much as the whole image does at that place. This module does
not depend on a method.

Invariants:
- Only the text branch is changed. With `share` 0 no branch is changed. All layers are restored at the end.
- Rows of a map sum to one. A view that covers the whole image gets the image's own map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resmaster_stages.config.wrap import Axes
from resmaster_stages.diffusion.guidance import TEXT, DenoiserCall
from resmaster_stages.diffusion.patches import layers_named, level_size, replaced_forwards
from resmaster_stages.diffusion.views import Grid


def attention_map(query: Tensor, key: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """[N, T, C] and [N, S, C] -> attention of every token to every word [N, T, S], averaged over heads.

    bias: [N, 1, S], added to the scores; it takes padding out of attention (PixArt). None: every word is read.
    """
    split = [each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (query, key)]  # [N, heads, T or S, C / heads]
    scores = split[0] @ split[1].transpose(2, 3) / split[0].shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias[:, None]
    return scores.softmax(dim=-1).mean(dim=1)


def sampled(maps: Tensor, places: Tensor, wraps: Axes = (False, False)) -> Tensor:
    """Sample `maps` [N, S, h, w] at `places` [N, T, 2] (x, y from -1 to 1), bicubic. The words of a place sum to 1.

    Along axes that wrap, the maps are read on at the opposite border. Returns [N, T, S].
    """
    down, across = (2 * wrapped for wrapped in wraps)
    if down or across:
        (height, width), maps = maps.shape[-2:], F.pad(maps, (across, across, down, down), mode="circular")
        places = places * places.new_tensor([width / (width + 2 * across), height / (height + 2 * down)])
    words = F.grid_sample(
        maps, places[:, None].to(maps.dtype), mode="bicubic", padding_mode="border", align_corners=False
    )  # [N, S, 1, T]
    words = words[:, :, 0].transpose(1, 2).clamp(min=0)
    return words / words.sum(dim=-1, keepdim=True).clamp(min=1e-6)


def text_part(states: Any) -> Tensor:
    """The text part of a cross-attention layer's input, with or without an IP-Adapter."""
    return states[0] if isinstance(states, tuple) else states


class Composer:
    """Keeps the attention maps of the small images, and composes the views' attention with them.

    grid: the views, in latents. small: (height, width) of the small image, in latents.
    """

    def __init__(self, grid: Grid, small: Sequence[int], share: float, device: torch.device) -> None:
        self.grid, self.small = grid, (small[0], small[1])
        self.share, self.device = share, device
        self.call = DenoiserCall()  # within `patch` it is the loop's call
        self.maps: dict[str, list[Tensor]] = {}  # layer -> batches of [n, S, h, w]
        self.values: dict[str, list[Tensor]] = {}  # layer -> batches of [n, S, C]
        self._capturing = False
        self._places: dict[int, Tensor] = {}

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Within the block, the UNet predicts the small images with their global prompts, one row per image, and
        their maps are kept."""
        self.maps, self.values, self._capturing = {}, {}, True
        try:
            yield
        finally:
            self._capturing = False

    def places(self, tokens: int) -> Tensor:
        """The centre of each token of each view, on the image: [views, tokens, 2], (x, y) from -1 to 1."""
        if tokens not in self._places:
            grid = self.grid
            rows, cols = level_size(grid.window_height, grid.window_width, tokens)
            down = (torch.arange(rows) + 0.5) * grid.window_height / rows
            across = (torch.arange(cols) + 0.5) * grid.window_width / cols
            y, x = torch.meshgrid(down, across, indexing="ij")
            origins = torch.tensor([box[:2] for box in grid.boxes])  # [views, 2]
            y = (y.flatten() + origins[:, :1]) % grid.height / grid.height
            x = (x.flatten() + origins[:, 1:]) % grid.width / grid.width
            self._places[tokens] = (torch.stack([x, y], dim=-1) * 2 - 1).to(self.device)
        return self._places[tokens]

    def _keep(self, name: str, attention: Any, x: Tensor, text: Tensor, bias: Tensor | None) -> None:
        words = attention_map(attention.to_q(x), attention.to_k(text), attention.heads, bias)
        size = level_size(*self.small, x.shape[1])
        self.maps.setdefault(name, []).append(words.float().transpose(1, 2).unflatten(2, size))
        self.values.setdefault(name, []).append(attention.to_v(text))

    def _compose(self, name: str, attention: Any, y: Tensor) -> Tensor:
        """The layer's plain output `y`, with its text rows composed."""
        items = self.call.items
        assert items is not None, "views are predicted within the denoising loop"
        sample, view = items // len(self.grid), items % len(self.grid)
        places = self.places(y.shape[1])[view]
        words = sampled(torch.cat(self.maps[name])[sample], places, self.grid.wraps)  # [n, T, S]
        heard = attention.to_out[0](words.to(y.dtype) @ torch.cat(self.values[name])[sample])  # [n, T, C]
        rows = list(y.chunk(len(self.call.branches)))
        place = self.call.branches.index(TEXT)
        rows[place] = (1 - self.share) * rows[place] + self.share * heard
        return torch.cat(rows)

    def _layer(self, name: str, attention: Any, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(x: Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any) -> Tensor:
            y = plain(x, encoder_hidden_states, *args, **kwargs)
            if self._capturing:
                self._keep(name, attention, x, text_part(encoder_hidden_states), kwargs.get("attention_mask"))
                return y
            return self._compose(name, attention, y)

        return forward

    @contextmanager
    def patch(self, unet: Any, call: DenoiserCall) -> Iterator[None]:
        """Within the block, every cross-attention of `unet` is composed, or captured inside `capturing`."""
        self.call = call

        def forward_of(name: str, module: Any) -> Callable[..., Tensor]:
            return self._layer(name, module, module.forward)

        with replaced_forwards(layers_named(unet, ".attn2"), forward_of):
            yield
