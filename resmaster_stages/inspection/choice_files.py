"""Reads and writes choices as files that people and other programs use: CSV and Parquet.

The columns are those of `curation.parquet`; only `key` and either `verdict` or `rating` must be there. A row without a
time is a choice of now, and one without a name is the reader's own.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from resmaster_stages.dataset.curation import VERDICTS, Choice, encode_choices, in_form
from resmaster_stages.errors import UserError, did_you_mean, first_line
from resmaster_stages.redaction import one_line
from resmaster_stages.storage.filesystem import open_regular

COLUMNS = tuple(field.name for field in fields(Choice))
SUFFIXES = (".csv", ".parquet")
LARGEST_BYTES = 1 << 30
"""A larger file is refused."""


def read_choice_file(path: str, who: str, when: str, takes: Mapping[str, int]) -> Iterator[Choice]:
    """The choices in a table. who, when, takes (by key): of rows that do not say it.

    Raises UserError, which names the row, for a file or row that cannot be used.
    """
    suffix, data = _suffix(path), read_file(path)
    for number, row in _of_csv(data, path) if suffix == ".csv" else _of_parquet(data, path):
        try:
            yield _choice({"who": who, "when": when, "take": takes.get(str(row.get("key")).strip(), 0), **row})
        except ValueError as error:
            raise UserError(f"{path}, row {number}: {one_line(error)}; correct the row, or remove it") from None


def require_known(path: str, choices: Iterable[Choice], known: Collection[str]) -> list[Choice]:
    """The choices of a file. Raises UserError if there is none, or for a key that is not known."""
    found = list(choices)
    for choice in found:
        if choice.key not in known:
            raise UserError(f"{path}: there is no sample {choice.key!r} in this dataset; remove its row")
    if not found:
        raise UserError(f"{path}: holds no choice; give a table with the columns key and verdict or rating")
    return found


def read_file(path: str) -> bytes:
    """The content of a file of choices. Raises UserError."""
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > LARGEST_BYTES:
                raise UserError(f"{path}: is larger than {LARGEST_BYTES} bytes; give a table of choices")
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); give a table of choices") from error


def write_choice_file(path: str, choices: Iterable[Choice]) -> None:
    """Write choices as CSV or Parquet, by the name's ending. Raises UserError for another ending."""
    suffix = _suffix(path)
    if suffix == ".parquet":
        data = encode_choices(choices)
    else:
        data = encode_csv(choices)
    try:
        Path(path).write_bytes(data)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)}); choose another file") from error


def encode_csv(choices: Iterable[Choice]) -> bytes:
    """Choices as CSV in UTF-8."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(choice) for choice in choices)
    return text.getvalue().encode()


def _suffix(path: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown kind of file; known: {', '.join(SUFFIXES)}")
    return suffix


def _of_csv(data: bytes, path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        _check_columns(reader.fieldnames or (), path)
        for row in reader:
            yield reader.line_num, {name: value for name, value in row.items() if value not in ("", None)}
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no CSV in UTF-8 ({first_line(error)}); save it so") from error


def _of_parquet(data: bytes, path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        table = pq.read_table(io.BytesIO(data))
        _check_columns(table.column_names, path)
        rows = table.select([name for name in table.column_names if name in COLUMNS]).to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({first_line(error)})") from error
    for number, row in enumerate(rows, 1):
        yield number, {name: value for name, value in row.items() if value is not None}


def _check_columns(names: Collection[str], path: str) -> None:
    if "key" not in names or not {"verdict", "rating"} & set(names):
        there = ", ".join(map(repr, names)) or "none"
        raise UserError(f"{path}: lacks the columns key and verdict or rating (it has {there}); add them")


def _choice(row: Mapping[str, Any]) -> Choice:
    """A choice from a row without empty cells. Raises ValueError."""
    if "key" not in row:
        raise ValueError("has no key")
    verdict = str(row.get("verdict", "none")).strip().lower()
    if verdict not in VERDICTS:
        raise ValueError(f"verdict {verdict!r} is none of {', '.join(VERDICTS)}{did_you_mean(verdict, VERDICTS)}")
    return Choice(
        key=str(row["key"]).strip(),
        verdict=verdict,
        rating=_number(row["rating"]) if "rating" in row else None,
        reason=str(row.get("reason", "")),
        who=str(row["who"]),
        when=_moment(row["when"]),
        take=_number(row["take"]),
    )


def _moment(value: Any) -> str:
    """A time in the form of `Choice.when`, by which choices sort; without a zone it is UTC. Raises ValueError."""
    moment = datetime.fromisoformat(str(value).strip())
    return in_form(moment if moment.tzinfo else moment.replace(tzinfo=UTC))


def _number(value: Any) -> int:
    """A whole number, also as spreadsheets write it (`3.0`). Raises ValueError."""
    number = float(value)
    if not number.is_integer():
        raise ValueError(f"{value!r} is no whole number")
    return int(number)
