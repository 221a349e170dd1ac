"""A set of digests that takes little memory: 18 to 27 bytes per digest, where Python's `set` takes 100 and more.

The digests must be uniformly distributed, as those of cryptographic hashes are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

DIGEST_BYTES = 12
TABLES = 256
FIRST_SLOTS = 8
_EMPTY = bytes(DIGEST_BYTES)  # practically no hash has this value


def digest_of(name: str) -> bytes:
    """The blake2b digest of a name, for a `DigestSet`."""
    return hashlib.blake2b(name.encode(), digest_size=DIGEST_BYTES).digest()


class DigestSet:
    """A set of 12-byte digests in open hash tables, one table per first byte. Tables grow one at a time, by half."""

    def __init__(self, digests: Iterable[bytes] = ()) -> None:
        self._tables = [bytearray(DIGEST_BYTES * FIRST_SLOTS) for _ in range(TABLES)]
        self._counts = [0] * TABLES
        for digest in digests:
            self.add(digest)

    def __len__(self) -> int:
        return sum(self._counts)

    def __contains__(self, digest: bytes) -> bool:
        table = self._tables[digest[0]]
        place = _place(table, digest)
        return table[place : place + DIGEST_BYTES] == digest

    def add(self, digest: bytes) -> bool:
        """Add a digest. Returns whether it is new."""
        number = digest[0]
        table = self._tables[number]
        place = _place(table, digest)
        if table[place : place + DIGEST_BYTES] == digest:
            return False
        table[place : place + DIGEST_BYTES] = digest
        self._counts[number] += 1
        if 3 * DIGEST_BYTES * self._counts[number] > 2 * len(table):
            self._tables[number] = _grown(table)
        return True


def _place(table: bytearray, digest: bytes) -> int:
    """The position of a digest in a table, or the free position where it belongs."""
    slots = len(table) // DIGEST_BYTES
    slot = int.from_bytes(digest[1:9]) % slots
    while table[(place := DIGEST_BYTES * slot) : place + DIGEST_BYTES] not in (digest, _EMPTY):
        slot = (slot + 1) % slots
    return place


def _grown(table: bytearray) -> bytearray:
    larger = bytearray(DIGEST_BYTES * (len(table) // DIGEST_BYTES * 3 // 2))
    for start in range(0, len(table), DIGEST_BYTES):
        digest = bytes(table[start : start + DIGEST_BYTES])
        if digest != _EMPTY:
            place = _place(larger, digest)
            larger[place : place + DIGEST_BYTES] = digest
    return larger
