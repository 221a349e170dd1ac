"""The report: one HTML file that shows each sample before and after, and contact sheets of the same. Pure functions.

Knows nothing about storage: samples come as plain data, and text and pictures go out.

Invariants:
- The page needs nothing from outside (a content security policy forbids it) and is readable without its script.
- Everything that came from outside (prompts, captions, errors, names) is escaped.
- Equal input gives equal output: no time, host or random name is in it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resmaster_stages.dataset.schemas import DESCRIBED
from resmaster_stages.errors import SampleError
from resmaster_stages.metrics import shown_columns
from resmaster_stages.metrics.detail import Box, most_detailed
from resmaster_stages.metrics.flags import badness, known_flags
from resmaster_stages.publish.assets import SCRIPT, STYLE
from resmaster_stages.storage.images import decode_image

BUDGET_BYTES = 38_000_000
"""Size of all pictures in a page: browsers open such a file from a disk at once, and mail programs still take it."""
SIDES_PX = (1024, 768, 512, 384, 256, 192, 128)
"""Sizes (longer side) that a picture may be scaled down to, to fit the budget."""


@dataclass(frozen=True)
class ReportSample:
    """One sample as the report shows it."""

    key: str
    prompt: str
    low_res: bytes | Image.Image
    """The low-res picture, as a file's content or decoded."""
    high_res: bytes | Image.Image
    """The high-res picture, as a file's content or decoded."""
    captions: Sequence[Mapping[str, Any]] = ()
    """Rows of the captions table, in grid order; may be empty."""
    quality: Mapping[str, Any] = field(default_factory=dict)
    """The row of the quality table; may be empty."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Further facts to show, such as the seed."""
    command: str = ""
    """A command that tells more of the sample; "" for none."""


def choose(bad: Sequence[float] | NDArray[np.float64], limit: int = 200) -> list[int]:
    """What to show of a dataset too large for one page: half the worst, half evenly from the rest; all if they fit.

    `bad`: each sample's `badness`. Returns their positions, in ascending order.
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
    samples: Iterable[ReportSample],
    failures: Sequence[Mapping[str, Any]] = (),
    *,
    count: int | None = None,
    total: int | None = None,
    lead: str = "",
    budget_bytes: int = BUDGET_BYTES,
) -> str:
    """The page. Samples are taken one by one (a generator that reads them from storage is fine) and shown worst first.

    title: the dataset's name. facts: label -> value, shown in the header. failures: rows of the ledger (key, stage,
    error_class, message), with `command` as in ReportSample if there is one. count: how many samples will come, if `samples` has no length: it sets how large the pictures may
    be. total: samples in the dataset, if only some are shown. lead: a sentence under the title.
    """
    if count is None:
        samples = list(samples)
        count = len(samples)
    share = budget_bytes / max(1, count)
    cards = []
    for index, sample in enumerate(samples):
        bad = badness(sample.quality) if _measured(sample.quality) else -math.inf  # unknown: last
        cards.append((-bad, index, _card(sample, index, bad, share)))
    cards.sort(key=lambda card: card[:2])
    return _page(title, lead, facts, [card for _, _, card in cards], failures, total)


# ------------------------------------------------------------------------------------------------------------- page


def _page(
    title: str,
    lead: str,
    facts: Mapping[str, Any],
    cards: Sequence[str],
    failures: Sequence[Mapping[str, Any]],
    total: int | None,
) -> str:
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'"
    shown = len(cards)
    note = (
        f" {shown} of {total} samples are shown: the worst, and others evenly chosen."
        if total and total > shown
        else ""
    )
    header = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items())
    body = (
        f'{_bar()}<section class="cards" aria-label="Samples">{"".join(cards)}</section>'
        if cards
        else '<p class="none">No sample has passed every stage yet.</p>'
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>\n<body>"
        f'<header class="top"><h1>{_text(title)}</h1><p class="lead">{_text(lead + note)}</p>'
        f'<dl class="facts">{header}</dl></header>\n'
        f"<main>{body}{_failures(failures)}</main>\n"
        "<footer>Agreement, detail, seams and worst places are defined in the metrics of this project. "
        "Flags point at samples to look at; nothing is deleted.</footer>"
        f'<dialog aria-label="High-res image"><img alt="" src="data:,"></dialog><script>{SCRIPT}</script></body></html>\n'
    )


def _bar() -> str:
    orders = [
        ("bad -1", "worst first"),
        ("bad 1", "best first"),
        ("index 1", "dataset order"),
        *(
            (f"{column.name.replace('_', '')} {-1 if column.better == '↓' else 1}", f"{column.label}, worst first")
            for column in shown_columns()
        ),
    ]
    options = "".join(f'<option value="{value}">{_text(label)}</option>' for value, label in orders)
    flags = "".join(f'<option value="{flag}">{_text(flag.replace("_", " "))}</option>' for flag in known_flags())
    return (
        '<div class="bar"><span class="switch" role="group" aria-label="View">'
        '<button value="pair" aria-pressed="true">Side by side</button>'
        '<button value="slide" aria-pressed="false">Slider</button></span>'
        f'<label>Sort <select id="sort">{options}</select></label>'
        f'<label>Flag <select id="flag"><option value="">any or none</option><option value="*">flagged</option>'
        f'<option value="-">not flagged</option>{flags}</select></label>'
        '<label>Find <input id="find" type="search" placeholder="words of prompt or captions"></label>'
        '<span class="count" aria-live="polite"></span></div>'
    )


def _failures(failures: Sequence[Mapping[str, Any]]) -> str:
    if not failures:
        return ""
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{_text(row.get(name, ''))}</td>" for name in ("key", "stage", "error_class"))
        + f"<td>{_text(row.get('message', ''))}{_command(row.get('command', ''))}</td></tr>"
        for row in failures
    )
    noun = "sample" if len(failures) == 1 else "samples"
    return (
        f'<h2 id="failed">{len(failures)} failed {noun}</h2><div class="table"><table><thead><tr><th>key</th>'
        f"<th>stage</th><th>error</th><th>reason</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


# ------------------------------------------------------------------------------------------------------------- card


def _card(sample: ReportSample, index: int, bad: float, share_bytes: float) -> str:
    quality = sample.quality
    flags = [str(flag) for flag in quality.get("flags") or ()]
    data = {"index": index, "bad": f"{bad:.4f}" if math.isfinite(bad) else "", "flags": " ".join(flags)}
    columns, known = shown_columns(), known_flags()
    data |= {column.name.replace("_", ""): _plain(quality.get(column.name)) for column in columns}
    attributes = "".join(f' data-{name}="{_text(value)}"' for name, value in data.items())
    badges = "".join(
        f'<li title="{_text(known[flag].meaning if flag in known else "")}">{_text(flag.replace("_", " "))}</li>'
        for flag in flags
    )
    numbers = "".join(
        f'<div title="{_text(column.meaning)}"><dt>{_text(column.heading)}</dt>'
        f"<dd>{_number(quality.get(column.name), column.form)}</dd></div>"
        for column in columns
    )
    extra = " · ".join(f"{name} {value}" for name, value in sample.meta.items())
    return (
        f'<article class="card"{attributes}>{_pictures(sample, share_bytes)}'
        f'<p class="prompt">{_text(sample.prompt) or "<i>no prompt</i>"}</p>'
        f'<div class="key">{_text(sample.key)}{" · " + _text(extra) if extra else ""}</div>'
        + (f'<ul class="flags">{badges}</ul>' if badges else "")
        + (f'<dl class="metrics">{numbers}</dl>' if _measured(quality) else "")
        + _captions(sample.captions)
        + _command(sample.command)
        + "</article>\n"
    )


def _pictures(sample: ReportSample, share_bytes: float) -> str:
    try:
        low, high = _decode(sample.low_res, sample.key), _decode(sample.high_res, sample.key)
    except SampleError as error:
        return f'<p class="none">{_text(error)}</p>'
    y0, x0, y1, x1 = box = most_detailed(high)
    before, after = zoom(low, high, box)
    # of a sample's share: the zoomed parts are small and come first, the high-res picture takes what is left
    zooms = [data_url(before, 0.1 * share_bytes, SIDES_PX[3:]), data_url(after, 0.15 * share_bytes, SIDES_PX[3:])]
    low_url = data_url(low, 0.15 * share_bytes, SIDES_PX[2:])
    high_url = data_url(high, share_bytes - len(low_url) - sum(map(len, zooms)), SIDES_PX)
    ratio = f'style="aspect-ratio:{high.width}/{high.height}"'
    mark = f'<i class="mark" style="{_place(box, high.height, high.width)}"></i>'
    size_low, size_high = f"{low.width} × {low.height}", f"{high.width} × {high.height}"
    place = f"{x1 - x0} × {y1 - y0} px at the most detailed place"
    prompt = _text(sample.prompt)
    return (
        '<div class="pair">'
        f'<figure class="low"><span class="frame" {ratio}><img alt="low-res: {prompt}" src="{low_url}">{mark}</span>'
        f"<figcaption>low-res, {size_low}</figcaption></figure>"
        f'<figure class="high"><span class="frame" {ratio}><img alt="high-res: {prompt}" src="{high_url}">{mark}'
        '<input class="reveal" type="range" min="0" max="100" value="50" step="0.5" '
        'aria-label="Share of the low-res image"></span>'
        f"<figcaption>high-res, {size_high}</figcaption></figure></div>"
        '<div class="zoom">'
        f'<figure><span class="frame"><img alt="" src="{zooms[0]}"></span><figcaption>low-res, bicubic</figcaption></figure>'
        f'<figure><span class="frame"><img alt="" src="{zooms[1]}"></span><figcaption>{place}</figcaption></figure></div>'
    )


CAPTION_NOTES = {
    "replaced": "a neighbour's caption",
    "fallback": "global prompt",
    "empty": "no answer: global prompt",
}
"""What the report says of captions whose status is not ok."""


def _captions(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    height, width = max(int(row["y1"]) for row in rows), max(int(row["x1"]) for row in rows)
    items = []
    for row in rows:
        box = (int(row["y0"]), int(row["x0"]), int(row["y1"]), int(row["x1"]))
        status = str(row.get("status", "ok"))
        notes = [] if status == "ok" else [CAPTION_NOTES.get(status, status)]
        notes += ["shortened"] if row.get("truncated") else []
        note = f" <em>{_text(', '.join(notes))}</em>" if notes else ""
        items.append(
            f'<li data-box="{_place(box, height, width)}"><span>{_text(row["row"])}, {_text(row["col"])}</span>'
            f"<div>{_text(row['caption'])}{note}</div></li>"
        )
    statuses = [str(row.get("status", "ok")) for row in rows]
    fallbacks, replaced = sum(status not in DESCRIBED for status in statuses), statuses.count("replaced")
    tail = f", {fallbacks} with the global prompt" if fallbacks else ""
    tail += f", {replaced} with a neighbour's caption" if replaced else ""
    return (
        f"<details><summary>{len(rows)} patch captions (row, column){tail}</summary>"
        f'<ol class="patches">{"".join(items)}</ol></details>'
    )


def _command(command: str) -> str:
    """A command to copy: one click selects it whole; where there is a script, a button copies it."""
    if not command:
        return ""
    return f'<div class="command"><code>{_text(command)}</code><button type="button">Copy</button></div>'


# --------------------------------------------------------------------------------------------------------- pictures


def zoom(low: Image.Image, high: Image.Image, box: Box) -> tuple[Image.Image, Image.Image]:
    """(low-res enlarged bicubically, high-res): what `box` (px of `high`) shows of each, at the size of the box."""
    y0, x0, y1, x1 = box
    sy, sx = low.height / high.height, low.width / high.width
    before = low.resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC, box=(x0 * sx, y0 * sy, x1 * sx, y1 * sy))
    return before, high.crop((x0, y0, x1, y1))


def _decode(picture: bytes | Image.Image, key: str) -> Image.Image:
    return picture.convert("RGB") if isinstance(picture, Image.Image) else decode_image(picture, key)


def data_url(image: Image.Image, share_bytes: float, sides: Sequence[int]) -> str:
    """`image` as a WebP data URL of at most `share_bytes` characters if any of `sides` allows it; else the smallest."""
    url = ""
    longer = max(image.size)
    for side in sides:
        if side >= longer and side != sides[-1] and any(longer <= other < side for other in sides):
            continue  # a smaller step holds the whole picture as well
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


# ------------------------------------------------------------------------------------------------------------- text


def _text(value: object) -> str:
    """`value` as HTML text or attribute value, escaped; control characters become blanks."""
    text = "".join(" " if ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 else c for c in str(value))
    return escape(text, quote=True)


def _measured(quality: Mapping[str, Any]) -> bool:
    return any(quality.get(column.name) is not None for column in shown_columns())


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) and math.isfinite(value) else ""


def _number(value: Any, form: str) -> str:
    return _text(form.format(value)) if isinstance(value, int | float) and math.isfinite(value) else "–"


def _place(box: Box, height: int, width: int) -> str:
    """A box (y0, x0, y1, x1) in a picture as CSS, in percent."""
    y0, x0, y1, x1 = box
    parts = {"left": x0 / width, "top": y0 / height, "width": (x1 - x0) / width, "height": (y1 - y0) / height}
    return ";".join(f"{name}:{100 * value:.3f}%" for name, value in parts.items())
