"""The driver: one stage over one shard, from verified upstream objects to one commit.

Knows nothing about Prefect, and of each stage only its `process` function.

Invariants:
- A shard that is committed is never computed again, unless it is marked as damaged: then it is made again, and put back
  only if every byte is as recorded.
- A failed sample costs a ledger row; too many in a shard cost the commit, and the ledger rows stay.
- Upstream objects are read by their commit record and checked against its sha256.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from resmaster_stages.config.dataset import DatasetConfig, Stage
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.chain import Chain, Link, read_chain
from resmaster_stages.dataset.commit import Receipt, commit, new_attempt
from resmaster_stages.dataset.damage import is_marked, unmark
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.ledger import encode_failures, first_errors
from resmaster_stages.dataset.stages import stage_hashes
from resmaster_stages.errors import PlanError, ShardError
from resmaster_stages.keys import digest_of_keys
from resmaster_stages.progress import ShardDone, emit
from resmaster_stages.runner.attempt import Work, computed
from resmaster_stages.runner.compute import Process
from resmaster_stages.runner.mend import mend
from resmaster_stages.runner.provenance import own_provenance


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
    work = Work(dataset, config, stage, shard, hashes, process, provenance or {})
    chain = read_chain(dataset.folder, hashes, shard, stage)
    mended = chain.links[stage].commit is not None and is_marked(dataset.folder, stage, hashes[stage], shard)
    if mended:
        for receipt in chain.links[stage].receipts:
            mend(work, chain, receipt)
        unmark(dataset.folder, stage, hashes[stage], shard)
    if not chain.todo(stage):
        emit(ShardDone(stage, shard, cached=not mended))
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
    emit(ShardDone(stage, shard, cached=False))
    return receipts[-1]


def _make(work: Work, chain: Chain, keys: Collection[str], supplement: int) -> Receipt:
    """Compute `keys`, and commit them as the shard's commit (`supplement` 0) or one of its supplements (1, 2, ...)."""
    dataset, stage, shard, own_hash = work.dataset, work.stage, work.shard, work.hashes[work.stage]
    attempt = new_attempt()
    with computed(work, chain, keys, supplement, attempt) as made:
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
