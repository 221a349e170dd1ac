"""Describes how samples were computed together (`Batch`), and puts the batches of a shard into its commit record.

Devices round, and how they round depends on what they compute together. So a damaged shard is computed again in just
the batches that its record holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import ConfigDict, Field, PositiveInt, with_config

MOST_THREADS = 4096
"""A record with more is damaged. So many threads could not be started, and the attempt would end the process."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Batch:
    """Samples that were computed in the same way."""

    slot: PositiveInt
    """Samples per slot: so many were given to the stage together. Slots are counted from the first sample."""
    size: PositiveInt | None = None
    """Samples, patches or views per call of the device. None: unknown, because the stage left it to the device."""
    threads: Annotated[PositiveInt, Field(le=MOST_THREADS)] | None = None
    """Threads with which torch computed on the host. None: torch was not loaded."""
    lost: tuple[str, ...] = ()
    """Planned samples that an earlier stage had lost, so that they had no place in a slot. Empty where a slot has one
    sample."""
    keys: tuple[str, ...] = ()
    """The samples. Empty: all good samples of the shard that no other batch names."""

    def spelled(self) -> str:
        """The batch in words, without its samples."""
        together = "alone" if self.slot == 1 else f"in a slot of {self.slot}"
        size = "a batch left to the device" if self.size is None else f"a batch of {self.size}"
        return f"{together}, {size}" + (f", torch threads {self.threads}" if self.threads else "")


def recorded(batch_of: Mapping[str, Batch], keys: Sequence[str]) -> tuple[Batch, ...]:
    """The batches of the good samples `keys` for a commit record; the most frequent one comes first.

    Its samples need not be named if the batch of every sample is known.
    """
    samples: dict[Batch, list[str]] = {}
    for key in keys:
        if key in batch_of:
            samples.setdefault(batch_of[key], []).append(key)
    batches = [replace(each, keys=tuple(own)) for each, own in samples.items()]
    batches.sort(key=lambda each: -len(each.keys))
    if batches and sum(len(each.keys) for each in batches) == len(keys):
        batches[0] = replace(batches[0], keys=())
    return tuple(batches)


def batch_of_each(batches: Iterable[Batch], keys: Iterable[str]) -> dict[str, Batch]:
    """The inverse of `recorded`: key -> batch without keys. A record that holds no batches gives none."""
    named: dict[str, Batch] = {}
    usual: Batch | None = None
    for each in batches:
        if not each.keys:
            usual = each
        named.update(dict.fromkeys(each.keys, replace(each, keys=())))
    return {key: found for key in keys if (found := named.get(key, usual))}


def unambiguous(batches: tuple[Batch, ...]) -> tuple[Batch, ...]:
    """`batches`, if they give each sample one batch. Raises ValueError otherwise."""
    keys = [key for each in batches for key in each.keys]
    if len(keys) != len(set(keys)) or sum(not each.keys for each in batches) > 1:
        raise ValueError("a sample has two batches")
    return batches
