"""The conditions of each view: text, size and crop, image prompt, each with its unconditional counterpart.

Items are the views of all samples, sample by sample: item = sample * views + view.

Invariants:
- Row i of every batch depends on item i alone: permuting the items permutes the predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resmaster_stages.diffusion.guidance import NEGATIVE, TEXT, Branches
from resmaster_stages.diffusion.text import TextEmbeddings, encode_prompts
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.models.bases.base import Rows
from resmaster_stages.models.parts import Models


@dataclass(frozen=True)
class Conditions:
    """Conditions of N items. `negative` is None without guidance, because there is no unconditional branch then."""

    text: TextEmbeddings
    negative: TextEmbeddings | None
    sizes: Tensor  # [N, 6]: original height and width, crop top and left, target height and width, all in px
    image: Tensor | None = None  # [N, 1, ...]
    negative_image: Tensor | None = None
    guidance_scale: float = 1.0
    """Read by denoisers with embedded guidance."""

    def __len__(self) -> int:
        return len(self.sizes)

    def take(self, items: Tensor) -> Conditions:
        """The conditions of `items` [M] (long, on the CPU), in the order of `items`."""
        numbers = items.tolist()
        items = items.to(self.sizes.device, non_blocking=True)

        def taken(text: TextEmbeddings) -> TextEmbeddings:
            lengths = tuple(text.lengths[number] for number in numbers) if text.lengths else ()
            return replace(text, index=text.index[items], lengths=lengths)

        return replace(
            self,
            text=taken(self.text),
            negative=None if self.negative is None else taken(self.negative),
            sizes=self.sizes[items],
            image=None if self.image is None else self.image[items],
            negative_image=None if self.negative_image is None else self.negative_image[items],
        )

    def texts(self, items: Tensor, branches: Branches) -> list[tuple[TextEmbeddings, Tensor]]:
        """For each branch, the distinct prompts and the index of the prompt that each of `items` [n] (long) uses."""
        texts = [self.text if branch.conditional else self.negative for branch in branches]
        rows = [(text, text.index[items]) for text in texts if text is not None]
        assert len(rows) == len(branches), "an unconditional branch without negative conditions"
        return rows

    def rows(self, items: Tensor, branches: Branches = (NEGATIVE, TEXT), numbers: Sequence[int] | None = None) -> Rows:
        """The denoiser's rows for `items` [n] (long), branch by branch. An unconditional branch needs `negative`.

        numbers: `items` as Python has them. None: they are read from the device.
        """
        images = [self.image if branch.conditional else self.negative_image for branch in branches]
        texts = self.texts(items, branches)
        masks = [text.mask[i] for text, i in texts if text.mask is not None]
        lengths: tuple[int, ...] = ()
        if masks:
            numbers = items.tolist() if numbers is None else numbers
            lengths = tuple(text.lengths[number] for text, _ in texts for number in numbers)
        return Rows(
            lengths=lengths,
            states=torch.cat([text.states[i] for text, i in texts]),
            mask=torch.cat(masks) if masks else None,
            guidance_scale=self.guidance_scale,
            pooled=torch.cat([text.pooled[i] for text, i in texts]),
            sizes=self.sizes[items].repeat(len(branches), 1),
            image=None if self.image is None else torch.cat([image[items] for image in images if image is not None]),
        )


def size_and_crop(grid: Grid, micro_conditioning: str) -> list[tuple[int, ...]]:
    """SDXL's six size conditions for each view (`Conditions.sizes`).

    With `micro_conditioning` `canvas` they are the size of the canvas and the place of the view in it. With `native`
    they are those of a native-size image.
    """
    factor = grid.unit_px
    canvas = (grid.height * factor, grid.width * factor)
    window = (grid.window_height * factor, grid.window_width * factor)
    if micro_conditioning == "native":
        return [(*window, 0, 0, *window)] * len(grid)
    return [(*canvas, y0 * factor, x0 * factor, *canvas) for y0, x0, _, _ in grid.boxes]


def make_conditions(
    models: Models,
    grid: Grid,
    prompts: Sequence[str],
    negative_prompts: Sequence[str],
    *,
    guidance_scale: float,
    micro_conditioning: str = "canvas",
    image: tuple[Tensor, Tensor] | None = None,
    sizes: Sequence[tuple[int, ...]] | None = None,
) -> Conditions:
    """Conditions of all items of a batch: `prompts`, `negative_prompts` and `image` embeddings have one entry per item.

    Negative prompts are not encoded if there are none, or if `guidance_scale` takes no unconditional branch. All texts
    get one number of states. `sizes` gives six numbers per item, for
    methods that do not use `micro_conditioning`.
    """
    sizes = sizes or size_and_crop(grid, micro_conditioning) * (len(prompts) // len(grid))
    text, negative = encode_prompts(models, prompts), None
    if negative_prompts and models.guided(guidance_scale):
        negative = encode_prompts(models, negative_prompts, negative=True)
        longest = max(text.states.shape[1], negative.states.shape[1])
        text, negative = text.padded(longest), negative.padded(longest)
    return Conditions(
        text=text,
        negative=negative,
        guidance_scale=guidance_scale,
        sizes=torch.tensor(sizes, dtype=torch.float32, device=models.device),
        image=image[0] if image else None,
        negative_image=image[1] if image else None,
    )
