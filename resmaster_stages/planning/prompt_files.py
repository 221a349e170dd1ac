"""Reads prompts from files: .txt (one prompt per line), .csv, .jsonl and .parquet.

Invariants:
- A file that cannot be read raises a UserError that names file and line. A bad value in a row costs only that row.
- Every row that is not blank becomes one RawPrompt. A line ends with LF, CR LF or CR, and with no other character.
- In a table, null, NaN and blank text all mean that nothing is there.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from resmaster_stages.errors import UserError, first_line
from resmaster_stages.redaction import one_line, without_credentials
from resmaster_stages.storage.filesystem import PART_BYTES, open_file
from resmaster_stages.storage.masks import BATCH_ROWS, COLUMN, forget_tables
from resmaster_stages.storage.sources import is_absent
from resmaster_stages.storage.store_errors import explained

PARQUET_BATCH_ROWS = 10_000
READ_BYTES = 1 << 20
MAX_CELL_CHARACTERS = 2**28
"""A CSV file with a longer cell is refused, because a quote that is never closed would take any file into memory."""
SHOWN_CHARACTERS = 200
"""Of the names of columns in a message."""

SUFFIXES = (".txt", ".csv", ".jsonl", ".parquet")
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z")
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
"""What programs write instead of the commas of a CSV file."""
COLUMNS = ("prompt", "negative_prompt", COLUMN)
"""The columns that are read."""


@dataclass(frozen=True)
class RawPrompt:
    """A prompt as read from a file: its place, and its values, which may have any type. None: nothing is there."""

    source: str
    prompt: Any
    negative_prompt: Any = None
    detail_mask: Any = None
    row: int = 0
    """Line of the file (the last one of a row of several lines), or row of the table, from 1."""


def read_prompts(path: str) -> Iterator[RawPrompt]:
    """The raw prompts in a file, with their lines. `path` may be any URL that `open_file` takes.

    Raises UserError for a missing, empty, binary or malformed file, naming the line where there is one.
    """
    place = without_credentials(path)
    _, dot, extension = path.rpartition("/")[2].lower().rpartition(".")
    suffix = dot + extension
    if suffix in COMPRESSED:
        raise UserError(f"{place}: the prompts file is compressed; unpack it first")
    if suffix not in SUFFIXES:
        if "://" not in path and os.path.isdir(path):
            raise UserError(f"{place}: is a folder; give a file of prompts ({', '.join(SUFFIXES)})")
        raise UserError(f"{place}: unknown kind of prompts file; known: {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        with _opened(path) as file:
            return _from_parquet(file.read(), place)
    lines = _lines(path)
    for blank, line in enumerate(lines):
        if line.strip():
            whole = chain(repeat("\n", blank), [line], lines)
            if suffix == ".csv":
                return _from_csv(whole, place)
            return _from_jsonl(whole, place) if suffix == ".jsonl" else _from_text(whole, place)
    raise UserError(f"{place}: the prompts file is empty; write at least one prompt into it")


@contextmanager
def _opened(path: str) -> Iterator[io.BufferedReader]:
    """Open a prompts file. Raises UserError if there is no such file."""
    place = without_credentials(path)
    folder, name = open_file(path)
    missing = UserError(f"{place}: no such prompts file; check the path")
    with explained(path):
        if folder.local and not (local := Path(folder.full(name))).is_file():
            if not local.exists():
                raise missing
            what = "a folder" if local.is_dir() else "no regular file"
            raise UserError(f"{place}: is {what}; give a file of prompts ({', '.join(SUFFIXES)})")
        try:
            file: Any = folder.open(name, PART_BYTES)
        except FileNotFoundError:
            raise missing from None
        with file:
            yield io.BufferedReader(file, READ_BYTES)


def _lines(path: str) -> Iterator[str]:
    """Yield the lines of a text file with their line ends. Raises UserError naming the first line that is not text."""
    place = without_credentials(path)
    with _opened(path) as file:
        # a byte that is not UTF-8 becomes a surrogate, so that its line is known
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        for number, line in enumerate(text, start=1):
            try:
                line.encode()
            except UnicodeEncodeError:
                raise UserError(f"{place}: line {number}: not UTF-8 text; save the file as UTF-8") from None
            if "\0" in line:
                raise UserError(
                    f"{place}: line {number}: not a text file (it holds NUL bytes); save the prompts as UTF-8 text"
                )
            yield line


def _from_text(lines: Iterable[str], place: str) -> Iterator[RawPrompt]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield RawPrompt(f"{place}:{number}", line.rstrip("\r\n"))


def _from_csv(lines: Iterable[str], place: str) -> Iterator[RawPrompt]:
    csv.field_size_limit(MAX_CELL_CHARACTERS)  # the default counts for columns that are not read, too
    reader = csv.reader(lines, strict=True)
    ended = 0  # line with the end of the last row
    try:
        names = next((row for row in reader if any(map(str.strip, row))), [])
        columns = _columns(names, place)
        width = max(position for position, name in enumerate(names, start=1) if name.strip())
        ended = reader.line_num
        for row in reader:
            number = reader.line_num
            if any(map(str.strip, row[width:])):
                what = "more cells than columns" if len(row) > len(names) else "text in a last column that has no name"
                raise UserError(f"{place}: line {number}: {what}; put prompts that hold commas in double quotes")
            if row:
                cells = {name: row[position] for name, position in columns.items() if position < len(row)}
                yield _raw(f"{place}:{number}", cells, number)
            ended = number
    except csv.Error as error:
        unclosed = "unexpected end" in str(error)
        number = ended + 1 if unclosed else reader.line_num
        reason = "a quote in this row is never closed" if unclosed else error
        raise UserError(f"{place}: line {number}: not valid CSV ({reason})") from None


def _from_jsonl(lines: Iterable[str], place: str) -> Iterator[RawPrompt]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            # a dictionary would hide names that are there twice, and an integer may have too many digits for Python
            row = json.loads(line, object_pairs_hook=tuple, parse_int=float)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            message = 'not valid JSON; each line is one object such as {"prompt": "..."}'
            raise UserError(f"{place}: line {number}: {message} ({reason})") from None
        names = [name for name, _ in row] if isinstance(row, tuple) else []
        if "prompt" not in names:
            raise UserError(f'{place}: line {number}: no "prompt"; each line is one object such as {{"prompt": "..."}}')
        _check_once(names, f"{place}: line {number}")
        yield _raw(f"{place}:{number}", dict(row), number)


def _from_parquet(data: bytes, place: str) -> Iterator[RawPrompt]:
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        names = file.schema_arrow.names
        columns = _columns(names, place)
        for name, position in columns.items():
            if names[position] != name:
                raise UserError(f"{place}: the column {names[position]!r} has blanks around its name; name it {name!r}")
        forget_tables()
        size = BATCH_ROWS if COLUMN in columns else PARQUET_BATCH_ROWS
        number = 0
        for batch in file.iter_batches(size, columns=list(columns)):  # a few kilobytes may decode to any size
            cells = {name: batch.column(name) for name in columns}
            for position in range(len(batch)):
                number += 1
                values = {name: _value(cells[name][position]) for name in columns}
                yield _raw(f"{place}: row {number}", values, number)
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = one_line(first_line(error))
        raise UserError(f"{place}: not a readable Parquet file ({reason}); write it again") from None


def _value(cell: pa.Scalar) -> Any:
    """The value of a cell in Parquet. Bytes that are not UTF-8 become surrogates in its text. A kind that has no value
    of its own in Python, or only some (such as times), is represented by its type."""
    if isinstance(cell, pa.DictionaryScalar):
        cell = cell.value
    kind, types = cell.type, pa.types
    if not cell.is_valid:
        return None
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return str(cell.as_buffer(), "utf-8", "surrogateescape")
    plain = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    numbers = (types.is_floating, types.is_integer, types.is_boolean)
    return cell.as_py() if any(is_kind(kind) for is_kind in plain + numbers) else kind


def _raw(source: str, values: dict[str, Any], row: int) -> RawPrompt:
    found = (values.get(name) for name in COLUMNS)
    prompt, negative, mask = (None if is_absent(value) else value for value in found)
    return RawPrompt(source, prompt, negative, mask, row)


def _columns(names: list[str], place: str) -> dict[str, int]:
    """Column -> position, of the columns that are read. Names may have blanks and byte order marks around them.

    Raises UserError if there is no column `prompt`, or a column twice.
    """
    clean = [name.replace("\ufeff", "").strip() for name in names]
    if "prompt" not in clean:
        shown = one_line(", ".join(clean))[:SHOWN_CHARACTERS] or "none"
        if other := next((called for mark, called in SEPARATORS.items() if _separated("".join(clean), mark)), ""):
            raise UserError(
                f"{place}: has no column 'prompt' (found: {shown}); separate the columns by commas, not by {other}"
            )
        raise UserError(f"{place}: has no column 'prompt' (found: {shown}); name the column with the prompts so")
    _check_once(clean, place)
    return {name: clean.index(name) for name in COLUMNS if name in clean}


def _separated(header: str, mark: str) -> bool:
    """Whether the first line of a file is a header whose columns are separated by `mark`. Excel may say so there."""
    return header.lower() == f"sep={mark}" or "prompt" in map(str.strip, header.replace('"', "").split(mark))


def _check_once(names: list[str], place: str) -> None:
    for name in COLUMNS:
        if names.count(name) > 1:
            raise UserError(f"{place}: has {name!r} {names.count(name)} times; keep one")
