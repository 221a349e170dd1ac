"""Lists the samples that failed, with their prompts."""

from __future__ import annotations

import threading
from typing import Any

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.gallery.errors import told
from resmaster_stages.inspection.failures import failures

SHOWN = ("key", "stage", "error_class", "message", "attempt_number", "command")


class Failed:
    """The failed samples of a dataset, as its ledgers say. They are read again for the first page."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset, self._lock = dataset, threading.Lock()
        self._rows: list[dict[str, Any]] | None = None

    def count(self) -> int:
        """How many samples failed."""
        return len(self._found(again=False))

    def page(self, offset: int, limit: int) -> dict[str, Any]:
        """Some of the failed samples, with their prompts."""
        rows = self._found(again=not offset)
        shown = rows[offset : offset + limit]
        with told(self._dataset, "plan"):
            prompts = {
                planned.key: planned.prompt
                for shard in sorted({row["shard"] for row in shown})
                for planned in self._dataset.plan.read(shard)
            }
        samples = [{**{name: row[name] for name in SHOWN}, "prompt": prompts.get(row["key"], "")} for row in shown]
        return {"total": len(rows), "samples": samples}

    def _found(self, again: bool) -> list[dict[str, Any]]:
        with self._lock:
            if again or self._rows is None:
                with told(self._dataset, "errors"):
                    self._rows = failures(self._dataset)
            return self._rows
