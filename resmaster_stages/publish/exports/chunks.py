"""Packs records into chunks, the layout that MDS and LitData share.

A chunk is the number n of its records, n + 1 offsets of where records begin and end, perhaps a header, and the records.
Numbers are little-endian and have 32 bits.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

CHUNK_BYTES = 1 << 26
"""A chunk ends before the record with which it would be larger. A single record may be larger."""


@dataclass(frozen=True)
class Chunk:
    """A packed chunk."""

    data: bytes
    samples: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def chunks(records: Iterable[bytes], header: bytes = b"") -> Iterator[Chunk]:
    """The records in chunks. One chunk is held at a time."""
    held: list[bytes] = []
    for record in records:
        if held and sum(map(len, held)) + len(record) > CHUNK_BYTES:
            yield _packed(held, header)
            held = []
        held.append(record)
    if held:
        yield _packed(held, header)


def _packed(records: Sequence[bytes], header: bytes) -> Chunk:
    start = 4 * (len(records) + 2) + len(header)
    offsets = accumulate(map(len, records), initial=start)
    head = numbers(len(records), *offsets)
    return Chunk(b"".join([head, header, *records]), len(records))


def record(fields: Sequence[bytes]) -> bytes:
    """Fields of any length as one record: their lengths, then the fields."""
    return numbers(*map(len, fields)) + b"".join(fields)


def numbers(*values: int) -> bytes:
    """32-bit numbers."""
    return struct.pack(f"<{len(values)}I", *values)
