"""Keeps what the person at the page chooses. A choice is durable before the page hears so.

Choices of other people count from the next time that the page is loaded (`read_again`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

from resmaster_stages.dataset.curation import RATINGS, VERDICTS, Choice, Session, now, read_choices
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.errors import ResMasterError, UserError
from resmaster_stages.gallery.errors import Unreadable
from resmaster_stages.inspection.choice_files import encode_csv
from resmaster_stages.inspection.query import Query, SampleTable
from resmaster_stages.redaction import one_line, shortened

TOGETHER = 20_000
"""At most so many choices come in one request."""
FIELDS = {"key", "verdict", "rating", "reason"}


class Choices:
    """The choices about the samples of a dataset."""

    def __init__(self, dataset: Dataset, table: SampleTable, who: str) -> None:
        self._dataset, self._table, self.who = dataset, table, who
        self._session = Session(dataset.folder)
        self._lock = threading.Lock()

    def add(self, asked: Any) -> dict[str, int]:
        """Keep the choices of a request. Returns the counts after them. Raises UserError for a wrong request, and
        Unreadable if they cannot be kept: then none of them counts."""
        given = list(_given(asked))
        if not given:
            return self.counts()
        with self._lock:
            known = self._known([each["key"] for each in given])
            choices = [Choice(**{**known[each["key"]], **each}, who=self.who, when=now()) for each in given]
            try:
                self._session.add(choices)
            except (OSError, ResMasterError) as error:
                raise Unreadable(f"the choices could not be kept: {one_line(error)}") from error
            self._table.choose({choice.key: choice for choice in choices}.values())
        return self.counts()

    def counts(self) -> dict[str, int]:
        """How many samples are kept, rejected and rated."""
        return self._table.choice_counts()

    def read_again(self) -> None:
        """Let the choices count that are in the dataset now, those of other people too."""
        with self._lock:
            self._table.choose(self._read().values(), only=True)

    def as_csv(self) -> bytes:
        """The choices that count, as a CSV file that `resmaster curate --import` reads."""
        return encode_csv(self._read().values())

    def _read(self) -> dict[str, Choice]:
        try:
            return read_choices(self._dataset.folder)
        except (OSError, ResMasterError) as error:
            raise Unreadable(one_line(error)) from error

    def _known(self, keys: list[str]) -> dict[str, dict[str, Any]]:
        """Key -> what is chosen so far. Raises UserError if a key is of no sample."""
        query = Query().also("key in (select unnest(?::varchar[]))", keys)
        rows = self._table.rows(query, ("key", "verdict", "rating", "reason", "take"))
        found = {
            row["key"]: {
                "verdict": row["verdict"] or "none",
                "rating": row["rating"],
                "reason": row["reason"] or "",
                "take": row["take"] or 0,
            }
            for row in rows
        }
        for key in keys:
            if key not in found:
                raise UserError(f"no published sample has the key {shortened(key, 80)!r}; reload the page")
        return found


def _given(asked: Any) -> Iterator[dict[str, Any]]:
    """The choices of a request, checked."""
    choices = asked.get("choices") if isinstance(asked, Mapping) else None
    if not isinstance(choices, list):
        raise UserError('send {"choices": [{"key": ..., "verdict": ...}]}')
    if len(choices) > TOGETHER:
        raise UserError(f"{len(choices)} choices in one request; send at most {TOGETHER}")
    for each in choices:
        if not isinstance(each, dict) or not isinstance(each.get("key"), str) or each.keys() - FIELDS:
            raise UserError(f"a choice has a key and some of {', '.join(sorted(FIELDS - {'key'}))}")
        rating = each.get("rating")
        if each.get("verdict", "none") not in VERDICTS:
            raise UserError(f"a verdict is one of {', '.join(VERDICTS)}")
        if rating is not None and (type(rating) is not int or rating not in RATINGS):
            raise UserError(f"a rating is a whole number from {RATINGS[0]} to {RATINGS[-1]}, or null")
        if not isinstance(each.get("reason", ""), str):
            raise UserError("a reason is text")
        try:
            f"{each['key']}{each.get('reason', '')}".encode()
        except UnicodeEncodeError:
            raise UserError("a key or a reason holds half a character; send whole ones") from None
        yield each
