"""Reads prompts from files: .txt (one prompt per line), .csv, .jsonl and .parquet.

A file that cannot be read raises a UserError that names file and line."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from resmaster_stages.errors import UserError
from resmaster_stages.redaction import without_credentials
from resmaster_stages.storage.filesystem import explained
from resmaster_stages.storage.masks import BATCH_ROWS, COLUMN, forget_tables

PARQUET_BATCH_ROWS = 10_000


READ_BYTES = 1 << 20


SUFFIXES = (".txt", ".csv", ".jsonl", ".parquet")


_LONE_RETURN = re.compile(r"(?<=\r)(?!\n|\Z)")
"""A position after a lone carriage return, where a line of CSV also ends."""


@dataclass(frozen=True)
class RawPrompt:
    """A prompt as read from a file: its place, and its values, which may have any type."""

    source: str
    prompt: Any
    negative_prompt: Any = None
    detail_mask: Any = None
    row: int = 0
    """Line of the file, or row of the table, from 1."""


def read_prompts(path: str) -> Iterator[RawPrompt]:
    """The raw prompts in a file, with their lines. `path` may be any fsspec URL.

    Raises UserError for a missing, empty, binary or malformed file, naming the line where there is one.
    """
    place = without_credentials(path)
    suffix = "." + path.rsplit(".", 1)[-1].lower() if "." in path.rsplit("/", 1)[-1] else ""
    if suffix not in SUFFIXES:
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
    """Open a prompts file. Raises UserError if it does not exist or its path is invalid."""
    place = without_credentials(path)
    with explained(path), ExitStack() as stack:
        try:
            file = stack.enter_context(fsspec.open(path, "rb"))
        except FileNotFoundError:
            raise UserError(f"{place}: no such prompts file; check the path") from None
        except ValueError as error:
            raise UserError(f"{place}: cannot be opened ({error}); give a path or an s3:// URL") from None
        yield io.BufferedReader(file, READ_BYTES)


def _lines(path: str) -> Iterator[str]:
    """Yield the lines of a text file with their line ends. Raises UserError naming the first line that is not text."""
    place = without_credentials(path)
    with _opened(path) as file:
        for number, data in enumerate(file, start=1):
            try:
                line = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
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
    ends = (part for line in lines for part in _LONE_RETURN.split(line))
    reader = csv.DictReader(ends, strict=True, restkey="")
    try:
        _check_columns([name.strip() for name in reader.fieldnames or []], place)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        for row in reader:
            if row.get(""):
                message = "more cells than columns; put prompts that hold commas in double quotes"
                raise UserError(f"{place}: line {reader.line_num}: {message}")
            number = reader.line_num
            yield RawPrompt(
                f"{place}:{number}", row["prompt"] or "", row.get("negative_prompt"), row.get(COLUMN), number
            )
    except csv.Error as error:
        raise UserError(f"{place}: line {reader.reader.line_num}: not valid CSV ({error})") from None


def _from_jsonl(lines: Iterable[str], place: str) -> Iterator[RawPrompt]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            message = 'not valid JSON; each line is one object such as {"prompt": "..."}'
            raise UserError(f"{place}: line {number}: {message} ({reason})") from None
        if not isinstance(row, dict) or "prompt" not in row:
            raise UserError(f'{place}: line {number}: no "prompt"; each line is one object such as {{"prompt": "..."}}')
        yield RawPrompt(f"{place}:{number}", row["prompt"], row.get("negative_prompt"), row.get(COLUMN), number)


def _from_parquet(data: bytes, place: str) -> Iterator[RawPrompt]:
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        names = file.schema_arrow.names
        _check_columns(names, place)
        columns = [name for name in ("prompt", "negative_prompt", COLUMN) if name in names]
        forget_tables()
        size = BATCH_ROWS if COLUMN in names else PARQUET_BATCH_ROWS
        number = 0
        for batch in file.iter_batches(size, columns=columns):  # a few kilobytes may decode to any size
            for row in batch.to_pylist():
                number += 1
                yield RawPrompt(
                    f"{place}: row {number}", row["prompt"], row.get("negative_prompt"), row.get(COLUMN), number
                )
    except (pa.ArrowException, OSError) as error:
        first_line = str(error).split("\n", 1)[0]
        raise UserError(f"{place}: not a readable Parquet file ({first_line}); write it again") from None


def _check_columns(names: list[str], place: str) -> None:
    if "prompt" not in names:
        shown = ", ".join(names) or "none"
        raise UserError(f"{place}: has no column 'prompt' (found: {shown}); name the column with the prompts so")
