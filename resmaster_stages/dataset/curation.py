"""Keeps what people choose about samples: kept, rejected, rated. Choices never change what is committed.

A session (of the page `resmaster view`, or one import) writes its choices into a file of its own, `curation/…parquet`,
so people who choose at the same time never overwrite each other. `curation.parquet` holds the choices that count; it is
written at publishing, for readers.

Invariants:
- Of several choices about one sample, the latest counts as a whole.
- A choice is about one take of a sample. After the sample is made anew, the choice does not count any more.
- A file that cannot be read is an error and is never overwritten, so no choice is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import new_attempt
from resmaster_stages.errors import ShardError
from resmaster_stages.keys import canonical_json, digest
from resmaster_stages.storage.filesystem import Folder

Verdict = Literal["kept", "rejected", "none"]
"""`none`: there is no verdict (any more)."""
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
RATINGS = range(1, 6)
REASON_CHARACTERS = 1000
"""Longer reasons and names are cut."""


@dataclass(frozen=True)
class Choice:
    """What somebody chose about one sample. Raises ValueError for an unknown verdict or rating."""

    key: str
    verdict: Verdict = "none"
    rating: int | None = None
    """1 (worst) to 5 (best)."""
    reason: str = ""
    who: str = ""
    when: str = ""
    """UTC, as `2026-11-29T21:07:30.123456+00:00`: choices sort by it."""
    take: int = 0
    """The take of the sample that was looked at: how many times it had been made anew."""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict {self.verdict!r} is none of {', '.join(VERDICTS)}")
        if self.rating is not None and self.rating not in RATINGS:
            raise ValueError(f"rating {self.rating!r} is no number from {RATINGS[0]} to {RATINGS[-1]}")
        for name in ("reason", "who"):
            object.__setattr__(self, name, getattr(self, name)[:REASON_CHARACTERS])

    @property
    def empty(self) -> bool:
        """Whether the choice only takes an earlier one back."""
        return self.verdict == "none" and self.rating is None


@dataclass(frozen=True)
class Chosen:
    """How many samples people have chosen about."""

    kept: int = 0
    rejected: int = 0
    rated: int = 0


def count(choices: Iterable[Choice]) -> Chosen:
    """How many of some choices keep, reject and rate."""
    verdicts, rated = Counter[str](), 0
    for choice in choices:
        verdicts[choice.verdict] += 1
        rated += choice.rating is not None
    return Chosen(verdicts["kept"], verdicts["rejected"], rated)


def now() -> str:
    """The time in the form of `Choice.when`."""
    return in_form(datetime.now(UTC))


def in_form(moment: datetime) -> str:
    """A moment in the form of `Choice.when`."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


class Session:
    """Writes the choices of one session. Every `add` is durable when it returns."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._name = layout.choices(datetime.now(UTC).strftime("%Y%m%dT%H%M%S"), new_attempt())
        self._choices: dict[str, Choice] = {}

    def add(self, choices: Iterable[Choice]) -> None:
        """Add choices, and write the session's file. If that fails, none of `choices` is part of the session."""
        together = self._choices | {choice.key: choice for choice in choices}
        self._folder.write(self._name, encode_choices(together.values()))
        self._choices = together


def encode_choices(choices: Iterable[Choice]) -> bytes:
    """Choices as a Parquet file, by key."""
    from resmaster_stages.dataset.schemas import CURATION_SCHEMA
    from resmaster_stages.storage.tables import encode_table

    return encode_table([asdict(each) for each in sorted(choices, key=lambda each: each.key)], CURATION_SCHEMA)


def read_choices(folder: Folder) -> dict[str, Choice]:
    """Key -> the choice that counts, without empty ones. Raises ShardError if a file of choices cannot be read."""
    from resmaster_stages.dataset.schemas import CURATION_SCHEMA
    from resmaster_stages.storage.tables import decode_table

    names = filter(layout.is_choices, folder.names(layout.CURATION))
    latest: dict[str, Choice] = {}
    for name, data in folder.read_many([layout.CURATION_TABLE, *names]).items():
        for row in decode_table(data, CURATION_SCHEMA, name).to_pylist():
            choice = _choice(row, name)
            known = latest.get(choice.key)
            if known is None or _order(known) < _order(choice):
                latest[choice.key] = choice
    return {key: choice for key, choice in sorted(latest.items()) if not choice.empty}


def _choice(row: Mapping[str, Any], name: str) -> Choice:
    try:
        return Choice(**row)
    except ValueError as error:
        raise ShardError(f"{name}: sample {row['key']}: {error}; restore the file from a copy, or delete it") from error


def _order(choice: Choice) -> tuple[str, str]:
    """Choices about one sample sort by it: by time, and else by anything that everybody sees alike."""
    return choice.when, canonical_json(asdict(choice))


def digest_of_choices(choices: Mapping[str, Choice]) -> str:
    """A digest of the choices that count; "" if there are none."""
    if not choices:
        return ""
    return digest([asdict(choices[key]) for key in sorted(choices)])
