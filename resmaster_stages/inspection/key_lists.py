"""Reads lists of samples as users give them, and finds the samples that they mean.

A list is keys with commas between them, or a file: `.txt` (one key per line), `.csv` or `.parquet` (column `key`). The
beginning of a key stands for the key. A table with a column `verdict` holds choices: of these, the rejected samples are
meant. If choices of one sample differ, the one with the latest `when` counts.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.errors import UserError, first_line
from resmaster_stages.inspection.explain import KEY_CHARACTERS, where_keys_are
from resmaster_stages.redaction import one_line, without_credentials
from resmaster_stages.storage.filesystem import open_file
from resmaster_stages.storage.sources import is_absent
from resmaster_stages.storage.store_errors import explained

SUFFIXES = (".txt", ".csv", ".parquet")
COLUMNS = ("key", "verdict", "when")
"""The columns that are read. Only `key` must be there."""
REJECTED = "rejected"
SHOWN_CHARACTERS = 60
_KEY = re.compile(rf"[0-9a-f]{{1,{KEY_CHARACTERS}}}")


@dataclass(frozen=True)
class KeyList:
    """A list of samples that was read."""

    option: str
    """The option that gave the list, for messages."""
    name: str
    """Name of the file, or the option."""
    keys: tuple[str, ...]
    """Keys and beginnings of keys, each once."""
    when: Mapping[str, str] = field(default_factory=dict)
    """For choices: key -> when it was chosen, as the table says it."""


def read_key_list(text: str, option: str) -> KeyList:
    """The list that `text` is, or that is in the file `text`. Raises UserError for others, and for an empty list.

    option: the option that gave `text`, for messages.
    """
    suffix, place = Path(text).suffix.lower(), without_credentials(text)
    if suffix not in SUFFIXES and (suffix or "://" in text):
        raise UserError(f"{option} {place}: unknown kind of list; known: {', '.join(SUFFIXES)}")
    if suffix not in SUFFIXES:
        found = KeyList(option, option, _keys(text.split(","), option))
    elif suffix == ".txt":
        lines = _decoded(_content(text, option), place).splitlines()
        first = [line.partition("\t")[0] for line in lines]
        found = KeyList(option, Path(place).name, _keys(first, f"{option} {place}"))
    else:
        read = _csv_rows if suffix == ".csv" else _parquet_rows
        rows = [row for row in read(_content(text, option), place) if not is_absent(row["key"])]
        found = KeyList(option, Path(place).name, _keys([row["key"] for row in rows], f"{option} {place}"))
        if rows and "verdict" in rows[0]:
            found = _rejected(found, rows)
    if not found.keys:
        known = ", ".join(SUFFIXES)
        raise UserError(f"{place or option}: holds no key; give keys, or a file of keys ({known})")
    return found


def _rejected(found: KeyList, rows: Sequence[Mapping[str, Any]]) -> KeyList:
    """The samples that choices reject. Raises UserError if there are none."""
    last = {_bare(row["key"]): row for row in sorted(rows, key=_moment)}
    keys = tuple(key for key in found.keys if last[key]["verdict"] == REJECTED)
    if not keys:
        raise UserError(f"{found.option}: {found.name}: none of its choices is {REJECTED!r}")
    return replace(found, keys=keys, when={key: when for key in keys if (when := _moment(last[key]))})


class Finder:
    """Finds which keys a list means, while all keys go by."""

    def __init__(self, wanted: KeyList) -> None:
        self._list = wanted
        self._by_length: dict[int, set[str]] = {}
        for key in wanted.keys:
            self._by_length.setdefault(len(key), set()).add(key)
        self._found: dict[str, str] = {}
        self._ambiguous: dict[str, str] = {}

    def means(self, key: str) -> bool:
        """Whether the list means this key."""
        meant = False
        for length, keys in self._by_length.items():
            if (prefix := key[:length]) in keys:
                meant = True
                if self._found.setdefault(prefix, key) != key:
                    self._ambiguous.setdefault(prefix, key)
        return meant

    def require(self, whose: str, hint: str) -> None:
        """Raise UserError, which names the first, if a member of the list means none or several of the keys.

        whose: what has no such key. hint: where a user finds keys.
        """
        unknown = [key for key in self._list.keys if key not in self._found]
        if unknown:
            more = f" (nor with {len(unknown) - 1} others of the list)" if len(unknown) > 1 else ""
            raise UserError(f"{self._list.option}: {whose} has a key that begins with {unknown[0]}{more}; {hint}")
        for prefix in self._list.keys:
            if prefix in self._ambiguous:
                shown = f"{self._found[prefix]}, {self._ambiguous[prefix]}"
                raise UserError(f"{self._list.option}: several keys begin with {prefix} ({shown}); give more digits")


def planned_keys(dataset: Dataset, wanted: KeyList) -> dict[str, int]:
    """Key -> shard, in the plan's order, of the planned samples that a list means.

    Raises UserError, which names the first, if a member of the list means no planned sample or several.
    """
    finder = Finder(wanted)
    found = {key: shard for key, shard in dataset.plan.places() if finder.means(key)}
    finder.require(f"{dataset.url}: no sample", where_keys_are(dataset))
    return found


def _bare(key: Any) -> str:
    return str(key).strip().lower()


def _moment(choice: Mapping[str, Any]) -> str:
    when = choice.get("when")
    return "" if is_absent(when) else str(when)


def _keys(texts: list[Any], place: str) -> tuple[str, ...]:
    """The keys in texts, each once; blank texts are left out. Raises UserError, which names the first that is none."""
    keys: dict[str, None] = {}
    for text in texts:
        if is_absent(text):
            continue
        if not _KEY.fullmatch(key := _bare(text)):
            shown = repr(text if len(str(text)) <= SHOWN_CHARACTERS else f"{str(text)[:SHOWN_CHARACTERS]}...")
            raise UserError(
                f"{place}: {one_line(shown)} is no key: give up to {KEY_CHARACTERS} hex digits of a key, or a file of "
                f"keys ({', '.join(SUFFIXES)})"
            )
        keys[key] = None
    return tuple(keys)


def _content(path: str, option: str) -> bytes:
    """The content of a file. Raises UserError if there is none."""
    folder, name = open_file(path)
    with explained(path):
        if folder.local and not Path(folder.full(name)).is_file():
            raise UserError(f"{option} {without_credentials(path)}: no such file; check the path")
        try:
            return folder.read(name)
        except FileNotFoundError:
            raise UserError(f"{option} {without_credentials(path)}: no such file; check the path") from None


def _decoded(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{place}: not UTF-8 text; save the file as UTF-8") from None


def _csv_rows(data: bytes, place: str) -> list[dict[str, Any]]:
    try:
        reader = csv.DictReader(io.StringIO(_decoded(data, place), newline=""), strict=True)
        _require_key(reader.fieldnames or (), place)
        return [{name: row[name] for name in COLUMNS if name in row} for row in reader]
    except csv.Error as error:
        raise UserError(f"{place}: not valid CSV ({error}); write it again") from None


def _parquet_rows(data: bytes, place: str) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(data))
        names = file.schema_arrow.names
        _require_key(names, place)
        rows: list[dict[str, Any]] = file.read(columns=[name for name in COLUMNS if name in names]).to_pylist()
        return rows
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = one_line(first_line(error))
        raise UserError(f"{place}: not a readable Parquet file ({reason}); write it again") from None


def _require_key(names: Sequence[str], place: str) -> None:
    if "key" not in names:
        raise UserError(f"{place}: has no column 'key'; give the samples' keys in a column of this name")
