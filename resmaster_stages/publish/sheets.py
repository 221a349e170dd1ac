"""Contact sheets: the report's samples as pairs of small images, many on one large image. Pure functions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont

from resmaster_stages.errors import SampleError
from resmaster_stages.publish.page import ReportSample

PAPER, HOLE = (246, 245, 241), (223, 221, 211)
INK, SOFT, WARNING = (34, 36, 31), (109, 111, 102), (154, 74, 18)
"""The colours of `templates/page.css`."""
GAP_PX = 12
PAIR_GAP_PX = 4
HEAD_PX = 44
LABEL_PX = 40
TEXT_PX, TITLE_PX = 14, 20

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


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


def contact_sheet(
    samples: Sequence[ReportSample], *, columns: int = 4, cell_px: int = 224, title: str = ""
) -> Image.Image:
    """Pairs (low-res, high-res) with their prompts, `columns` pairs per row; each image fits `cell_px` x `cell_px`."""
    rows = max(1, -(-len(samples) // columns))
    width = 2 * cell_px + PAIR_GAP_PX + GAP_PX
    height = cell_px + LABEL_PX + GAP_PX
    head = HEAD_PX if title else GAP_PX
    sheet = Image.new("RGB", (GAP_PX + columns * width, head + rows * height), PAPER)
    if title:
        font = ImageFont.load_default(TITLE_PX)
        ImageDraw.Draw(sheet).text((GAP_PX, GAP_PX), _fit(title, font, sheet.width - 2 * GAP_PX), INK, font)
    font = ImageFont.load_default(TEXT_PX)
    for number, sample in enumerate(samples):
        row, column = divmod(number, columns)
        _draw_sample(sheet, (GAP_PX + column * width, head + row * height), sample, cell_px, font)
    return sheet


def _draw_sample(sheet: Image.Image, corner: tuple[int, int], sample: ReportSample, cell_px: int, font: Font) -> None:
    """Draw one pair with two lines of text under it. `corner`: (x, y) of its upper left, in px of `sheet`."""
    pen, (x, y), width = ImageDraw.Draw(sheet), corner, 2 * cell_px + PAIR_GAP_PX
    try:
        images = sample.decoded()
    except SampleError:
        pen.rectangle((x, y, x + width, y + cell_px), fill=HOLE)
    else:
        for place, image in enumerate(images):
            scale = min(cell_px / image.width, cell_px / image.height)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            resample = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
            left = x + place * (cell_px + PAIR_GAP_PX) + (cell_px - size[0]) // 2
            sheet.paste(image.resize(size, resample), (left, y + (cell_px - size[1]) // 2))
    pen.text((x, y + cell_px + 3), _fit(sample.prompt or "no prompt", font, width), INK, font)
    facts = f"{sample.key[:12]}  {', '.join(sample.flags)}"
    pen.text((x, y + cell_px + 20), _fit(facts, font, width), WARNING if sample.flags else SOFT, font)


def _fit(text: str, font: Font, width: int) -> str:
    """The beginning of `text`, in one line, that is at most `width` px wide."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    lengths = range(1, len(text) + 1)
    count = bisect_right(lengths, float(width), key=lambda length: float(font.getlength(text[:length] + "...")))
    return text[:count].rstrip() + "..."
