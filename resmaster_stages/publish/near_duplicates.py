"""Finds near-duplicates over a whole dataset: samples that look nearly the same as an earlier sample.

Two samples are *close* if their perceptual hashes differ by at most so many bits or, if asked for, if the cosine of
their CLIP features is at least so large. Samples are taken in the plan's order. A sample joins the first *original*
that is close to it. A sample that is close to no original is an original itself.

Invariants:
- Every near-duplicate is close to the original that it names. Groups do not chain: of A, B and C with only A and B, and
  B and C close, B joins A, and C stays an original.
- No two originals are close, so the samples without the flag hold no near-duplicates.
- The result depends on the samples and their order alone, not on batches or shards. No pair of close samples is missed.
- Memory grows by some 50 bytes per original (docs/scale.md). CLIP features of originals are in a file on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.chain import Chain
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.errors import ShardError
from resmaster_stages.redaction import quoted
from resmaster_stages.storage.arrays import Arrays, decode_arrays
from resmaster_stages.storage.store_errors import explained

FLAG = "near_duplicate"
OF = "near_duplicate_of"
"""The column with the key of the original."""

LOOK = "high_res.r"
"""The array of features that is compared: of the whole large image."""

BATCH = 1024
"""Samples that are looked up together. They are compared with each other, too."""
WIDEST_BAND_BITS = 16
CANDIDATES = 1 << 18
"""Pairs of hashes that are compared at once."""
BLOCK = 8192
"""Features of originals that are in memory at a time."""
ROUNDING = 1e-4
"""More than the rounding error of a cosine in float32. Cosines this near to the limit are computed in float64."""
PAIRS = 4096
"""Cosines that are computed in float64 at once."""

NONE = np.iinfo(np.int64).max
"""In place of the number of an original: none is close."""

Hashes = NDArray[np.uint64]
Numbers = NDArray[np.int64]
Rows = list[dict[str, Any]]


def flag_near_duplicates(
    dataset: Dataset, shards: Iterable[tuple[Chain, Rows]], scratch: Path
) -> Iterator[tuple[Chain, Rows]]:
    """Pass on shards with their rows of the manifest, with the flag and `near_duplicate_of` filled in.

    Images without a hash and blank images are neither originals nor near-duplicates. scratch: a folder for features.
    Raises ShardError if an object of features is gone or damaged.
    """
    quality = dataset.config.quality
    with opened(quality.near_duplicate_bits, quality.near_duplicate_cosine, scratch) as originals:
        for batch in _batches(shards):
            rows = [row for _, own in batch for row in own]
            looks: dict[str, NDArray[Any]] = {}
            if originals.features is not None:
                for chain, own in batch:
                    looks |= _features(dataset, chain.committed["quality"], own)
            _flag(rows, originals, looks)
            yield from batch


def _batches(shards: Iterable[tuple[Chain, Rows]]) -> Iterator[list[tuple[Chain, Rows]]]:
    """Whole shards together, with `BATCH` rows or more, except the last ones."""
    batch: list[tuple[Chain, Rows]] = []
    count = 0
    for shard in shards:
        batch.append(shard)
        count += len(shard[1])
        if count >= BATCH:
            yield batch
            batch, count = [], 0
    if batch:
        yield batch


def _flag(rows: Rows, originals: Originals, looks: dict[str, NDArray[Any]]) -> None:
    seen = [row for row in rows if row["phash"] and "blank" not in row["flags"]]
    for start in range(0, len(seen), BATCH):
        part = seen[start : start + BATCH]
        keys = [row["key"] for row in part]
        hashes = np.array([int(row["phash"], 16) for row in part], np.uint64)
        features = unit([looks[key] for key in keys]) if looks else None
        for row, original in zip(part, originals.join(keys, hashes, features), strict=True):
            if original is not None:
                row[OF], row["flags"] = original, [*row["flags"], FLAG]


def _features(dataset: Dataset, receipt: Receipt, rows: Rows) -> dict[str, NDArray[Any]]:
    """Key -> features of the large image, for the samples in `rows`."""
    if not rows:
        return {}
    name = layout.features_object(receipt.stage, receipt.shard, receipt.attempt)
    try:
        with explained(dataset.folder.url_of(name)), dataset.folder.open(name) as file:
            found: dict[str, Arrays] = decode_arrays(file, name, (LOOK,))
        return {row["key"]: found[row["key"]][LOOK] for row in rows}
    except FileNotFoundError:
        place = quoted(dataset.url)
        raise ShardError(f"{name} is gone; run: resmaster verify {place}, then: resmaster repair {place}") from None
    except KeyError as error:
        raise ShardError(f"{name}: lacks {error.args[0]}, which its commit record counts") from None


def unit(features: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """Feature vectors [N, D] scaled to unit length. A vector of zeros stays zeros."""
    values = np.stack(features).astype(np.float64)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return (values / np.where(length > 0, length, 1)).astype(np.float32)


@contextmanager
def opened(bits: int, cosine: float | None, scratch: Path) -> Iterator[Originals]:
    """No originals yet. bits, cosine: as in `QualityConfig`. Within the block, features are kept in a file in
    `scratch`."""
    with ExitStack() as files:
        features = None
        if cosine is not None:
            features = FeatureIndex(cosine, files.enter_context((scratch / "originals.f32").open("w+b")))
        yield Originals(HashIndex(bits), features)


class Originals:
    """The originals so far, numbered from 0."""

    def __init__(self, hashes: HashIndex, features: FeatureIndex | None = None) -> None:
        self.hashes, self.features = hashes, features
        self._keys = bytearray()
        self._key_bytes = 1

    def join(self, keys: Sequence[str], hashes: Hashes, features: NDArray[np.float32] | None) -> list[str | None]:
        """The key of the original of each sample, or None for a sample that is a new original.

        keys: hexadecimal, all of one length. features: [N, D] of unit length; None if they are not compared.
        """
        found = self.hashes.first(hashes)
        if self.features is not None and features is not None:
            found = np.minimum(found, self.features.first(features))
        open_ = np.flatnonzero(found == NONE)
        close = self.hashes.close(hashes[open_])
        if self.features is not None and features is not None:
            close |= self.features.close(features[open_])
        joined: dict[int, int] = {}  # sample -> original among the samples
        for first, later in np.argwhere(np.triu(close, 1)).tolist():  # row by row, so `first` is decided when it comes
            if first not in joined:
                joined.setdefault(later, first)
        new = [at for number, at in enumerate(open_.tolist()) if number not in joined]
        result = [None if number == NONE else self._key(number) for number in found.tolist()]
        for later, first in joined.items():
            result[open_[later]] = keys[open_[first]]
        self._add([keys[at] for at in new], hashes[new], None if features is None else features[new])
        return result

    def _add(self, keys: Sequence[str], hashes: Hashes, features: NDArray[np.float32] | None) -> None:
        for key in keys:
            self._key_bytes = len(key) // 2
            self._keys += bytes.fromhex(key)
        self.hashes.add(hashes)
        if self.features is not None and features is not None:
            self.features.add(features)

    def _key(self, number: int) -> str:
        return self._keys[number * self._key_bytes : (number + 1) * self._key_bytes].hex()


class HashIndex:
    """Finds the first of many 64-bit hashes that differs from a hash by at most `bits` bits.

    Hashes are cut into `bits` + 1 bands. Two hashes that differ by at most `bits` bits are equal in one band at least
    (pigeonhole), so only hashes that share a band are compared. The hashes are in runs, whose sizes fall from the first
    run to the last. Each run is sorted by each band.
    """

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._width = min(WIDEST_BAND_BITS, 64 // (bits + 1))
        self._runs: list[_Run] = []

    def add(self, hashes: Hashes) -> None:
        """Add hashes behind those that are there. Runs that are no longer than those behind them are merged."""
        if not len(hashes):
            return
        start = self._runs[-1].end if self._runs else 0
        while self._runs and len(self._runs[-1].hashes) <= len(hashes):
            earlier = self._runs.pop()
            start, hashes = earlier.start, np.concatenate([earlier.hashes, hashes])
            del earlier  # before the next run takes memory
        bands = (self._band(hashes, band) for band in range(self._bits + 1))
        self._runs.append(_run(start, hashes, bands, self._width))

    def first(self, hashes: Hashes) -> Numbers:
        """The number of the first hash that is close to each of `hashes`, or `NONE`."""
        found = np.full(len(hashes), NONE)
        for run in self._runs:  # in the order of their numbers: what one finds, the next cannot better
            left = np.flatnonzero(found == NONE)
            if len(left):
                found[left] = self._first_in(run, hashes[left])
        return found

    def close(self, hashes: Hashes) -> NDArray[np.bool_]:
        """Which pairs [N, N] of `hashes` are close."""
        return np.bitwise_count(hashes[:, None] ^ hashes[None]) <= self._bits

    def _first_in(self, run: _Run, hashes: Hashes) -> Numbers:
        found = np.full(len(hashes), NONE)
        for band, (order, offsets) in enumerate(run.bands):
            values = self._band(hashes, band).astype(np.int64)
            starts = offsets[values].astype(np.int64)
            counts = offsets[values + 1].astype(np.int64) - starts
            pieces = np.flatnonzero(np.diff(np.cumsum(counts) // CANDIDATES)) + 1
            for queries in np.split(np.arange(len(hashes)), pieces):
                of, at = _spread(starts[queries], counts[queries])
                of, candidates = queries[of], order[at]
                close = np.bitwise_count(run.hashes[candidates] ^ hashes[of]) <= self._bits
                np.minimum.at(found, of[close], run.start + candidates[close].astype(np.int64))
        return found

    def _band(self, hashes: Hashes, band: int) -> NDArray[np.uint16]:
        mask = np.uint64((1 << self._width) - 1)
        return ((hashes >> np.uint64(band * self._width)) & mask).astype(np.uint16)


@dataclass(frozen=True, eq=False)
class _Run:
    """Hashes with the numbers from `start` on."""

    start: int
    hashes: Hashes
    bands: list[tuple[NDArray[np.uint32], NDArray[np.uint32]]]
    """For each band, the places of the hashes sorted by the band's value, and where each value begins."""

    @property
    def end(self) -> int:
        return self.start + len(self.hashes)


def _run(start: int, hashes: Hashes, bands: Iterable[NDArray[np.uint16]], width: int) -> _Run:
    tables = []
    for values in bands:
        offsets = np.zeros((1 << width) + 1, np.uint32)
        np.cumsum(np.bincount(values, minlength=1 << width), out=offsets[1:])
        tables.append((np.argsort(values, kind="stable").astype(np.uint32), offsets))
    return _Run(start, hashes, tables)


def _spread(starts: Numbers, counts: Numbers) -> tuple[Numbers, Numbers]:
    """(number of the range, place) for every place in ranges of `counts` places from `starts` on."""
    of = np.repeat(np.arange(len(counts)), counts)
    before = np.cumsum(counts) - counts
    return of, np.arange(len(of)) - np.repeat(before - starts, counts)


class FeatureIndex:
    """Finds the first of many feature vectors of unit length whose cosine with a vector is at least `cosine`.

    The vectors are in a file, and are compared with all that are in it: the work grows with the square of their number.
    """

    def __init__(self, cosine: float, file: Any) -> None:
        self._cosine = cosine
        self._file = file
        self._count = 0

    def add(self, features: NDArray[np.float32]) -> None:
        """Add vectors [N, D] behind those that are there."""
        self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(features).tobytes())
        self._file.flush()
        self._count += len(features)

    def first(self, features: NDArray[np.float32]) -> Numbers:
        """The number of the first vector that is close to each of `features`, or `NONE`."""
        found = np.full(len(features), NONE)
        self._file.seek(0)
        for start in range(0, self._count, BLOCK):
            size = min(BLOCK, self._count - start)
            block = np.fromfile(self._file, np.float32, size * features.shape[1]).reshape(size, -1)
            left = np.flatnonzero(found == NONE)
            if not len(left):
                break
            of, at = self._close_pairs(features[left], block)
            np.minimum.at(found, left[of], start + at)
        return found

    def close(self, features: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which pairs [N, N] of `features` are close."""
        close = np.zeros((len(features), len(features)), bool)
        close[self._close_pairs(features, features)] = True
        return close

    def _close_pairs(self, a: NDArray[np.float32], b: NDArray[np.float32]) -> tuple[Numbers, Numbers]:
        """The places in `a` and `b` of all close pairs. Rounding does not depend on what else is in `a` and `b`."""
        of, at = np.nonzero(a @ b.T >= self._cosine - ROUNDING)
        sure = np.empty(len(of), bool)
        for start in range(0, len(of), PAIRS):
            part = slice(start, start + PAIRS)
            products = a[of[part]].astype(np.float64) * b[at[part]]
            sure[part] = products.sum(axis=1) >= self._cosine
        return of[sure], at[sure]
