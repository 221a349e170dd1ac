"""Stage 3: writes a caption for each patch of the target canvas (ResMaster's enhanced text prompts), one row per patch.

A patch is a crop of the reference B^L, which is the low-res image enlarged bicubically to the target size. So the
captioner sees exactly the part of the image that the upscaler will redraw. Without a captioner, the base model's
attention says which words of the prompt are a patch's caption (`diffusion.attended_words`). This module does not access
storage.

Invariants:
- Boxes are half-open, in target px, in the order y0, x0, y1, x1. Rows are in row-major order of the grid. Where the
  image wraps, a box that ends beyond the border continues at the opposite border.
- A row depends only on its own sample: batches never mix samples, so a sample that fails does not change others.
- If a patch has no caption (too little detail, an empty answer, or no word), its row holds the global prompt, and
  `status` says so.
- If there is a CLIP model, every caption of a captioner is checked. A caption that fits its patch clearly worse than a
  neighbour's caption does is replaced by that one, with status `replaced`. The global prompt never replaces a caption:
  it names objects of other patches, which would then be drawn again.
- A caption has at most as many tokens as the base model reads (75 for CLIP). `truncated` says whether it was cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    needs,
    shorten,
    style_suffix,
    token_counter,
)
from resmaster_stages.models.geometry import geometry_of

if TYPE_CHECKING:
    from resmaster_stages.models.parts import Models


def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    """Yield one Output per sample, in order. Its rows are rows of the captions table, without the key.

    Raises ConfigError if the captioner, the tokenizer, the CLIP model or the base model cannot be loaded. An error of
    one sample becomes its Output's error.
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
    """None: `models` chooses words, or every row holds the global prompt (status `fallback`)."""
    count: TokenCounter
    limit: int
    """The most tokens of a caption."""
    suffix: str = ""
    """The style, appended to every caption; made by `style_suffix`."""
    clip: Embedder | None = None
    """The model that checks captions. None: captions are not checked."""
    models: Models | None = None
    """The base model, if its attention chooses words."""

    @property
    def name(self) -> tuple[str, str]:
        """The model that captions are from and its revision; two empty texts if there is none."""
        if self.captioner is not None:
            return self.captioner.name, self.captioner.revision
        name, _, revision = self.models.identity.partition("@") if self.models else ("", "", "")
        return name, revision


def load_writer(config: DatasetConfig) -> Writer:
    """The captioner, tokenizer, CLIP model or base model of `config`; each is loaded once per process. Raises
    ConfigError."""
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
        models=_load_models(config) if config.captions.source == "attention" else None,
    )


def _load_models(config: DatasetConfig) -> Models:
    from resmaster_stages.models.bases import require
    from resmaster_stages.models.load import load_models

    models = load_models(config.model.base)
    require(models.base.family, models.identity, needs(config.captions))
    return models


def caption_rows(image: Image.Image, prompt: str, grid: Grid, writer: Writer) -> list[dict[str, Any]]:
    """The rows of the captions table for one image, without the key."""
    captioner = writer.captioner
    crops = patches(image, grid) if captioner or writer.models else []
    asked = _with_detail(crops, writer.config)
    if writer.models is not None:
        answers = _words(image, prompt, grid, writer.models, writer.config)
        captions = {view: answers[view] for view in asked if answers[view]}
    else:
        answers = _answers(crops, asked, captioner, writer.config) if captioner else {}
        captions = {view: text for view, answer in answers.items() if (text := clean_caption(answer))}
    name, revision = writer.name
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
            status = "empty" if number in asked else "fallback"
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
                "model": name,
                "revision": revision,
                "status": status,
                "prompt_hash": prompt_hash,
                "fit": choice.fit if choice else None,
            }
        )
    return rows


def _with_detail(crops: Sequence[Image.Image], config: CaptionsConfig) -> list[int]:
    """The numbers of the crops that get a caption: those without less than `min_detail`."""
    return [
        number
        for number, crop in enumerate(crops)
        if config.min_detail == 0 or float(luminance(crop).std()) >= config.min_detail
    ]


def _words(image: Image.Image, prompt: str, grid: Grid, models: Models, config: CaptionsConfig) -> dict[int, str]:
    """Number of the patch -> the words of the prompt that the image attends to there; "" if none."""
    from resmaster_stages.diffusion.attended_words import attention_maps, texts_of, words_of
    from resmaster_stages.models.busy import busy
    from resmaster_stages.models.faults import device_faults

    words = words_of(prompt, models.base.count, models.base.tokens)
    if not words:
        return dict.fromkeys(range(len(grid)), "")
    with busy(), device_faults("set model.offload: model", 1):
        maps = attention_maps(models, image, prompt, config.noise_levels)
    return dict(enumerate(texts_of(prompt, words, maps, grid, config.coverage)))


def _answers(
    crops: Sequence[Image.Image], asked: Sequence[int], captioner: Captioner, config: CaptionsConfig
) -> dict[int, str]:
    """Number of the crop -> the captioner's raw answer, for the crops whose numbers are `asked`."""
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
