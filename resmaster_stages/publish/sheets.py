"""Draws contact sheets: large images with many of the report's samples as pairs of small images. Pure functions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from PIL import Image, ImageDraw, ImageFont

from resmaster_stages.errors import SampleError
from resmaster_stages.publish.page import ReportSample
from resmaster_stages.redaction import printable

PAPER, HOLE = (246, 245, 241), (223, 221, 211)
INK, SOFT, WARNING = (34, 36, 31), (109, 111, 102), (154, 74, 18)
"""The colours of `templates/page.css`."""
COLUMNS, ROWS = 4, 6
"""Pairs of images on a sheet."""
CELL_PX = 224
"""Each image fits a square of this size."""
GAP_PX = 12
PAIR_GAP_PX = 4
HEAD_PX = 44
LABEL_PX = 40
TEXT_PX, TITLE_PX = 14, 20

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheets(samples: Iterable[ReportSample], title: str) -> Iterator[Image.Image]:
    """Yield contact sheets of the samples, in order. Samples are taken as they are needed."""
    rest = iter(samples)
    while batch := list(islice(rest, COLUMNS * ROWS)):
        yield contact_sheet(batch, title)


def contact_sheet(samples: Sequence[ReportSample], title: str) -> Image.Image:
    """One sheet: the title, and below it pairs (low-res, high-res) with their prompts, `COLUMNS` pairs per row."""
    rows = -(-len(samples) // COLUMNS)
    width = 2 * CELL_PX + PAIR_GAP_PX + GAP_PX
    height = CELL_PX + LABEL_PX + GAP_PX
    sheet = Image.new("RGB", (GAP_PX + COLUMNS * width, HEAD_PX + rows * height), PAPER)
    font = ImageFont.load_default(TITLE_PX)
    ImageDraw.Draw(sheet).text((GAP_PX, GAP_PX), _fit(title, font, sheet.width - 2 * GAP_PX), INK, font)
    font = ImageFont.load_default(TEXT_PX)
    for number, sample in enumerate(samples):
        row, column = divmod(number, COLUMNS)
        _draw_sample(sheet, (GAP_PX + column * width, HEAD_PX + row * height), sample, font)
    return sheet


def _draw_sample(sheet: Image.Image, corner: tuple[int, int], sample: ReportSample, font: Font) -> None:
    """Draw one pair with two lines of text under it. `corner`: (x, y) of its upper left, in px of `sheet`."""
    pen, (x, y), width = ImageDraw.Draw(sheet), corner, 2 * CELL_PX + PAIR_GAP_PX
    try:
        images = sample.decoded()
    except SampleError:
        pen.rectangle((x, y, x + width, y + CELL_PX), fill=HOLE)
    else:
        for place, image in enumerate(images):
            scale = min(CELL_PX / image.width, CELL_PX / image.height)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            resample = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
            left = x + place * (CELL_PX + PAIR_GAP_PX) + (CELL_PX - size[0]) // 2
            sheet.paste(image.resize(size, resample), (left, y + (CELL_PX - size[1]) // 2))
    pen.text((x, y + CELL_PX + 3), _fit(sample.prompt or "no prompt", font, width), INK, font)
    facts = f"{sample.key[:12]}  {', '.join(sample.flags)}"
    pen.text((x, y + CELL_PX + 20), _fit(facts, font, width), WARNING if sample.flags else SOFT, font)


def _fit(text: str, font: Font, width: int) -> str:
    """`text` in one line, cut to at most `width` px."""
    text = printable(" ".join(text.split()))
    if font.getlength(text) <= width:
        return text
    lengths = range(1, len(text) + 1)
    count = bisect_right(lengths, float(width), key=lambda length: float(font.getlength(text[:length] + "...")))
    return text[:count].rstrip() + "..."
