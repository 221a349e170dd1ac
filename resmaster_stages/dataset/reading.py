"""Reads the samples of a shard with the committed outputs of the stages.

Invariant: objects are found by their commit record, and each is checked against the sha256 in the record.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, overload

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.chain import Chain, read_chain
from resmaster_stages.dataset.commit import Receipt, StoredObject
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.plan import PlannedSample
from resmaster_stages.dataset.sample import EncodedImage, Output, Sample
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import PlanError, ShardError, UserError
from resmaster_stages.redaction import quoted
from resmaster_stages.storage.arrays import Arrays, decode_arrays
from resmaster_stages.storage.scratch import scratch_folder
from resmaster_stages.storage.shards import Entry, read_index, read_member
from resmaster_stages.storage.sources import MASK_EXTENSION
from resmaster_stages.storage.store_errors import is_damage
from resmaster_stages.storage.tables import decode_table

Rows = list[dict[str, Any]]


class Outputs(Mapping[str, Output]):
    """Key -> the committed output of a sample, byte for byte. Files are read from a local copy when they are used."""

    def __init__(
        self,
        tar: IO[bytes] | None,
        entries: Mapping[str, Entry],
        rows: Mapping[str, Rows],
        arrays: Callable[[], Mapping[str, Arrays]] = dict,
    ) -> None:
        self._tar, self._entries, self._rows, self._arrays = tar, entries, rows, cache(arrays)

    @property
    def _held(self) -> Mapping[str, Any]:
        return self._entries if self._tar else self._rows

    def __getitem__(self, key: str) -> Output:
        if key not in self:
            raise KeyError(key)
        files = {name: self.file(key, name) for name in self._entries[key].members} if self._tar else {}
        return Output(key, files=files, rows=self.rows(key), arrays=self._arrays().get(key, {}))

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def rows(self, key: str) -> Rows:
        """The rows of a sample without the key; empty for a tar."""
        return self._rows.get(key, [])

    def file(self, key: str, extension: str) -> bytes:
        """The content of one file of a sample in a tar."""
        assert self._tar is not None
        return read_member(self._tar, self._entries[key].members[extension])

    def image(self, key: str) -> EncodedImage:
        """The image of a sample in a tar."""
        extension, _ = self._entries[key].image
        return EncodedImage(self.file(key, extension), extension, json.loads(self.file(key, "json")))

    def mask(self, key: str) -> EncodedImage | None:
        """The detail mask of a sample in a tar, or None."""
        member = self._entries[key].members.get(MASK_EXTENSION)
        return EncodedImage(self.file(key, MASK_EXTENSION), "png", {"key": member.name}) if member else None


class ShardSamples(Sequence[Sample]):
    """Samples of a shard in the plan's order, with the outputs of stages. Images are read when they are used."""

    def __init__(
        self,
        planned: Sequence[PlannedSample],
        outputs: Mapping[str, Outputs],
        without: Collection[str] = (),
        takes: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """without: keys of planned samples that are left out. takes: key -> take, if it is not 0."""
        self.planned, self.without = planned, frozenset(without)
        self._outputs, self._takes = outputs, takes

    def __len__(self) -> int:
        return len(self.planned)

    @overload
    def __getitem__(self, position: int) -> Sample: ...

    @overload
    def __getitem__(self, position: slice) -> list[Sample]: ...

    def __getitem__(self, position: int | slice) -> Sample | list[Sample]:
        if isinstance(position, slice):
            return [self[index] for index in range(*position.indices(len(self)))]
        planned = self.planned[position]
        low_res, high_res = self._outputs.get("low_res"), self._outputs.get("high_res")
        return Sample(
            key=planned.key,
            index=planned.index,
            prompt=planned.prompt,
            negative_prompt=planned.negative_prompt,
            height=planned.height,
            width=planned.width,
            replica=planned.replica,
            source=planned.source,
            low_res=low_res.image(planned.key) if low_res else None,
            detail_mask=low_res.mask(planned.key) if low_res else None,
            captions=tuple(sorted(self.rows("captions", planned.key), key=lambda row: (row["row"], row["col"]))),
            high_res=high_res.image(planned.key) if high_res else None,
            take=self._takes.get(planned.key, 0),
        )

    def keys(self) -> list[str]:
        """The keys in order, without reading an image."""
        return [planned.key for planned in self.planned]

    def rows(self, stage: str, key: str) -> Rows:
        """The rows of a sample in a stage's table; empty if the stage was not loaded."""
        return self._outputs[stage].rows(key) if stage in self._outputs else []


@contextmanager
def shard_samples(dataset: Dataset, shard: int, stages: Sequence[str]) -> Iterator[ShardSamples]:
    """The samples of a shard with the verified outputs of `stages`, usable within the block.

    Samples that one of the stages, or a stage before them, has lost are left out, and so are those that were made again
    in some of these stages only. Raises PlanError if one of the stages is not committed, and ShardError if an object is
    gone or damaged.
    """
    last = max(stages, key=list(dataset.hashes).index, default=None)
    chain = read_chain(dataset, shard, last) if last else Chain({})
    with chosen_samples(dataset, shard, chain, stages, chain.unfinished(), chain.made()) as samples:
        yield samples


@contextmanager
def chosen_samples(
    dataset: Dataset,
    shard: int,
    chain: Chain,
    stages: Sequence[str],
    without: Collection[str],
    takes: Mapping[str, int],
) -> Iterator[ShardSamples]:
    """The planned samples of a shard, except the keys in `without`, with the verified outputs of `stages`.

    takes: key -> take, if it is not 0. Raises the same errors as `shard_samples`.
    """
    planned = [sample for sample in dataset.plan.read(shard) if sample.key not in without]
    outputs: dict[str, Outputs] = {}
    with ExitStack() as files:
        for stage in stages:
            receipt = chain.receipts[stage]
            if receipt is None:
                raise PlanError(
                    f"{dataset.url}: shard {shard:06d} has no commit of stage {stage} under this configuration; "
                    f"run: resmaster repair {quoted(dataset.url)}"
                )
            outputs[stage] = files.enter_context(committed_outputs(dataset, receipt))
            if missing := [sample.key for sample in planned if sample.key not in outputs[stage]]:
                raise ShardError(
                    _damaged(dataset, receipt.objects[0], f"lacks {len(missing)} samples, {missing[0]} first")
                )
        yield ShardSamples(planned, outputs, without, takes)


@contextmanager
def committed_outputs(dataset: Dataset, receipt: Receipt, without: Collection[str] = ()) -> Iterator[Outputs]:
    """The verified outputs in a commit, except the keys in `without`, usable within the block.

    Raises ShardError if an object is gone or damaged.
    """
    with scratch_folder() as scratch, ExitStack() as files:
        name, stage = receipt.objects[0].name, STAGES[receipt.stage]
        path = fetch(dataset, receipt.objects[0], scratch)
        if stage.schema is None:
            tar = files.enter_context(path.open("rb"))
            yield Outputs(tar, {entry.key: entry for entry in read_index(tar, name) if entry.key not in without}, {})
            return
        rows: dict[str, Rows] = {}
        for row in decode_table(path, stage.columns(dataset.config), name).to_pylist():
            if (key := row.pop("key")) not in without:
                rows.setdefault(key, []).append(row)
        yield Outputs(None, {}, rows, lambda: committed_arrays(dataset, receipt))


def committed_arrays(dataset: Dataset, receipt: Receipt) -> dict[str, Arrays]:
    """Key -> arrays by name, from the second object of a commit; empty if the commit has no arrays.

    Raises ShardError if the object is gone or damaged.
    """
    name = layout.features_object(receipt.stage, receipt.shard, receipt.attempt)
    for stored in receipt.objects[1:]:
        if stored.name == name:
            with scratch_folder() as scratch:
                return decode_arrays(fetch(dataset, stored, scratch), name)
    return {}


def fetch(dataset: Dataset, stored: StoredObject, scratch: Path) -> Path:
    """Fetch an object that a record names as a local file, and check it against the record. Raises ShardError."""
    try:
        path, sha256 = dataset.folder.download(stored.name, scratch, stored.sha256)
    except FileNotFoundError as error:
        raise ShardError(_damaged(dataset, stored, "is gone")) from error
    except (OSError, UserError) as error:
        if is_damage(error):
            raise ShardError(_damaged(dataset, stored, "cannot be read")) from error
        raise
    if sha256 != stored.sha256:
        raise ShardError(_damaged(dataset, stored, "is damaged (sha256 differs)"))
    return path


def _damaged(dataset: Dataset, stored: StoredObject, what: str) -> str:
    place = quoted(dataset.url)
    return f"{stored.name} {what}; run: resmaster verify {place}, then: resmaster repair {place}"
