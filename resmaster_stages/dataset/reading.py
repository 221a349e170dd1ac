"""Reads what is committed: a shard's samples with what the stages made of them, checked against the commit records.

Knows nothing about how a stage computes or commits.

Invariant: every object is read by its commit record and checked against its sha256.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, overload

from numpy.typing import NDArray

from resmaster_stages.config.dataset import DatasetConfig, Stage
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.chain import Chain, read_chain
from resmaster_stages.dataset.commit import Receipt, StoredObject
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.plan import Plan, PlannedSample
from resmaster_stages.dataset.sample import Picture, Sample
from resmaster_stages.dataset.schemas import STAGE_SCHEMAS
from resmaster_stages.dataset.stages import stage_hashes
from resmaster_stages.errors import PlanError, ShardError
from resmaster_stages.storage.arrays import decode_arrays
from resmaster_stages.storage.images import MASK_EXTENSION
from resmaster_stages.storage.scratch import scratch_folder
from resmaster_stages.storage.shards import Entry, read_index, read_member
from resmaster_stages.storage.tables import decode_table


class ShardSamples(Sequence[Sample]):
    """The samples of a shard that survived the stages named, in the plan's order. Pictures are read when asked for."""

    def __init__(
        self,
        planned: list[PlannedSample],
        held: dict[Stage, dict[str, Receipt | None]],
        tars: dict[Stage, dict[str, tuple[IO[bytes], Entry]]],
        tables: dict[Stage, dict[str, list[dict[str, Any]]]],
    ) -> None:
        self.planned = planned
        self._held = held
        self._tars = tars
        self._tables = tables

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
        return Sample(
            key=planned.key,
            index=planned.index,
            prompt=planned.prompt,
            negative_prompt=planned.negative_prompt,
            height=planned.height,
            width=planned.width,
            replica=planned.replica,
            source=planned.source,
            low_res=self._picture("low_res", planned.key),
            detail_mask=self._detail_mask(planned.key),
            captions=tuple(self.rows("captions", planned.key)),
            high_res=self._picture("high_res", planned.key),
        )

    def keys(self) -> list[str]:
        """The keys in order, without reading a picture."""
        return [planned.key for planned in self.planned]

    def attempts(self, stage: Stage) -> list[str]:
        """The attempts whose commits hold these samples: one, unless supplements are among them."""
        return list(dict.fromkeys(holder.attempt for holder in self._held[stage].values() if holder))

    def rows(self, stage: Stage, key: str) -> list[dict[str, Any]]:
        """A sample's rows in a stage's table; none where the stage was not loaded."""
        return self._tables.get(stage, {}).get(key, [])

    def _picture(self, stage: Stage, key: str) -> Picture | None:
        if stage not in self._tars:
            return None
        file, entry = self._tars[stage][key]
        extension, member = entry.image
        meta = json.loads(read_member(file, entry.members["json"]))
        return Picture(read_member(file, member), extension, meta)

    def _detail_mask(self, key: str) -> Picture | None:
        if "low_res" not in self._tars:
            return None
        file, entry = self._tars["low_res"][key]
        member = entry.members.get(MASK_EXTENSION)
        return Picture(read_member(file, member), "png", {"key": member.name}) if member else None


@contextmanager
def shard_samples(
    dataset: Dataset,
    config: DatasetConfig,
    plan: Plan,
    shard: int,
    stages: Sequence[Stage],
    hashes: dict[Stage, str] | None = None,
) -> Iterator[ShardSamples]:
    """The samples of a shard that `stages` and all before them made, supplements included, verified; usable within the
    block.

    Raises PlanError if one of the stages is not committed, ShardError if an object is gone or damaged.
    """
    hashes = hashes or stage_hashes(config)
    last = max(stages, key=list(hashes).index, default=None)
    chain = read_chain(dataset.folder, hashes, shard, last) if last else Chain({})
    planned = plan.read(shard)
    keys = [sample.key for sample in planned if all(chain.holder(stage, sample.key) for stage in chain.links)]
    with chosen_samples(dataset, planned, keys, chain, shard, stages) as samples:
        yield samples


@contextmanager
def chosen_samples(
    dataset: Dataset,
    planned: Sequence[PlannedSample],
    keys: Collection[str],
    chain: Chain,
    shard: int,
    stages: Sequence[Stage],
) -> Iterator[ShardSamples]:
    """Those of a shard's `planned` samples that `keys` names, with what `stages` made of them, verified.

    Every one of `keys` must be held in every one of `stages`. Raises as `shard_samples`.
    """
    wanted = set(keys)
    survivors = [sample for sample in planned if sample.key in wanted]
    for stage in stages:
        if chain.links[stage].commit is None:
            raise PlanError(
                f"{dataset.url}: shard {shard:06d} has no commit of stage {stage} under this configuration; "
                f"run: resmaster repair {dataset.url}"
            )
    held = {stage: {each.key: chain.holder(stage, each.key) for each in survivors} for stage in stages}
    members: dict[Stage, dict[str, tuple[IO[bytes], Entry]]] = {}
    tables: dict[Stage, dict[str, list[dict[str, Any]]]] = {}
    with scratch_folder() as scratch, ExitStack() as files:
        for stage in stages:
            members[stage], tables[stage] = {}, {}
            for receipt in chain.links[stage].receipts:
                own = [key for key, holder in held[stage].items() if holder is receipt]
                if not own:
                    continue
                found = _fetched(dataset, receipt, scratch, files)
                if missing := [key for key in own if key not in found]:
                    raise ShardError(_damaged(dataset, receipt, f"lacks {len(missing)} samples, {missing[0]} first"))
                for key in own:
                    value = found[key]
                    if isinstance(value, list):
                        tables[stage][key] = value
                    else:
                        members[stage][key] = value
        tars = {stage: found for stage, found in members.items() if layout.EXTENSIONS[stage] == "tar"}
        yield ShardSamples(survivors, held, tars, tables)


def _fetched(
    dataset: Dataset, receipt: Receipt, scratch: Path, files: ExitStack
) -> Mapping[str, tuple[IO[bytes], Entry] | list[dict[str, Any]]]:
    """Key -> its place in the commit's tar, which stays open as long as `files`, or its rows in the commit's table."""
    path = fetch(dataset, receipt, receipt.objects[0], scratch)
    if layout.EXTENSIONS[receipt.stage] == "tar":
        file = files.enter_context(path.open("rb"))
        return {entry.key: (file, entry) for entry in read_index(file, receipt.objects[0].name)}
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in decode_table(path, STAGE_SCHEMAS[receipt.stage](), receipt.objects[0].name).to_pylist():
        rows.setdefault(row["key"], []).append(row)
    if receipt.stage == "captions":
        for own in rows.values():
            own.sort(key=lambda row: (row["row"], row["col"]))
    return rows


def committed_arrays(dataset: Dataset, receipt: Receipt) -> dict[str, dict[str, NDArray[Any]]]:
    """Key -> arrays (by name) that a commit holds besides its main object; empty if it has none.

    Raises ShardError if they are gone or damaged.
    """
    name = layout.features_object(receipt.stage, receipt.shard, receipt.attempt)
    for stored in receipt.objects[1:]:
        if stored.name == name:
            with scratch_folder() as scratch:
                keys, arrays = decode_arrays(fetch(dataset, receipt, stored, scratch), name)
            return {key: {each: values[row] for each, values in arrays.items()} for row, key in enumerate(keys)}
    return {}


def fetch(dataset: Dataset, receipt: Receipt, stored: StoredObject, scratch: Path) -> Path:
    """One object of a commit as a local file, checked against its record. Raises ShardError."""
    try:
        path, sha256 = dataset.folder.download(stored.name, scratch)
    except FileNotFoundError as error:
        raise ShardError(_damaged(dataset, receipt, "is gone", stored)) from error
    if sha256 != stored.sha256:
        raise ShardError(_damaged(dataset, receipt, "is damaged (sha256 differs)", stored))
    return path


def _damaged(dataset: Dataset, receipt: Receipt, what: str, stored: StoredObject | None = None) -> str:
    stored = stored or receipt.objects[0]
    return f"{stored.name} {what}; run: resmaster verify {dataset.url}, then: resmaster repair {dataset.url}"
