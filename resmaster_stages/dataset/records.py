"""Writes records (frozen dataclasses) as JSON and reads them back.

Invariant: a record that is read has exactly the types of its class, so its users need not check them.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

Record = TypeVar("Record")


def record_text(record: Any) -> bytes:
    """A record as sorted, indented JSON that ends with a newline."""
    return (json.dumps(asdict(record), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def parse_record(kind: type[Record], text: bytes) -> Record:
    """The inverse of `record_text`. Raises ValueError, in one line, for any other text."""
    try:
        record: Record = _adapter(kind).validate_json(text, strict=True)  # type: ignore[arg-type]
        return record
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "JSON"
        raise ValueError(f"{place}: {first['msg']}") from error


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
