"""Renders the report: one HTML file that shows each sample before and after. Pure functions.

`templates/page.html`, `page.css` and `page.js` define the look of the page, with `parts.html` and `look.css`, which the
page of `resmaster view` has too. This module gives them their values. It does not access storage: samples come as
plain data, and the result is text.

Invariants:
- The page loads nothing from outside (a content security policy forbids it) and is readable without its script.
- Everything that came from outside (prompts, captions, errors, names) is escaped.
- Equal input gives equal output: no time, host or random name is in the page.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resmaster_stages.dataset.sample import DESCRIBED
from resmaster_stages.errors import SampleError
from resmaster_stages.metrics import filled_columns, shown_columns
from resmaster_stages.metrics.detail import Box, most_detailed
from resmaster_stages.metrics.flags import badness
from resmaster_stages.publish.template import fill, verbatim
from resmaster_stages.storage.images import decode_image

BUDGET_BYTES = 38_000_000
"""Maximum size of all images in a page. Browsers open a file of this size at once, and mail programs accept it."""
SIDES_PX = (1024, 768, 512, 384, 256, 192, 128)
"""Sizes (longer side) to which an image may be scaled down to fit the budget."""

CAPTION_NOTES = {
    "replaced": "a neighbour's caption",
    "fallback": "global prompt",
    "empty": "no answer: global prompt",
}
"""Status of a caption -> note on the page; captions with status ok have no note."""


@dataclass(frozen=True)
class ReportSample:
    """One sample as the report shows it."""

    key: str
    prompt: str
    low_res: bytes | Image.Image
    """The low-res image, as a file's content or decoded."""
    high_res: bytes | Image.Image
    """The high-res image, as a file's content or decoded."""
    captions: Sequence[Mapping[str, Any]] = ()
    """Rows of the captions table in grid order; may be empty."""
    quality: Mapping[str, Any] = field(default_factory=dict)
    """The row of the quality table; may be empty."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Further facts to show, such as the seed."""
    command: str = ""
    """A command that explains the sample; "" for none."""

    @property
    def flags(self) -> list[str]:
        """The names of the sample's flags."""
        return [str(flag) for flag in self.quality.get("flags") or ()]

    def decoded(self) -> tuple[Image.Image, Image.Image]:
        """(low-res, high-res) as RGB images. Raises SampleError if one cannot be decoded."""
        low, high = (
            each.convert("RGB") if isinstance(each, Image.Image) else decode_image(each, self.key)
            for each in (self.low_res, self.high_res)
        )
        return low, high


def choose(bad: Sequence[float] | NDArray[np.float64], limit: int = 200) -> list[int]:
    """Choose at most `limit` samples to show: all if they fit, else half the worst and half spread over the rest.

    bad: each sample's `badness`. Returns the positions of the chosen samples, in ascending order.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    values = np.asarray(bad, np.float64)
    if len(values) <= limit:
        return list(range(len(values)))
    worst = np.argsort(-values, kind="stable")[: limit // 2]
    rest = np.delete(np.arange(len(values)), worst)
    places = np.linspace(0, len(rest) - 1, limit - len(worst)).round().astype(int)
    return sorted(np.union1d(worst, rest[places]).tolist())


def render_report(
    title: str,
    facts: Mapping[str, Any],
    samples: Sequence[ReportSample],
    failures: Sequence[Mapping[str, Any]] = (),
    *,
    total: int | None = None,
    view_command: str = "",
) -> str:
    """Render the page, with the worst samples first.

    title: the dataset's name. facts: label -> value, shown in the header. failures: rows of the ledger (key, stage,
    error_class, message), each with `command` as in ReportSample. total: samples in the dataset, if only some are
    shown. view_command: a command that shows all samples; "" for none.
    """
    cards = [_card(sample, index, BUDGET_BYTES / len(samples)) for index, sample in enumerate(samples)]
    cards.sort(key=lambda card: math.inf if card["bad"] is None else -card["bad"])
    columns = filled_columns([sample.quality for sample in samples])
    script = verbatim("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return fill(
        "page.html",
        title=title,
        facts=facts,
        cards=cards,
        failures=failures,
        total=total,
        view_command=view_command,
        columns=[column for column in columns if column.label],
        flags={column.flag.name: column.flag.meaning for column in columns if column.flag},
        spelled=_spelled,
        plain=_plain,
        style=verbatim("look.css") + verbatim("page.css"),
        script=script,
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )


def _card(sample: ReportSample, index: int, share_bytes: float) -> dict[str, Any]:
    """The values of one sample for the page. `bad`: None without metrics. `reason`: why there are no `images`."""
    measured = any(sample.quality.get(column.name) is not None for column in shown_columns())
    images, reason = None, ""
    try:
        images = _images(sample, share_bytes)
    except SampleError as error:
        reason = str(error)
    return {
        "sample": sample,
        "index": index,
        "bad": badness(sample.quality) if measured else None,
        "images": images,
        "reason": reason,
        "captions": _captions(sample.captions),
    }


def _images(sample: ReportSample, share_bytes: float) -> dict[str, str]:
    """A sample's images as data URLs of about `share_bytes` in total, with their sizes and the zoomed box."""
    low, high = sample.decoded()
    box = most_detailed(high)
    before, after = zoom(low, high, box)
    # the small images get fixed parts of the sample's share, and the high-res image gets the rest
    low_zoom = data_url(before, 0.1 * share_bytes, SIDES_PX[3:])
    high_zoom = data_url(after, 0.15 * share_bytes, SIDES_PX[3:])
    low_url = data_url(low, 0.15 * share_bytes, SIDES_PX[2:])
    rest_bytes = share_bytes - len(low_url) - len(low_zoom) - len(high_zoom)
    return {
        "low": low_url,
        "high": data_url(high, rest_bytes, SIDES_PX),
        "low_zoom": low_zoom,
        "high_zoom": high_zoom,
        "low_size": f"{low.width} × {low.height}",
        "high_size": f"{high.width} × {high.height}",
        "zoom_size": f"{after.width} × {after.height}",
        "ratio": f"{high.width}/{high.height}",
        "mark": _place(box, high.height, high.width),
    }


def zoom(low: Image.Image, high: Image.Image, box: Box) -> tuple[Image.Image, Image.Image]:
    """The crops at `box` (in px of `high`) of (low-res enlarged bicubically, high-res), both at the box's size."""
    y0, x0, y1, x1 = box
    sy, sx = low.height / high.height, low.width / high.width
    before = low.resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC, box=(x0 * sx, y0 * sy, x1 * sx, y1 * sy))
    return before, high.crop((x0, y0, x1, y1))


def data_url(image: Image.Image, share_bytes: float, sides: Sequence[int]) -> str:
    """`image` as a WebP data URL of at most `share_bytes` characters, or the smallest URL if none of `sides` fits."""
    url = ""
    longer = max(image.size)
    for side in sides:
        if side >= longer and side != sides[-1] and any(longer <= other < side for other in sides):
            continue  # a smaller side also leaves the image unscaled
        scale = min(1.0, side / longer)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        shown = image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
        for quality in (92, 80):
            buffer = io.BytesIO()
            shown.save(buffer, "WEBP", quality=quality, method=4)
            url = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
            if len(url) <= share_bytes:
                return url
    return url


def _captions(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The patch captions with their places, and how many are the global prompt or a neighbour's caption."""
    height, width = captioned_size(rows)
    statuses = [str(row.get("status", "ok")) for row in rows]
    patches = []
    for row, status in zip(rows, statuses):
        notes = [] if status == "ok" else [CAPTION_NOTES.get(status, status)]
        notes += ["shortened"] if row.get("truncated") else []
        box = (int(row["y0"]), int(row["x0"]), min(int(row["y1"]), height), min(int(row["x1"]), width))
        patches.append({**row, "notes": notes, "place": _place(box, height, width)})
    return {
        "patches": patches,
        "fallbacks": sum(status not in DESCRIBED for status in statuses),
        "replaced": statuses.count("replaced"),
    }


def captioned_size(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """(height, width) in px of the image that captions describe: where the last boxes end. If the image wraps, boxes
    end beyond it, and the grid's name holds its size."""
    if rows and (wrapping := re.fullmatch(r"(\d+)x(\d+)/\d+/\d+/[a-z]+", str(rows[0].get("grid")))):
        return int(wrapping[1]), int(wrapping[2])
    return max((int(row["y1"]) for row in rows), default=0), max((int(row["x1"]) for row in rows), default=0)


def _place(box: Box, height: int, width: int) -> str:
    """A box (y0, x0, y1, x1) in an image as CSS properties in percent."""
    y0, x0, y1, x1 = box
    parts = {"left": x0 / width, "top": y0 / height, "width": (x1 - x0) / width, "height": (y1 - y0) / height}
    return ";".join(f"{name}:{100 * value:.3f}%" for name, value in parts.items())


def _spelled(value: Any, form: str) -> str:
    """A metric's value as text for readers; a dash if there is none."""
    return form.format(value) if _is_number(value) else "–"


def _plain(value: Any) -> str:
    """A metric's value as text for the script; "" if there is none."""
    return f"{value:.6g}" if _is_number(value) else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
