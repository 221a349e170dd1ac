"""Cuts an image per method for docs/methods.md from the sheet of a comparison (see that page).

python docs/method_images.py out/strip/picturebook-compare/sheet-4x4.png

The sheet shows all methods, or what is named after it, in this order.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from resmaster_stages.config.method import methods
from resmaster_stages.evaluation.page import CELL_PX, GAP_PX, HEAD_LINES, TEXT_PX

FOLDER = Path(__file__).parent / "images" / "methods"
SHOWN_PX = 176


def strip(sheet: Image.Image, column: int) -> Image.Image:
    """The low-res image and a method's image whole, then a detail of each, from the first sample of a sheet.

    column: the method's number on the sheet, from 1.
    """
    top = GAP_PX + (HEAD_LINES + 1) * TEXT_PX
    page = Image.new("RGB", (4 * SHOWN_PX + 3 * GAP_PX, SHOWN_PX), "white")
    for place, (row, col) in enumerate(((0, 0), (0, column), (1, 0), (1, column))):
        left, upper = GAP_PX + col * (CELL_PX + GAP_PX), top + row * (CELL_PX + GAP_PX)
        cell = sheet.crop((left, upper, left + CELL_PX, upper + CELL_PX))
        cell = cell.resize((SHOWN_PX, SHOWN_PX), Image.Resampling.LANCZOS)
        page.paste(cell, (place * (SHOWN_PX + GAP_PX), 0))
    return page


def write(sheet: Image.Image, names: Sequence[str], folder: Path) -> list[Path]:
    """Writes an image per method. Raises SystemExit if the sheet has another number of columns."""
    if sheet.width != GAP_PX + (len(names) + 1) * (CELL_PX + GAP_PX):
        raise SystemExit(f"the sheet is {sheet.width} px wide; it must show {len(names)} methods: {', '.join(names)}")
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{name}.jpg" for name in names]
    for column, path in enumerate(written, start=1):
        strip(sheet, column).save(path, quality=85, optimize=True)
    return written


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for path in write(Image.open(sys.argv[1]).convert("RGB"), sys.argv[2:] or list(methods()), FOLDER):
        print(f"wrote {path}")
