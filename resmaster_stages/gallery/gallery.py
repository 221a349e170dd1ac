"""Holds what one server shows: samples, images, captions, failures, choices, and what is wrong with the publication."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.errors import ResMasterError
from resmaster_stages.gallery.captions import Captions
from resmaster_stages.gallery.choices import Choices
from resmaster_stages.gallery.failed import Failed
from resmaster_stages.gallery.images import Images
from resmaster_stages.gallery.samples import Samples
from resmaster_stages.inspection.query import SampleTable, sample_table
from resmaster_stages.inspection.status import status
from resmaster_stages.redaction import one_line
from resmaster_stages.storage.scratch import scratch_folder

QUESTION_SECONDS = 10.0
"""An expression that takes longer is stopped."""


class Gallery:
    """A published dataset that is looked at."""

    def __init__(self, dataset: Dataset, table: SampleTable, images: Images, who: str) -> None:
        self._dataset, self._table = dataset, table
        self.name = dataset.config.name
        self.images = images
        self.samples = Samples(dataset, table)
        self.captions = Captions(dataset, table)
        self.choices = Choices(dataset, table, who)
        self.failed = Failed(dataset)
        self._note = ""
        self._said = ""
        self.background = threading.Thread(target=self._look_around, name="view-background", daemon=True)

    def about(self) -> dict[str, Any]:
        """What the page says of the whole dataset. Choices of other people count from now on."""
        self.choices.read_again()
        try:
            failed, failed_error = self.failed.count(), ""
        except ResMasterError as error:  # a copy without its ledgers can be looked at
            failed, failed_error = 0, one_line(error)
        return {
            **self.samples.about,
            "choices": self.choices.counts(),
            "failed": failed,
            "failed_error": failed_error,
            "captions": self.captions.state(),
            "note": self._note,
            "who": self.choices.who,
        }

    def sample(self, key: str) -> dict[str, Any]:
        """One sample with its captions."""
        found = self.samples.one(key)
        return {**found, **self.captions.of(key, found.pop("captions_object"))}

    def near_duplicates(self, offset: int, limit: int) -> dict[str, Any]:
        """Some groups of near-duplicates."""
        groups = self._table.near_duplicates(limit, offset)
        total = self._table.near_duplicate_groups()
        return {"total": total, "groups": [{"first": first, "keys": keys} for first, keys in groups]}

    def say(self, line: str) -> None:
        """Print a problem on stderr, unless it is the one that was printed last."""
        if line != self._said:
            self._said = line
            say(line)

    def _look_around(self) -> None:
        """What is done in the background: find out whether the publication is up to date, and read the captions."""
        try:
            if note := status(self._dataset).publication_line(self._dataset.url):
                self._note = note
                self.say(note)
        except (ResMasterError, OSError) as error:
            self._note = f"it is not known whether the publication is up to date: {one_line(error)}"
            self.say(self._note)
        self.captions.index(self.say)


def say(line: str) -> None:
    """Print a problem on stderr."""
    print(f"view: {line}", file=sys.stderr, flush=True)


@contextmanager
def open_gallery(dataset: Dataset, who: str) -> Iterator[Gallery]:
    """The gallery of a published dataset, usable within the block. Raises as `sample_table` does."""
    with sample_table(dataset, QUESTION_SECONDS) as table, scratch_folder() as scratch:
        gallery = Gallery(dataset, table, Images(dataset, scratch), who)
        gallery.background.start()
        try:
            yield gallery
        finally:
            gallery.captions.stop()
            gallery.background.join(timeout=2)
