"""Draws a comparison as a chart, an SVG: the quality of each method against the rows that its images take.

There is a panel for whole images (FID r), one for crops (FID c) and one for both together, because a method can buy
detail with a changed image, or keep the image and add nothing. All axes are logarithmic. Methods that no other method
beats in both quality and rows are joined by a line. The input is rows of the comparison's table. This module does not
read datasets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor, log10, prod
from typing import Any
from xml.sax.saxutils import escape

WIDTH_PX, PANEL_PX, HEAD_PX = 920, 340, 26
"""Width of the chart, height of a panel with what is below it, and height of the title."""
LEFT_PX, TOP_PX, BOTTOM_PX, GAP_PX = 44, 36, 44, 64
"""What is left of, above, below and right of a panel."""
TEXT_PX, LETTER_PX = 11, 6.1
"""Size of text, and about the width of a letter."""
LONGEST_LABEL = 34
NONE = 0.5
"""Where methods without rows stand on the axis of rows, in units of the fewest rows of the others."""
UNIT = "rows per image (native-size views, guidance included)"
LEAST = 0.01
"""The smallest value that is drawn. Distances of equal sets are 0, which no logarithmic axis has."""
BEST, OTHER, INK, FAINT = "#b3261e", "#1d5fa8", "#333333", "#d9d9d9"

BOTH = "both"
PANELS = {BOTH: "geometric mean of FID r and FID c", "fid_r": "whole images: FID r", "fid_c": "crops: FID c"}
"""Column of the table, or `BOTH` -> title of its panel. Smaller values are better."""


Box = tuple[float, float, float, float]
"""Left, upper, right and lower border of a name, in px."""


@dataclass(frozen=True)
class Point:
    """One method in a panel."""

    label: str
    rows: float
    """Evaluations per image in native-size views."""
    value: float


def value_of(row: Mapping[str, Any], column: str) -> float | None:
    """What a row of the table has in a panel, at least `LEAST`. None if nothing."""
    found = [row.get(name) for name in (("fid_r", "fid_c") if column == BOTH else (column,))]
    values = [max(LEAST, float(value)) for value in found if value is not None]
    return float(prod(values) ** (1 / len(values))) if len(values) == len(found) else None


def points(rows: Iterable[Mapping[str, Any]], column: str) -> list[Point]:
    """The methods that have a value in a panel. Methods without base model have 0 rows."""
    values = [(row, value_of(row, column)) for row in rows if row.get("dataset")]
    return [
        Point(_short(str(row["method"])), row.get("unet_native_rows") or 0.0, value)
        for row, value in values
        if value is not None
    ]


def _short(method: str) -> str:
    return method if len(method) <= LONGEST_LABEL else method[: LONGEST_LABEL - 3] + "..."


def front(found: Sequence[Point]) -> list[Point]:
    """The points that no other point beats or equals in both value and rows, by rows."""
    best: list[Point] = []
    for point in sorted(found, key=lambda each: (each.rows, each.value)):
        if not best or point.value < best[-1].value:
            best.append(point)
    return best


def chart(title: str, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The chart of one scale. None if no method has a distance."""
    panels = {column: found for column in PANELS if (found := points(rows, column))}
    if not panels:
        return None
    height = HEAD_PX + len(panels) * (TOP_PX + PANEL_PX)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH_PX} {height}" width="{WIDTH_PX}" '
        f'height="{height}" font-family="sans-serif" font-size="{TEXT_PX}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH_PX}" height="{height}" fill="white"/>',
        _text(LEFT_PX, 16, title, INK, size=14),
    ]
    for (column, found), place in zip(panels.items(), _places(len(panels))):
        real = next((value_of(row, column) for row in rows if not row.get("dataset")), None)
        axes = Axes.around(found, real, place)
        parts += [*_frame(axes, PANELS[column]), *_real(axes, real), *_marks(axes, found)]
    return "\n".join([*parts, "</svg>", ""])


@dataclass(frozen=True)
class Place:
    """The place of one panel in px."""

    left: float
    top: float
    right: float
    bottom: float


def _places(count: int) -> list[Place]:
    """Panels of one size, one below the other."""
    step = TOP_PX + PANEL_PX
    return [
        Place(LEFT_PX, top, WIDTH_PX - GAP_PX, top + PANEL_PX - BOTTOM_PX)
        for top in (TOP_PX + HEAD_PX + number * step for number in range(count))
    ]


@dataclass(frozen=True)
class Axes:
    """A panel, and what its borders stand for."""

    place: Place
    rows: tuple[float, float]
    values: tuple[float, float]
    without: float | None
    """Where methods without rows stand. None: there are none."""

    @classmethod
    def around(cls, found: Sequence[Point], real: float | None, place: Place) -> Axes:
        """The axes that hold all points."""
        some = [point.rows for point in found if point.rows > 0] or [1.0]
        values = [*(point.value for point in found), *(() if real is None else (real,))]
        without = min(some) * NONE if any(point.rows == 0 for point in found) else None
        low = min(some) * 0.8 if without is None else without * 0.8
        return cls(place, (low, max(some) * 1.6), (min(values) * 0.85, max(values) * 1.15), without)

    def x(self, rows: float) -> float:
        """Rows in px from the left border of the chart."""
        rows = rows or self.without or self.rows[0]
        return self.place.left + (self.place.right - self.place.left) * _share(rows, self.rows)

    def y(self, value: float) -> float:
        """A value in px from the upper border of the chart."""
        return self.place.bottom - (self.place.bottom - self.place.top) * _share(value, self.values)


def _share(value: float, ends: tuple[float, float]) -> float:
    """How far a value lies between two others, by its logarithm."""
    return log10(value / ends[0]) / log10(ends[1] / ends[0])


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two numbers."""
    every = [step * 10.0**power for power in range(floor(log10(low)), floor(log10(high)) + 1) for step in (1, 2, 5)]
    return [tick for tick in every if low <= tick <= high]


def _frame(axes: Axes, title: str) -> Iterator[str]:
    """Axes, ticks and titles of a panel."""
    place = axes.place
    yield _text(place.left, place.top - 10, f"{title} (lower is better)", INK)
    for tick in ticks(*axes.rows):
        if axes.without is None or tick > axes.without * 1.3:
            yield _line(axes.x(tick), place.top, axes.x(tick), place.bottom, FAINT)
            yield _text(axes.x(tick), place.bottom + 15, f"{tick:,.6g}", INK, "middle")
    if axes.without is not None:
        yield _text(axes.x(0), place.bottom + 15, "none", INK, "middle")
    for tick in ticks(*axes.values):
        yield _line(place.left, axes.y(tick), place.right, axes.y(tick), FAINT)
        yield _text(place.left - 6, axes.y(tick) + 4, f"{tick:g}", INK, "end")
    yield _line(place.left, place.bottom, place.right, place.bottom, INK)
    yield _line(place.left, place.top, place.left, place.bottom, INK)
    yield _text((place.left + place.right) / 2, place.bottom + 32, UNIT, INK, "middle")


def _real(axes: Axes, real: float | None) -> Iterator[str]:
    """The line of real images."""
    if real is not None:
        yield _line(axes.place.left, axes.y(real), axes.place.right, axes.y(real), INK, dashes="4 3")
        yield _text(axes.place.right, axes.y(real) - 4, "real images", INK, "end")


def _marks(axes: Axes, found: Sequence[Point]) -> Iterator[str]:
    """The points with their names, and the line through those that no other beats."""
    best = front(found)
    places = " ".join(f"{axes.x(point.rows):.1f},{axes.y(point.value):.1f}" for point in best)
    yield f'<polyline points="{places}" fill="none" stroke="{BEST}" stroke-opacity="0.5"/>'
    taken: list[Box] = [
        (axes.x(point.rows) - 4, axes.y(point.value) - 4, axes.x(point.rows) + 4, axes.y(point.value) + 4)
        for point in found
    ]
    for point in sorted(found, key=lambda each: each not in best):  # the best have the first choice of places
        x, y, colour = axes.x(point.rows), axes.y(point.value), BEST if point in best else OTHER
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{escape(point.label)}</title></circle>'
        box = _free(point.label, x, y, taken, axes)
        taken.append(box)
        middle = (box[1] + box[3]) / 2
        if abs(middle - y) > TEXT_PX:  # too far to be seen as the point's
            yield _line(x, y, min(max(x, box[0]), box[2]), box[3] if middle < y else box[1], colour, width=0.6)
        yield _text(box[0], box[3] - 2, point.label, colour)


def _free(label: str, x: float, y: float, taken: Sequence[Box], axes: Axes) -> Box:
    """Where a point's name covers nothing: right or left of the point, or else higher or lower."""
    place, width = axes.place, len(label) * LETTER_PX
    boxes = [
        (left, y + shift - TEXT_PX * 0.6, left + width, y + shift + TEXT_PX * 0.6)
        for shift in (0.0, *(sign * step * TEXT_PX * 0.5 for step in range(1, 16) for sign in (-1, 1)))
        for left in (x + 7, x - 7 - width, x - width / 2)
        if left != x - width / 2 or abs(shift) >= TEXT_PX
    ]
    inside = [
        box
        for box in boxes
        if place.left <= box[0] and box[2] < place.right + GAP_PX - 8 and place.top <= box[1] and box[3] < place.bottom
    ]
    return next((box for box in inside if not any(_overlap(box, other) for other in taken)), boxes[0])


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _text(x: float, y: float, text: str, colour: str, anchor: str = "start", size: int = TEXT_PX) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
    )


def _line(x0: float, y0: float, x1: float, y1: float, colour: str, dashes: str = "", width: float = 1) -> str:
    style = f' stroke-width="{width}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{colour}"{style}/>'
