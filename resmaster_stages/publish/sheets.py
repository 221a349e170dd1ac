"""Contact sheets: the report's images on a few large ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from resmaster_stages.errors import SampleError
from resmaster_stages.publish.page import ReportSample, _decode


def contact_sheet(
    samples: Iterable[ReportSample], *, columns: int = 4, cell_px: int = 224, title: str = ""
) -> Image.Image:
    """Pairs (low-res, high-res) with their prompts, `columns` pairs per row; each picture fits `cell_px` x `cell_px`."""
    samples = list(samples)
    gap, label = 12, 40
    rows = max(1, -(-len(samples) // columns))
    pair_width = 2 * cell_px + 4
    head = 44 if title else gap
    size = (gap + columns * (pair_width + gap), head + rows * (cell_px + label + gap))
    sheet = Image.new("RGB", size, (246, 245, 241))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    if title:
        draw.text(
            (gap, 12),
            _fit(title, ImageFont.load_default(20), size[0] - 2 * gap),
            (34, 36, 31),
            ImageFont.load_default(20),
        )
    for number, sample in enumerate(samples):
        x = gap + number % columns * (pair_width + gap)
        y = head + number // columns * (cell_px + label + gap)
        try:
            pictures = [_decode(sample.low_res, sample.key), _decode(sample.high_res, sample.key)]
        except SampleError:
            draw.rectangle((x, y, x + pair_width, y + cell_px), fill=(223, 221, 211))
            pictures = []
        for place, picture in enumerate(pictures):
            scale = min(cell_px / picture.width, cell_px / picture.height)
            shape = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            resample = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
            left = x + place * (cell_px + 4) + (cell_px - shape[0]) // 2
            sheet.paste(picture.resize(shape, resample), (left, y + (cell_px - shape[1]) // 2))
        flags = ", ".join(str(flag) for flag in sample.quality.get("flags") or ())
        draw.text((x, y + cell_px + 3), _fit(sample.prompt or "no prompt", font, pair_width), (34, 36, 31), font)
        second = f"{sample.key[:12]}  {flags}"
        draw.text(
            (x, y + cell_px + 20), _fit(second, font, pair_width), (154, 74, 18) if flags else (109, 111, 102), font
        )
    return sheet


def contact_sheets(samples: Iterable[ReportSample], per_sheet: int = 24, title: str = "") -> Iterator[Image.Image]:
    """Contact sheets of `per_sheet` samples each, in order; samples are taken as they are needed."""
    batch: list[ReportSample] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == per_sheet:
            yield contact_sheet(batch, title=title)
            batch = []
    if batch:
        yield contact_sheet(batch, title=title)


def _fit(text: str, font: Any, width: int) -> str:
    """The beginning of `text`, in one line, that is at most `width` px wide."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle] + "...") <= width else (low, middle - 1)
    return text[:low].rstrip() + "..."
