"""The driver: one stage over one shard, from verified upstream objects to one commit.

Knows nothing about Prefect, and of each stage only its `process` function.

Invariants:
- A shard that is committed is never computed again.
- A failed sample costs a ledger row; too many in a shard cost the commit, and the ledger rows stay.
- Upstream objects are read by their commit record and checked against its sha256.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Collection, Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resmaster_stages.breadcrumbs import Breadcrumbs
from resmaster_stages.computing import Process, compute
from resmaster_stages.config import DatasetConfig, Stage
from resmaster_stages.diffusion.cost import counting
from resmaster_stages.errors import PlanError, SampleError, ShardError
from resmaster_stages.identity import digest_of_keys
from resmaster_stages.lineage import stage_hashes, upstream_of
from resmaster_stages.progress import reporter
from resmaster_stages.provenance import own_provenance
from resmaster_stages.reading import chosen_samples
from resmaster_stages.scratch import scratch_folder
from resmaster_stages.spill import Spill
from resmaster_stages.storage import layout
from resmaster_stages.storage.arrays import Arrays, encode_arrays
from resmaster_stages.storage.commit import (
    Receipt,
    commit,
    new_attempt,
)
from resmaster_stages.storage.dataset import Dataset, Output
from resmaster_stages.storage.filesystem import explained
from resmaster_stages.storage.ledger import encode_failures, first_errors
from resmaster_stages.storage.plan import read_plan
from resmaster_stages.storage.shards import ShardWriter, validate
from resmaster_stages.storage.tables import STAGE_SCHEMAS, decode_table, encode_table
from resmaster_stages.supplements import Chain, read_chain

MODULES: dict[Stage, str] = {
    "low_res": "resmaster_stages.low_res",
    "captions": "resmaster_stages.captions",
    "high_res": "resmaster_stages.upscale",
    "quality": "resmaster_stages.quality",
}
"""Where each stage's `process` is; imported when it is needed, for these bring torch along."""


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

    `process` replaces the stage's own function; `provenance` is added to the commit record's volatile facts.
    Raises PlanError if the shard is not planned or an upstream stage is not committed, ShardError if too many samples
    failed or an upstream object is damaged.
    """
    hashes = stage_hashes(config)
    if stage not in hashes:
        raise PlanError(f"{dataset.url}: this configuration needs no stage {stage!r}; it needs {', '.join(hashes)}")
    work = _Work(dataset, config, stage, shard, hashes, process, provenance or {})
    chain = read_chain(dataset.folder, hashes, shard, stage)
    if not chain.todo(stage):
        reporter().shard_done(stage, shard, cached=True)
        return chain.links[stage].receipts[-1]
    receipts = []
    if chain.links[stage].commit is None:
        lost = {key for before in chain.before(stage)[-1:] for key in chain.lost(before)}
        planned = read_plan(dataset.folder).read(shard)
        receipts.append(_make(work, chain, [sample.key for sample in planned if sample.key not in lost], supplement=0))
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


def _make(work: _Work, chain: Chain, keys: Collection[str], supplement: int) -> Receipt:
    """Compute `keys`, and commit them as the shard's commit (`supplement` 0) or one of its supplements (1, 2, ...)."""
    dataset, config, stage, shard = work.dataset, work.config, work.stage, work.shard
    own_hash, upstream = work.hashes[stage], upstream_of(config, stage)
    plan, attempt = read_plan(dataset.folder), new_attempt()
    with (
        scratch_folder() as scratch,
        chosen_samples(dataset, plan.read(shard), keys, chain, shard, upstream) as samples,
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
        with counting() as unet_cost, closing(outputs):
            good, failures = _write(outputs, stage, shard, own_hash, tolerated, target, features)
        seconds = time.monotonic() - started
        ledger = None
        if failures:
            ledger = encode_failures(dataset.folder, stage, own_hash, shard, attempt, failures)
            if len(failures) > tolerated:
                ledger_name = layout.ledger(stage, shard, attempt)
                dataset.folder.write(ledger_name, ledger)
                raise ShardError(
                    f"{stage} of shard {shard:06d}: {len(failures)} of {len(samples)} samples failed (tolerated: "
                    f"{tolerated}), nothing committed; all in {ledger_name}\n{first_errors(failures)}"
                )
        receipt = commit(
            dataset.folder,
            Receipt(
                stage=stage,
                stage_hash=own_hash,
                shard=shard,
                attempt=attempt,
                generation=plan.generation_of(shard).number,
                samples_ok=len(good),
                samples_failed=len(failures),
                failed_keys=tuple(key for key, _ in failures),
                keys_digest=digest_of_keys(good),
                upstream={each: " ".join(samples.attempts(each)) for each in upstream},
                seconds=round(seconds, 3),
                finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
                provenance={**own_provenance(), "unet": asdict(unet_cost), **work.provenance},
                supplement=supplement,
                keys=tuple(good) if supplement else (),
                request=chain.links[stage].requests if supplement else 0,
            ),
            [(name, target), *([(features_name, features)] if features.exists() else [])],
            ledger,
        )
        spill.drop()
        breadcrumbs.forget()
    return receipt


def _write(
    outputs: Iterator[Output], stage: Stage, shard: int, own_hash: str, tolerated: int, target: Path, features: Path
) -> tuple[list[str], list[tuple[str, Exception]]]:
    """Write the outputs to the local file `target`, validated, and `features` if the stage gave arrays.

    The good keys and the failures, in order. More errors that nobody foresaw than are `tolerated` end it: the rest would fail
    alike, and nothing will be committed.
    """
    good: list[str] = []
    arrays: list[Arrays] = []
    rows: list[dict[str, Any]] = []
    failures: list[tuple[str, Exception]] = []
    tar = ShardWriter(target) if layout.EXTENSIONS[stage] == "tar" else None
    with tar or nullcontext():
        for output in outputs:
            if output.error is not None:
                failures.append((output.key, output.error))
                if sum(not isinstance(error, SampleError) for _, error in failures) > tolerated:
                    return good, failures
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
        validate(target, good)
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
    return good, failures
