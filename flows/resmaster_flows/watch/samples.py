"""Shows the first samples of each shard while they are made, and those that failed, as Markdown with small images.

Events are heard by the thread that computes, which only keeps the files. `page` makes the small images, in the thread
that sends artifacts.

Invariants:
- A page has at most `FIRST_ROWS` + `FAILED_ROWS` images, each of at most `IMAGE_CHARACTERS`.
- At most `WAITING` samples keep the files of their images in memory.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from PIL import Image, ImageOps

from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import SampleError
from resmaster_stages.progress import Event, Glance, SampleDone
from resmaster_stages.publish.markdown import cell
from resmaster_stages.publish.page import data_url
from resmaster_stages.redaction import shortened
from resmaster_stages.storage.images import decode_image

FIRST_OF_SHARD = 2
"""Samples of each shard that are shown."""
FIRST_ROWS, FAILED_ROWS = 16, 8
"""Most samples that are shown, and most that failed. The newest ones are kept."""
WAITING = 8
CELL_PX, GAP_PX = 160, 4
SIDES_PX = (2 * CELL_PX + GAP_PX, 256, 192, 128)
"""Widths to which a pair of images may be scaled down to fit `IMAGE_CHARACTERS`."""
IMAGE_CHARACTERS = 7_500
TEXT_CHARACTERS = 300
"""Most characters of a prompt, and of the reason of a failure."""

Place = tuple[int, str]
"""Shard and key of a sample."""


@dataclass(frozen=True)
class Row:
    """A sample on the page."""

    prompt: str
    image: str = ""
    """Data URL of its small images side by side; "" as long as there are none."""
    error: str = ""


class Samples:
    """What is shown of the samples of a run. `hear` is its listener."""

    def __init__(self) -> None:
        self._first: dict[Place, Row] = {}
        self._failed: dict[Place, Row] = {}
        self._of_shard: defaultdict[int, set[str]] = defaultdict(set)
        self._waiting: deque[tuple[Place, Glance]] = deque(maxlen=WAITING)
        self._lock = threading.Lock()
        self.failed = 0
        """Samples that failed, shown or not."""

    def hear(self, event: Event) -> None:
        """Keep the images of a sample that is to be shown."""
        if not isinstance(event, SampleDone):
            return
        place, known = (event.shard, event.key), self._of_shard[event.shard]
        self.failed += not event.ok
        wanted = event.key in known or len(known) < FIRST_OF_SHARD
        if event.ok and not (wanted and STAGES[event.stage].schema is None):  # a stage with a schema makes no images
            return
        glance = event.glance()
        with self._lock:
            self._waiting.append((place, glance))
            if event.ok:
                known.add(event.key)
                _put(self._first, place, Row(glance.prompt), FIRST_ROWS)
            else:
                self._first.pop(place, None)
                _put(self._failed, place, Row(glance.prompt, error=f"{event.stage}: {event.error}"), FAILED_ROWS)

    def page(self) -> str:
        """The page as Markdown, the newest samples first; "" without samples."""
        while self._waiting:
            with self._lock:
                place, glance = self._waiting.popleft()
            image = small(glance.images)  # takes a second if the image is large
            with self._lock:
                for rows in (self._first, self._failed):
                    if place in rows:
                        rows[place] = replace(rows[place], image=image)
        with self._lock:
            failed, first = dict(self._failed), dict(self._first)
        parts = []
        if failed:
            parts += [f"## {self.failed} failed samples", _listed(failed)]
        if first:
            parts += [f"## The first {FIRST_OF_SHARD} samples of each shard", _listed(first)]
        return "\n\n".join(parts)


def _put(rows: dict[Place, Row], place: Place, row: Row, most: int) -> None:
    """Put a row last, with the image that it had, and remove the first row if there are too many."""
    known = rows.pop(place, row)
    rows[place] = replace(row, image=known.image)
    if len(rows) > most:
        del rows[next(iter(rows))]


def small(images: Mapping[str, bytes]) -> str:
    """The low-res image beside the image of the last stage, as a data URL; "" if neither can be decoded."""
    last = list(images)[-1:]
    chosen = [images[stage] for stage in dict.fromkeys(["low_res", *last]) if stage in images]
    cells = []
    for data in chosen:
        with suppress(SampleError):
            image = decode_image(data, "image")
            cells.append(ImageOps.contain(image, (CELL_PX, CELL_PX)))
    if not cells:
        return ""
    width = sum(image.width for image in cells) + GAP_PX * (len(cells) - 1)
    pair = Image.new("RGB", (width, max(image.height for image in cells)), "white")
    left = 0
    for image in cells:
        pair.paste(image, (left, 0))
        left += image.width + GAP_PX
    return data_url(pair, IMAGE_CHARACTERS, SIDES_PX)


def _listed(rows: Mapping[Place, Row]) -> str:
    """The rows, the last ones first. Paragraphs, because the cells of a table in Prefect's UI do not wrap."""
    parts = []
    for (shard, key), row in reversed(list(rows.items())):
        image = f"![low-res beside high-res]({row.image})<br>" if row.image else ""
        words = f"shard {shard:06d}, `{key}`: {cell(shortened(row.prompt, TEXT_CHARACTERS))}"
        error = f"<br>**{cell(shortened(row.error, TEXT_CHARACTERS))}**" if row.error else ""
        parts.append(f"{image}{words}{error}")
    return "\n\n".join(parts)
