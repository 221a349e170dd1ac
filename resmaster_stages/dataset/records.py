"""Writes records (frozen dataclasses) as JSON and reads them back.

The last field of a record is `sha256`, the digest of all bytes before that field. So any change to a record is noticed
by everyone who reads it.

Invariant: a record that is read has exactly the types of its class, so its users need not check them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

Record = TypeVar("Record")

NOT_IF_EMPTY: Mapping[str, bool] = MappingProxyType({"not if empty": True})
"""Metadata of a field that is not written while it is empty, so that records without it stay as they were."""
CHANGED = "sha256: differs, so the file was changed since it was written"
NO_DIGEST = "sha256: is not at the end, so the file was cut off, or changed since it was written"
_SIGNED = re.compile(rb'(.*),\n +"sha256": "([0-9a-f]{64})"\n\}\n', re.DOTALL)


def record_text(record: Any) -> bytes:
    """A record as sorted, indented JSON that ends with a newline."""
    empty = {each.name for each in fields(record) if each.metadata == NOT_IF_EMPTY and not getattr(record, each.name)}
    return signed({name: value for name, value in asdict(record).items() if name not in empty}, indent=1)


def signed(values: dict[str, Any], indent: int) -> bytes:
    """Values as sorted, indented JSON, with the digest of the text as the last field."""
    text = json.dumps(values, indent=indent, sort_keys=True, ensure_ascii=False).removesuffix("\n}").encode()
    digest = hashlib.sha256(text).hexdigest()
    return text + f',\n{" " * indent}"sha256": "{digest}"\n}}\n'.encode()


def unsigned(text: bytes) -> bytes:
    """The JSON without the digest that `signed` added. Raises ValueError if it is not there, or if the text does not
    fit it."""
    found = _SIGNED.fullmatch(text)
    if found is None:
        raise ValueError(NO_DIGEST)
    if hashlib.sha256(found[1]).hexdigest() != found[2].decode():
        raise ValueError(CHANGED)
    return found[1] + b"\n}"


def parse_record(kind: type[Record], text: bytes) -> Record:
    """The inverse of `record_text`. Raises ValueError, in one line, for any other text."""
    return parse_values(kind, unsigned(text))


def parse_values(kind: type[Record], text: bytes) -> Record:
    """A record from JSON without a digest. Raises ValueError, in one line, unless it has exactly the class's types."""
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
