"""Reads captions: of one sample for its page, and of all in the background, so that a search finds their words.

The tables of captions are not compared with their sha256, which `resmaster verify` does.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.sample import DESCRIBED
from resmaster_stages.dataset.schemas import CAPTIONS_SCHEMA
from resmaster_stages.errors import ResMasterError
from resmaster_stages.gallery.caches import Kept
from resmaster_stages.gallery.errors import told
from resmaster_stages.inspection.query import SampleTable
from resmaster_stages.publish.page import captioned_size
from resmaster_stages.redaction import one_line, quoted
from resmaster_stages.storage.tables import decode_table

TABLES = 4
"""Tables of captions that are kept in memory."""
TOGETHER = 8
"""Tables that are read at the same time in the background."""
SHOWN = ("row", "col", "y0", "x0", "y1", "x1", "caption", "status", "fit")


class Captions:
    """The captions of the published samples."""

    def __init__(self, dataset: Dataset, table: SampleTable) -> None:
        self._dataset, self._table = dataset, table
        self._tables: Kept[pa.Table] = Kept(TABLES)
        self._objects = table.distinct("captions_object")
        self._stop = threading.Event()
        self.indexed = 0
        self.problems: list[str] = []

    def state(self) -> dict[str, Any]:
        """How many of the tables a search finds so far, and why not more."""
        error = ""
        if self.problems:
            error = f"the captions of {len(self.problems)} shards cannot be searched: {self.problems[0]}"
        return {"indexed": self.indexed, "shards": len(self._objects), "error": error}

    def of(self, key: str, name: str | None) -> dict[str, Any]:
        """The captions of a sample by patch, and the size in px of the image that they describe. name: their table."""
        rows: list[dict[str, Any]] = []
        if name:
            with told(self._dataset, name):
                table = self._tables.get(name, lambda: decode_table(self._dataset.folder.read(name), *_whole(name)))
            rows = table.filter(pc.equal(table["key"], key)).to_pylist()
            rows.sort(key=lambda row: (row["row"], row["col"]))
        height, width = captioned_size(rows)
        shown = [{name: row[name] for name in SHOWN} for row in rows]
        return {"captions": shown, "captions_height": height, "captions_width": width}

    def index(self, say: Callable[[str], None]) -> None:
        """Let the search find all captions, some tables at a time. Ends when `stop` is called. `say` gets problems."""
        names = iter(self._objects)
        while (batch := list(itertools.islice(names, TOGETHER))) and not self._stop.is_set():
            try:
                found = self._dataset.folder.read_many(batch, lenient=True)
            except (ResMasterError, OSError) as error:
                self._fail([one_line(error)] * len(batch), say)
                continue
            place = quoted(self._dataset.url)
            mend = f"run: resmaster verify {place}, then: resmaster repair {place}"
            self._fail([f"{name} is gone or unreadable; {mend}" for name in batch if name not in found], say)
            for name, data in found.items():
                if self._stop.is_set():
                    return
                try:
                    self._table.add_texts(_texts(data, name))
                except ResMasterError as error:
                    self._fail([f"{one_line(error)}; {mend}"], say)
                else:
                    self.indexed += 1
            self._stop.wait(0.02)  # people who look come first

    def stop(self) -> None:
        """Let `index` end soon."""
        self._stop.set()

    def _fail(self, problems: list[str], say: Callable[[str], None]) -> None:
        self.problems += problems
        for problem in problems[:1]:
            say(problem)


def _whole(name: str) -> tuple[pa.Schema, str]:
    return CAPTIONS_SCHEMA, name


def _texts(data: bytes, name: str) -> dict[str, str]:
    """Key -> the captions of a table that describe patches, in lower case."""
    table = decode_table(data, CAPTIONS_SCHEMA, name, ("key", "caption", "status"))
    table = table.filter(pc.is_in(table["status"], pa.array(DESCRIBED)))
    lines: dict[str, dict[str, None]] = {}
    for key, caption in zip(table["key"].to_pylist(), table["caption"].to_pylist()):
        lines.setdefault(key, {})[caption.lower()] = None
    return {key: "\n".join(own) for key, own in lines.items()}
