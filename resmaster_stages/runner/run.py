"""The driver: runs one stage over one shard, from verified upstream objects to one commit.

This module does not use Prefect. It knows of each stage only the stage's row in the table of stages.

Invariants:
- A committed shard is never computed again, unless it is marked as damaged. Then it is computed again, and its objects
  are put back only if every byte is as recorded.
- A failed sample gets a row in the ledger. If too many samples of a shard fail, nothing is committed, but the ledger
  rows stay.
- A later attempt computes only the samples that the earlier attempt did not make, or of which another take is due
  (`redo`), and copies the others byte for byte. The earlier commit stays.
- Upstream objects are found by their commit record, and each is checked against the sha256 in the record.
- An attempt that ends by an error is recorded, and its error is raised unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.attempts import record_failure
from resmaster_stages.dataset.batches import batch_of_each, recorded
from resmaster_stages.dataset.chain import read_chain
from resmaster_stages.dataset.commit import Receipt, new_attempt
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.ledger import encode_failures, first_errors
from resmaster_stages.dataset.reading import committed_outputs
from resmaster_stages.dataset.sample import Output
from resmaster_stages.dataset.stages import STAGES, Process
from resmaster_stages.errors import ShardError
from resmaster_stages.keys import digest_of_keys
from resmaster_stages.progress import ShardDone, emit
from resmaster_stages.runner.attempt import Clock, Made, Work, computed
from resmaster_stages.runner.mend import mend
from resmaster_stages.runner.provenance import own_provenance


def run_stage(dataset: Dataset, stage: str, shard: int, **options: Any) -> Receipt:
    """Like `ensure_stage`, with the same `options`, but returns only the record that counts."""
    return ensure_stage(dataset, stage, shard, **options)[0]


def ensure_stage(
    dataset: Dataset,
    stage: str,
    shard: int,
    *,
    known: Mapping[str, Receipt] | None = None,
    number: int = 1,
    process: Process | None = None,
    provenance: dict[str, Any] | None = None,
) -> tuple[Receipt, bool]:
    """Compute and commit what is due in one stage of one shard.

    Returns the record that counts, and whether there was work.

    A shard that is marked as damaged is mended. Samples that failed get another attempt if fewer than `number` attempts
    are committed, and always if samples became good upstream or are to be made again.

    known: records of earlier stages of the shard, which are not read again. process: replaces the stage's own function.
    provenance: further volatile facts for the commit record.
    Raises PlanError if the shard is not planned or an upstream stage is not committed. Raises ShardError if too many
    samples failed, if an upstream object is damaged, or if a damaged object cannot be made again with the same bytes.
    """
    samples = dataset.plan.size(shard)  # an unplanned shard or stage is the caller's mistake, and no attempt
    commits, facts, attempt, clock = dataset.commits(stage), provenance or {}, new_attempt(), Clock()
    try:
        chain = read_chain(dataset, shard, stage, known, redone=shard in dataset.redos.shards)
        worked = chain.receipts[stage] is not None and commits.is_marked(shard)
        if worked:  # of damage, all attempts are looked at, also those for which the request is lost
            chain = read_chain(dataset, shard, stage)
        function = process or STAGES[stage].function()
        work = Work(dataset, STAGES[stage], shard, chain, function, chain.takes(stage), clock)
        receipt = chain.receipts[stage]
        if receipt and worked:
            mend(work, receipt)
            commits.unmark(shard)
        while receipt is None or work.chain.due(stage, number):
            receipt, worked = _attempt(work, receipt, attempt, facts), True
            if receipt.attempt == attempt:
                break
            # the winner of the race may have known fewer requests to make samples again
            chain = replace(work.chain, receipts={**work.chain.receipts, stage: receipt})
            work, attempt = replace(work, chain=chain, takes=chain.takes(stage)), new_attempt()
    except Exception as error:
        record_failure(commits, shard, attempt, error, facts, clock.lost())
        raise
    emit(ShardDone(stage, shard, samples, cached=not worked))
    return receipt, worked


def _attempt(work: Work, before: Receipt | None, attempt: str, provenance: Mapping[str, Any]) -> Receipt:
    """Compute the samples that the attempt `before` has not made, or not in the take that is due, and commit them
    together with its other outputs."""
    lost = work.chain.lost(work.stage.name)
    with ExitStack() as within:
        earlier: Mapping[str, Output] = {}
        if before is not None:
            redone = work.chain.redone(work.stage.name)
            earlier = within.enter_context(committed_outputs(work.dataset, before, redone))
        number = before.number + 1 if before else 1
        made = within.enter_context(computed(work, lost, number, earlier))
        ledger = None
        if made.failures:
            ledger = encode_failures(work.commits, work.shard, attempt, made.failures)
            if before is None:
                _check_failures(work, made, attempt, ledger)
        receipt = _receipt(work, made, attempt, provenance, before)
        return work.commits.create(receipt, made.objects(work, attempt), ledger)


def _check_failures(work: Work, made: Made, attempt: str, ledger: bytes) -> None:
    """Write the ledger and raise ShardError if more samples failed than a first attempt may lose."""
    samples = work.dataset.plan.size(work.shard) - len(work.chain.lost(work.stage.name))
    most = work.dataset.config.tolerated(samples)
    if len(made.failures) > most:
        name = layout.ledger(work.stage.name, work.shard, attempt)
        work.dataset.folder.write(name, ledger)
        raise ShardError(
            f"{work.place}: {len(made.failures)} of {samples} samples failed (tolerated: {most}), nothing committed; "
            f"all in {name}\n{first_errors(made.failures)}"
        )


def _receipt(work: Work, made: Made, attempt: str, provenance: Mapping[str, Any], before: Receipt | None) -> Receipt:
    """The record of an attempt. Its seconds, UNet cost and batches include those of the attempts before."""
    seconds = made.seconds + made.resumed_seconds + (before.seconds if before else 0.0)
    stage, unet, batches = work.stage, asdict(made.unet), made.batches
    if before is not None:
        batches = batch_of_each(before.batches, made.good) | batches
        known = before.provenance.get("unet", {})
        unet = {name: count + known.get(name, 0) for name, count in unet.items()}
    return Receipt(
        stage=stage.name,
        stage_hash=work.commits.stage_hash,
        shard=work.shard,
        attempt=attempt,
        number=before.number + 1 if before else 1,
        generation=work.dataset.plan.generation_of(work.shard).number,
        samples_ok=len(made.good),
        samples_failed=len(made.failures),
        failed_keys=tuple(key for key, _ in made.failures),
        lost_keys=tuple(sorted(work.chain.lost(stage.name))),
        keys_digest=digest_of_keys(made.good),
        images=made.images,
        batches=recorded(batches, made.good),
        takes={key: take for key, take in work.takes.items() if key not in work.chain.lost(stage.name)},
        upstream=work.upstream,
        seconds=round(seconds, 3),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        provenance={
            **own_provenance(),
            "exactness": work.dataset.config.model.exactness,
            "compile": work.dataset.config.model.compile,
            "unet": unet,
            "device": made.device(),
            **provenance,
        },
    )
