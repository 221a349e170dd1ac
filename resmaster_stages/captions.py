"""Stage 3: writes a caption for each patch of the target canvas (ResMaster's enhanced text prompts), one row per patch.

A patch is a crop of the reference B^L, which is the low-res image enlarged bicubically to the target size. So the
captioner sees exactly the part of the image that the upscaler will redraw. This module does not access storage.

Invariants:
- Boxes are half-open, in target px, in the order y0, x0, y1, x1. Rows are in row-major order of the grid. Where the
  image wraps, a box that ends beyond the border continues at the opposite border.
- A row depends only on its own sample: batches never mix samples, so a sample that fails does not change others.
- If a patch has no caption (too little detail, or an empty answer), its row holds the global prompt, and `status` says
  so.
- If there is a CLIP model, every caption is checked. A caption that fits its patch clearly worse than a neighbour's
  caption does is replaced by that one, with status `replaced`. The global prompt never replaces a caption: it names
  objects of other patches, which would then be drawn again.
- A caption has at most as many tokens as the base model reads (75 for CLIP). `truncated` says whether it was cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from resmaster_stages.config.dataset import CaptionsConfig, DatasetConfig
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.diffusion.views import Grid, patch_grid, target_size
from resmaster_stages.errors import SampleError
from resmaster_stages.keys import digest
from resmaster_stages.metrics.caption_fit import Embedder, best_captions, neighbours
from resmaster_stages.metrics.clip_score import load_clip
from resmaster_stages.metrics.luminance import luminance
from resmaster_stages.models.bases.base import TokenCounter
from resmaster_stages.models.captioner import (
    Captioner,
    clean_caption,
    content_tokens,
    load_captioner,
    shorten,
    style_suffix,
    token_counter,
)
from resmaster_stages.models.geometry import geometry_of


def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    """Yield one Output per sample, in order. Its rows are rows of the captions table, without the key.

    Raises ConfigError if the captioner, the tokenizer or the CLIP model cannot be loaded. An error of one sample
    becomes its Output's error.
    """
    writer = load_writer(config)
    geometry, scale = geometry_of(config.model), config.upscale.way()[0].scale
    for sample in samples:
        try:
            if sample.low_res is None:
                raise SampleError(f"{sample.key}: no low-res image to caption")
            image = sample.low_res.open()
            grid = patch_grid(config, geometry, *target_size(image.height, image.width, scale))
            yield Output(key=sample.key, rows=caption_rows(image, sample.prompt, grid, writer))
        except SampleError as error:
            yield Output(key=sample.key, error=error)


@dataclass(frozen=True)
class Writer:
    """The models and settings that write captions; the same for all samples of a dataset."""

    config: CaptionsConfig
    captioner: Captioner | None
    """None: every row holds the global prompt (status `fallback`)."""
    count: TokenCounter
    limit: int
    """The most tokens of a caption."""
    suffix: str = ""
    """The style, appended to every caption; made by `style_suffix`."""
    clip: Embedder | None = None
    """The model that checks captions. None: captions are not checked."""


def load_writer(config: DatasetConfig) -> Writer:
    """The captioner, tokenizer and CLIP model of `config`; each is loaded once per process. Raises ConfigError."""
    count = token_counter(config.model)
    suffix = style_suffix(config.captions.style, count)
    judge = config.caption_clip()
    return Writer(
        config=config.captions,
        captioner=load_captioner(config.captions, config.model.device),
        count=count,
        limit=content_tokens(config.model),
        suffix=suffix,
        clip=load_clip(*judge, config.quality.device) if judge else None,
    )


def caption_rows(image: Image.Image, prompt: str, grid: Grid, writer: Writer) -> list[dict[str, Any]]:
    """The rows of the captions table for one image, without the key."""
    captioner = writer.captioner
    crops = patches(image, grid) if captioner else []
    answers = _answers(crops, captioner, writer.config) if captioner else {}
    captions = {view: text for view, answer in answers.items() if (text := clean_caption(answer))}
    chosen = {}
    if writer.clip is not None:
        around = neighbours(len(grid.rows), len(grid.cols))
        chosen = best_captions(writer.clip, crops, captions, around, writer.config.check.margin)
    prompt_hash = digest({"instruction": writer.config.instruction if captioner else "", "prompt": prompt})[:16]
    rows = []
    for number, (y0, x0, y1, x1) in enumerate(grid.pixel_boxes):
        row, col = divmod(number, len(grid.cols))
        choice = chosen.get(number)
        view = choice.view if choice else number
        if number in captions:
            status = "ok" if view == number else "replaced"
            caption, tokens, truncated = shorten(captions[view], writer.count, writer.limit, writer.suffix)
        else:
            status = "empty" if number in answers else "fallback"
            caption, tokens, truncated = shorten(prompt, writer.count, writer.limit)
        rows.append(
            {
                "grid": grid.name,
                "row": row,
                "col": col,
                "y0": y0,
                "x0": x0,
                "y1": y1,
                "x1": x1,
                "caption": caption,
                "n_tokens": tokens,
                "truncated": truncated,
                "model": captioner.name if captioner else "",
                "revision": captioner.revision if captioner else "",
                "status": status,
                "prompt_hash": prompt_hash,
                "fit": choice.fit if choice else None,
            }
        )
    return rows


def _answers(crops: Sequence[Image.Image], captioner: Captioner, config: CaptionsConfig) -> dict[int, str]:
    """Number of the crop -> the captioner's raw answer. Crops with less than `min_detail` are not captioned."""
    asked = [
        number
        for number, crop in enumerate(crops)
        if config.min_detail == 0 or float(luminance(crop).std()) >= config.min_detail
    ]
    answers: dict[int, str] = {}
    for batch in even_batches(asked, config.batch_size):
        texts = captioner.caption([crops[number] for number in batch])
        if len(texts) != len(batch):
            raise SampleError(f"captioner {captioner.name!r} gave {len(texts)} captions for {len(batch)} patches")
        answers.update(zip(batch, texts))
    return answers


def patches(image: Image.Image, grid: Grid) -> list[Image.Image]:
    """The crops of the reference B^L at the boxes of `grid`, row-major."""
    from resmaster_stages.diffusion.reference import continued, to_image, upsample

    pixels = upsample(image, *grid.size_px, grid.wraps)[0]
    reference = to_image(continued(pixels, grid.pixel_boxes))
    return [reference.crop((x0, y0, x1, y1)) for y0, x0, y1, x1 in grid.pixel_boxes]


def even_batches(items: Sequence[int], size: int) -> list[list[int]]:
    """Split `items` into the fewest batches of at most `size`. The lengths differ by at most one."""
    if not items:
        return []
    return [part.tolist() for part in np.array_split(np.asarray(items), -(-len(items) // size))]
