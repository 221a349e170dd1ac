"""The driver: one stage over one shard, from verified upstream objects to one commit.

Knows nothing about Prefect, and of each stage only its `process` function.

Invariants:
- A shard that is committed is never computed again, unless it is marked as damaged: then it is made again, and put back only
  if every byte is as recorded.
- A failed sample costs a ledger row; too many in a shard cost the commit, and the ledger rows stay.
- Upstream objects are read by their commit record and checked against its sha256.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from resmaster_stages.breadcrumbs import Breadcrumbs
from resmaster_stages.computing import Process, compute
from resmaster_stages.config import DatasetConfig, Stage
from resmaster_stages.diffusion.cost import UnetCost, counting
from resmaster_stages.errors import PlanError, SampleError, ShardError
from resmaster_stages.identity import digest_of_keys
from resmaster_stages.lineage import stage_hashes, upstream_of
from resmaster_stages.models.busy import BusyTime, timing
from resmaster_stages.progress import reporter
from resmaster_stages.provenance import own_provenance
from resmaster_stages.reading import chosen_samples
from resmaster_stages.scratch import scratch_folder
from resmaster_stages.spill import Spill
from resmaster_stages.storage import layout
from resmaster_stages.storage.arrays import Arrays, encode_arrays
from resmaster_stages.storage.commit import (
    Receipt,
    StoredObject,
    commit,
    new_attempt,
)
from resmaster_stages.storage.damage import is_marked, unmark
from resmaster_stages.storage.dataset import Dataset, Output
from resmaster_stages.storage.filesystem import explained, sha256_of
from resmaster_stages.storage.ledger import encode_failures, first_errors
from resmaster_stages.storage.plan import Plan, read_plan
from resmaster_stages.storage.shards import ShardWriter, spell_image, validate
from resmaster_stages.storage.tables import STAGE_SCHEMAS, decode_table, encode_table
from resmaster_stages.supplements import Chain, Link, read_chain
from resmaster_stages.verify import is_whole, ledger_is_whole

MODULES: dict[Stage, str] = {
    "low_res": "resmaster_stages.low_res",
    "captions": "resmaster_stages.captions",
    "high_res": "resmaster_stages.upscale",
    "quality": "resmaster_stages.quality",
}
"""Where each stage's `process` is; imported when it is needed, for these bring torch along."""


def finished(dataset: Dataset, hashes: dict[Stage, str], stage: Stage, shard: int) -> Receipt | None:
    """The last receipt of a stage of a shard if `run_stage` would do nothing; else None. Raises ShardError as it."""
    chain = read_chain(dataset.folder, hashes, shard, stage)
    if chain.todo(stage) or is_marked(dataset.folder, stage, hashes[stage], shard):
        return None
    return chain.links[stage].receipts[-1]


def run_stage(
    dataset: Dataset,
    config: DatasetConfig,
    stage: Stage,
    shard: int,
    *,
    process: Process | None = None,
    provenance: dict[str, Any] | None = None,
) -> Receipt:
    """Compute and commit one stage of one shard, supplements included, or return the last receipt that is there.

    What is marked as damaged is made again and put back.

    `process` replaces the stage's own function; `provenance` is added to the commit record's volatile facts.
    Raises PlanError if the shard is not planned or an upstream stage is not committed, ShardError if too many samples
    failed, an upstream object is damaged, or a damaged object cannot be made again as it was.
    """
    hashes = stage_hashes(config)
    if stage not in hashes:
        raise PlanError(f"{dataset.url}: this configuration needs no stage {stage!r}; it needs {', '.join(hashes)}")
    work = _Work(dataset, config, stage, shard, hashes, process, provenance or {})
    chain = read_chain(dataset.folder, hashes, shard, stage)
    mended = chain.links[stage].commit is not None and is_marked(dataset.folder, stage, hashes[stage], shard)
    if mended:
        for receipt in chain.links[stage].receipts:
            _mend(work, chain, receipt)
        unmark(dataset.folder, stage, hashes[stage], shard)
    if not chain.todo(stage):
        reporter().shard_done(stage, shard, cached=not mended)
        return chain.links[stage].receipts[-1]
    receipts = []
    if chain.links[stage].commit is None:
        lost = {key for before in chain.before(stage)[-1:] for key in chain.lost(before)}
        planned = work.plan.read(shard)
        receipts.append(_make(work, chain, [sample.key for sample in planned if sample.key not in lost], supplement=0))
        chain = Chain({**chain.links, stage: Link(receipts[-1])})
        if chain.todo(stage):  # another worker may have done it
            chain = read_chain(dataset.folder, hashes, shard, stage)
    link = chain.links[stage]
    if link.commit and chain.todo(stage):
        receipts.append(_make(work, chain, chain.due(stage), supplement=len(link.supplements) + 1))
    reporter().shard_done(stage, shard, cached=False)
    return receipts[-1]


@dataclass(frozen=True)
class _Work:
    """What `run_stage` was asked for."""

    dataset: Dataset
    config: DatasetConfig
    stage: Stage
    shard: int
    hashes: dict[Stage, str]
    process: Process | None
    provenance: dict[str, Any]

    @cached_property
    def plan(self) -> Plan:
        """Generations never change: one reading is enough."""
        return read_plan(self.dataset.folder)


@dataclass(frozen=True)
class _Computed:
    """What an attempt at some samples of a shard has made, in local files."""

    good: list[str]
    failures: list[tuple[str, Exception]]
    images: tuple[str, ...]
    """Places of a tar's images, as commit records tell them."""
    tolerated: int
    files: list[tuple[str, Path]]
    """Name in the dataset, local file."""
    upstream: dict[str, str]
    """Upstream stage -> the attempts that were read."""
    seconds: float
    unet: UnetCost
    busy: BusyTime

    def device(self) -> dict[str, float]:
        """How long the device was at work, and the share of the stage's time in which it was not, for commit records."""
        share = self.busy.seconds / self.seconds if self.seconds else 0.0
        return {"busy_seconds": round(self.busy.seconds, 3), "idle_share": round(max(0.0, 1 - share), 4)}


@contextmanager
def _computed(work: _Work, chain: Chain, keys: Collection[str], supplement: int, attempt: str) -> Iterator[_Computed]:
    """Compute `keys`; the files are there within the block. If that ends well, the shard's cache is dropped."""
    dataset, config, stage, shard = work.dataset, work.config, work.stage, work.shard
    own_hash, upstream = work.hashes[stage], upstream_of(config, stage)
    with (
        scratch_folder() as scratch,
        chosen_samples(dataset, work.plan.read(shard), keys, chain, shard, upstream) as samples,
    ):
        reporter().shard_started(stage, shard, len(samples))
        started = time.monotonic()
        name = layout.shard_object(stage, shard, attempt)
        features_name = layout.features_object(stage, shard, attempt)
        target, features = (scratch / Path(each).name for each in (name, features_name))
        spill = Spill(dataset.folder, stage, own_hash, shard, config.spill_seconds)
        breadcrumbs = Breadcrumbs(dataset.folder, stage, own_hash, shard, samples.keys())
        tolerated = max(1, int(config.max_failure_ratio * len(samples) + 1e-9))  # 0.29 * 100 is 28.99...
        if supplement:  # these have failed before
            tolerated = len(samples)
        outputs = compute(
            work.process or importlib.import_module(MODULES[stage]).process, config, stage, samples, spill, breadcrumbs
        )
        with counting() as unet_cost, timing() as busy_time, closing(outputs):
            good, failures, images = _write(outputs, stage, shard, own_hash, tolerated, target, features)
        yield _Computed(
            good=good,
            failures=failures,
            images=images,
            tolerated=tolerated,
            files=[(name, target), *([(features_name, features)] if features.exists() else [])],
            upstream={each: " ".join(samples.attempts(each)) for each in upstream},
            seconds=time.monotonic() - started,
            unet=unet_cost,
            busy=busy_time,
        )
        spill.drop()
        breadcrumbs.forget()


def _make(work: _Work, chain: Chain, keys: Collection[str], supplement: int) -> Receipt:
    """Compute `keys`, and commit them as the shard's commit (`supplement` 0) or one of its supplements (1, 2, ...)."""
    dataset, stage, shard, own_hash = work.dataset, work.stage, work.shard, work.hashes[work.stage]
    attempt = new_attempt()
    with _computed(work, chain, keys, supplement, attempt) as made:
        ledger = None
        if made.failures:
            ledger = encode_failures(dataset.folder, stage, own_hash, shard, attempt, made.failures)
            if len(made.failures) > made.tolerated:
                ledger_name = layout.ledger(stage, shard, attempt)
                dataset.folder.write(ledger_name, ledger)
                raise ShardError(
                    f"{stage} of shard {shard:06d}: {len(made.failures)} of {len(keys)} samples failed (tolerated: "
                    f"{made.tolerated}), nothing committed; all in {ledger_name}\n{first_errors(made.failures)}"
                )
        return commit(
            dataset.folder,
            Receipt(
                stage=stage,
                stage_hash=own_hash,
                shard=shard,
                attempt=attempt,
                generation=work.plan.generation_of(shard).number,
                samples_ok=len(made.good),
                samples_failed=len(made.failures),
                failed_keys=tuple(key for key, _ in made.failures),
                keys_digest=digest_of_keys(made.good),
                images=made.images,
                upstream=made.upstream,
                seconds=round(made.seconds, 3),
                finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
                provenance={
                    **own_provenance(),
                    "exactness": work.config.model.exactness,
                    "unet": asdict(made.unet),
                    "device": made.device(),
                    **work.provenance,
                },
                supplement=supplement,
                keys=tuple(made.good) if supplement else (),
                request=chain.links[stage].requests if supplement else 0,
            ),
            made.files,
            ledger,
        )


def _mend(work: _Work, chain: Chain, receipt: Receipt) -> None:
    """Compute a commit again and put back, under their old names, those of its objects that are not as recorded.

    Raises ShardError, and puts nothing back, if what comes out differs from the record.
    """
    folder, stage, shard = work.dataset.folder, work.stage, work.shard
    broken = {stored.name for stored in receipt.objects if not is_whole(folder, stored)}
    ledger_lost = receipt.ledger is not None and not ledger_is_whole(folder, receipt.ledger)
    if not broken and not ledger_lost:
        return
    lost = {key for before in chain.before(stage)[-1:] for key in chain.lost(before)}
    planned = {sample.key for sample in work.plan.read(shard)}
    failed = set(receipt.failed_keys)
    keys = set(receipt.keys) if receipt.supplement else planned - lost - failed
    if ledger_lost:  # only then does it matter how the others failed
        keys |= failed
    with _computed(work, chain, keys, receipt.supplement, receipt.attempt) as made:
        if {key for key, _ in made.failures} != keys & failed:
            raise ShardError(
                f"{stage} of shard {shard:06d}: other samples fail now than when it was committed; nothing was put back\n"
                f"{first_errors(made.failures)}"
            )
        files = dict(made.files)
        for stored in receipt.objects:
            if stored.name in broken and (stored.name not in files or sha256_of(files[stored.name]) != stored.sha256):
                raise ShardError(_differs(work.dataset, receipt, stored))
        for name in sorted(broken):
            folder.upload(name, files[name])
        if ledger_lost and receipt.ledger:
            folder.write(
                receipt.ledger,
                encode_failures(folder, stage, receipt.stage_hash, shard, receipt.attempt, made.failures),
            )


def _differs(dataset: Dataset, receipt: Receipt, stored: StoredObject) -> str:
    facts = receipt.provenance
    where = facts.get("gpu") or facts.get("host") or "another machine"
    torch = facts.get("versions", {}).get("torch", "of an unknown version")
    return (
        f"{stored.name} came out with other bytes than its commit recorded ({where}, torch {torch}); nothing was put back. "
        f"Repair it on such a machine, or accept new bytes for these shards and all that was made from them with: "
        f"resmaster repair {dataset.url} --replace"
    )


def _write(
    outputs: Iterator[Output], stage: Stage, shard: int, own_hash: str, tolerated: int, target: Path, features: Path
) -> tuple[list[str], list[tuple[str, Exception]], tuple[str, ...]]:
    """Write the outputs to the local file `target`, validated, and `features` if the stage gave arrays.

    The good keys and the failures, in order, and the places of a tar's images. More errors that nobody foresaw than are `tolerated` end it: the rest would fail
    alike, and nothing will be committed.
    """
    good: list[str] = []
    images: tuple[str, ...] = ()
    arrays: list[Arrays] = []
    rows: list[dict[str, Any]] = []
    failures: list[tuple[str, Exception]] = []
    tar = ShardWriter(target) if layout.EXTENSIONS[stage] == "tar" else None
    with tar or nullcontext():
        for output in outputs:
            if output.error is not None:
                failures.append((output.key, output.error))
                if sum(not isinstance(error, SampleError) for _, error in failures) > tolerated:
                    return good, failures, ()
            else:
                if tar:
                    tar.write(output.key, output.files)
                elif not output.rows:
                    raise ShardError(f"{stage} of shard {shard:06d}: sample {output.key} has neither rows nor an error")
                rows += [{"key": output.key, **row} for row in output.rows]
                arrays.append(output.arrays)
                good.append(output.key)
            reporter().sample_done(stage, shard, ok=output.error is None)
    if tar:
        images = tuple(spell_image(entry) for entry in validate(target, good))
    else:
        schema = STAGE_SCHEMAS[stage]
        with explained(str(target.parent)):
            target.write_bytes(encode_table(rows, schema, {"stage_hash": own_hash}))
        keys = list(dict.fromkeys(decode_table(target, schema, target.name)["key"].to_pylist()))
        if keys != good:
            raise ShardError(f"{target.name}: holds {len(keys)} samples, expected {len(good)}")
    if any(arrays):
        with explained(str(features.parent)):
            features.write_bytes(encode_arrays(good, arrays, {"stage_hash": own_hash}))
    return good, failures, images
