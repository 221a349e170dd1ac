"""Renders a comparison: a Markdown page, and sheets of images side by side with zoomed crops.

The input is rows and images. This module does not read datasets.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from resmaster_stages.evaluation.columns import measures
from resmaster_stages.metrics.detail import most_detailed
from resmaster_stages.metrics.metric import Column
from resmaster_stages.redaction import printable

CELL_PX = 256
GAP_PX = 8
TEXT_PX = 18
HEAD_LINES = 2


def shown(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns with a label that at least one row fills."""
    return [column for column in measures() if column.label and any(row.get(column.name) is not None for row in rows)]


def cell(row: Mapping[str, Any], column: Column) -> str:
    """A value as text, for KID with half the width of its 95 % interval. A dash if there is no value."""
    value = row.get(column.name)
    if value is None:
        return "–"
    low, high = row.get(f"{column.name}_low"), row.get(f"{column.name}_high")
    margin = f" ± {column.form.format((high - low) / 2)}" if low is not None and high is not None else ""
    return column.form.format(value) + margin


def markdown(
    title: str, rows: Sequence[Mapping[str, Any]], sheets: Mapping[str, str], charts: Mapping[str, str] | None = None
) -> str:
    """The comparison as a page with one table per scale. sheets, charts: scale -> file name of its sheet or chart."""
    lines = [f"# {title}", ""]
    for scale in dict.fromkeys(row["scale"] for row in rows):
        group = [row for row in rows if row["scale"] == scale]
        columns, first = shown(group), group[0]
        lines += [
            f"## {scale}: {first['width']} x {first['height']} px",
            "",
            f"{first['samples']} samples per method, the same for all; features: {first['features']}; "
            f"reference: {first['reference']} ({first['reference_samples']} samples).",
            "",
            "| " + " | ".join(["method", *(column.heading for column in columns)]) + " |",
            "|---|" + "---:|" * len(columns),
        ]
        lines += [
            "| " + " | ".join([row["method"], *(cell(row, column) for column in columns)]) + " |" for row in group
        ]
        lines += ["", f"![quality against rows]({charts[scale]})"] if charts and scale in charts else []
        lines += ["", f"![the same samples by every method]({sheets[scale]})", ""] if scale in sheets else [""]
    lines += [
        *(f"- {column.heading}: {column.meaning}" for column in shown(rows)),
        "",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class SheetRow:
    """One sample on a sheet: its prompt, its low-res image and the image of each method."""

    prompt: str
    low_res: Image.Image
    images: Mapping[str, Image.Image]


def sheet(rows: Sequence[SheetRow], methods: Sequence[str]) -> Image.Image:
    """The sheet: for each sample, a row of whole images and a row of the same crop of each image.

    The low-res image and the images of all methods are side by side. The crop is the place where the last method's
    image has most detail.
    """
    columns = ["low-res", *methods]
    font = ImageFont.load_default(size=14)
    ratio = rows[0].low_res.height / rows[0].low_res.width
    width, height = (CELL_PX, round(CELL_PX * ratio)) if ratio <= 1 else (round(CELL_PX / ratio), CELL_PX)
    per_sample, head = TEXT_PX + height + GAP_PX + width + GAP_PX, GAP_PX + HEAD_LINES * TEXT_PX
    page = Image.new("RGB", (GAP_PX + len(columns) * (width + GAP_PX), head + len(rows) * per_sample), "white")
    pen = ImageDraw.Draw(page)
    for place, name in enumerate(columns):
        title = "\n".join(textwrap.wrap(name.replace(":", " "), width // 8)[:HEAD_LINES])
        pen.text((GAP_PX + place * (width + GAP_PX), GAP_PX), title, fill="black", font=font)
    for number, row in enumerate(rows):
        top = head + number * per_sample
        pen.text((GAP_PX, top), printable(row.prompt)[: page.width // 8], fill="#666666", font=font)
        box = _zoomed(row.images[methods[-1]])
        for place, image in enumerate([row.low_res, *(row.images[name] for name in methods)]):
            left = GAP_PX + place * (width + GAP_PX)
            page.paste(image.resize((width, height), Image.Resampling.LANCZOS), (left, top + TEXT_PX))
            y0, x0, y1, x1 = box
            crop = (x0 * image.width, y0 * image.height, x1 * image.width, y1 * image.height)
            zoomed = image.resize((width, width), Image.Resampling.BICUBIC, box=crop)
            page.paste(zoomed, (left, top + TEXT_PX + height + GAP_PX))
    return page


def _zoomed(image: Image.Image) -> tuple[float, float, float, float]:
    """The most detailed square of a quarter of the shorter side, as fractions (y0, x0, y1, x1) of the image."""
    y0, x0, y1, x1 = most_detailed(image)
    return y0 / image.height, x0 / image.width, y1 / image.height, x1 / image.width
