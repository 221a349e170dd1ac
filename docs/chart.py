"""Draws docs/images/quality-and-rows.svg from the table of all methods in docs/evaluation-results.md.

python docs/chart.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from resmaster_stages.evaluation.chart import chart
from resmaster_stages.evaluation.compare import REAL

PAGE = Path(__file__).parent / "evaluation-results.md"
CHART = Path(__file__).parent / "images" / "quality-and-rows.svg"
TITLE = "Picturebook, 128 to 512 px, 64 prompts: quality and work of each method"


def table(page: str) -> list[dict[str, str]]:
    """The first table of the section "All methods": heading -> cell, for each row, as plain text."""
    section = page.partition("## All methods\n")[2]
    section = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", section.replace("**", ""))
    lines = re.findall(r"^\|(.*)\|$", section.partition("\n\n2x4")[0], flags=re.MULTILINE)
    heads, _, *rows = ([cell.strip() for cell in line.split("|")] for line in lines)
    return [dict(zip(heads, row)) for row in rows]


def _number(cell: str) -> float | None:
    return None if cell == "–" else float(cell.replace(",", ""))


def rows_of(page: str) -> list[dict[str, Any]]:
    """The rows of the page's table, as a comparison has them, without those of one changed setting."""
    return [
        {
            "method": row["method"],
            "dataset": "" if row["method"] == REAL else row["method"],
            "fid_r": _number(row["FID r ↓"]),
            "fid_c": _number(row["FID c ↓"]),
            "unet_native_rows": _number(row["rows"]),
        }
        for row in table(page)
        if "`" not in row["method"]
    ]


def drawn() -> str:
    """The chart of the page's table."""
    found = chart(TITLE, rows_of(PAGE.read_text()))
    assert found is not None, "the table has no distances"
    return found


if __name__ == "__main__":
    CHART.write_text(drawn())
    print(f"wrote {CHART}")
