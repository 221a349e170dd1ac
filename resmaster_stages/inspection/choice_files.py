"""Reads and writes choices as files that people and other programs use: CSV and Parquet.

The columns are those of `curation.parquet`; only `key` and either `verdict` or `rating` must be there. A row without a
time is a choice of now, and one without a name is the reader's own.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from resmaster_stages.dataset.curation import VERDICTS, Choice, encode_choices
from resmaster_stages.errors import UserError, did_you_mean, first_line
from resmaster_stages.redaction import one_line

COLUMNS = tuple(field.name for field in fields(Choice))
SUFFIXES = (".csv", ".parquet")
LARGEST_BYTES = 1 << 30
"""A larger file is refused."""


def read_choice_file(path: str, who: str, when: str, known: Collection[str]) -> list[Choice]:
    """The choices in a file. who, when: of rows that do not say it. known: the keys that there are.

    Raises UserError, which names the row, for a file or row that cannot be used, and for an unknown key.
    """
    choices = []
    for number, row in _rows(path):
        try:
            choice = _choice(row, who, when)
        except ValueError as error:
            raise UserError(f"{path}, row {number}: {one_line(error)}; correct the row, or remove it") from None
        if choice.key not in known:
            raise UserError(f"{path}, row {number}: there is no sample {choice.key!r} in this dataset; remove the row")
        choices.append(choice)
    if not choices:
        raise UserError(f"{path}: has no rows; give a table with the columns key and verdict or rating")
    return choices


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


def _rows(path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a file with their numbers as users count them."""
    suffix = _suffix(path)
    try:
        if Path(path).stat().st_size > LARGEST_BYTES:
            raise UserError(f"{path}: is larger than {LARGEST_BYTES} bytes; give a table of choices")
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); give a table of choices") from error
    return _of_csv(data, path) if suffix == ".csv" else _of_parquet(data, path)


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
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({first_line(error)})") from error
    for number, row in enumerate(rows, 1):
        yield number, {name: value for name, value in row.items() if value is not None}


def _check_columns(names: Collection[str], path: str) -> None:
    if "key" not in names or not {"verdict", "rating"} & set(names):
        there = ", ".join(map(repr, names)) or "none"
        raise UserError(f"{path}: lacks the columns key and verdict or rating (it has {there}); add them")


def _choice(row: Mapping[str, Any], who: str, when: str) -> Choice:
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
        who=str(row.get("who", who)),
        when=str(row.get("when", when)),
        take=_number(row.get("take", 0)),
    )


def _number(value: Any) -> int:
    """A whole number, also as spreadsheets write it (`3.0`). Raises ValueError."""
    number = float(value)
    if not number.is_integer():
        raise ValueError(f"{value!r} is no whole number")
    return int(number)
