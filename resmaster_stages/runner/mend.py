"""Computes damaged objects of a commit again, and puts them back if every byte is as recorded.

A lost error ledger is made again from what its samples do now, because a commit record holds only the ledger's name.

Every sample is made in the take that the record holds, from the takes that the commit read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from resmaster_stages.dataset.batches import Batch, batch_of_each
from resmaster_stages.dataset.chain import Chain
from resmaster_stages.dataset.commit import Receipt, StoredObject, difference
from resmaster_stages.dataset.ledger import encode_failures, first_errors, ledger_is_whole
from resmaster_stages.errors import SampleError, ShardError
from resmaster_stages.redaction import quoted
from resmaster_stages.runner.attempt import Work, computed
from resmaster_stages.runner.compute import usual_batch
from resmaster_stages.storage.filesystem import sha256_of


def mend(work: Work, receipt: Receipt) -> None:
    """Compute what is damaged of a commit again, and put its objects and its ledger back under their old names.

    Raises ShardError, and puts no object back, if the result differs from the record.
    """
    folder, work = work.dataset.folder, replace(work, chain=_as_read(work, receipt), takes=receipt.takes)
    if broken := [stored for stored in receipt.objects if difference(folder, stored)]:
        _mend_objects(work, receipt, broken)
    if receipt.ledger is not None and not ledger_is_whole(folder, receipt.ledger):
        _mend_ledger(work, receipt, receipt.ledger)


def _as_read(work: Work, receipt: Receipt) -> Chain:
    """The commits of the shard; of earlier stages of which samples were made again since, those that were read.

    Raises ShardError if what was read is gone.
    """
    receipts = dict(work.chain.receipts)
    for stage, attempt in receipt.upstream.items():
        now = read = receipts.get(stage)
        while read is not None and read.attempt != attempt:
            read = work.dataset.commits(stage).attempt(work.shard, read.number - 1) if read.number > 1 else None
        if now is not None and read is not None and read.takes != now.takes:
            if not work.dataset.folder.exists(name := read.objects[0].name):
                raise ShardError(
                    f"{work.place}: was made from {name}, which is gone since samples of it were made again; "
                    f"{_replaced(work)}"
                )
            receipts[stage] = read
    return replace(work.chain, receipts=receipts)


def _mend_objects(work: Work, receipt: Receipt, broken: Sequence[StoredObject]) -> None:
    """Compute the good samples of a commit again, each in the batch that the record names."""
    with computed(work, frozenset(receipt.lost_keys), 0, earlier={}, batches=_batches(work, receipt)) as made:
        if made.failures:
            raise ShardError(
                f"{work.place}: other samples fail now than when it was committed; nothing was put back. Remove the "
                f"causes, or {_replaced(work)}\n{first_errors(made.failures)}"
            )
        files = dict(made.objects(work, receipt.attempt))
        for stored in broken:
            if stored.name not in files or sha256_of(files[stored.name]) != stored.sha256:
                raise ShardError(_differs(work, receipt, stored))
        for stored in broken:
            work.dataset.folder.upload(stored.name, files[stored.name])


def _mend_ledger(work: Work, receipt: Receipt, ledger: str) -> None:
    """Compute the failed samples of a commit again, to get their errors, and write the ledger with them."""
    batches = dict.fromkeys(receipt.failed_keys, Batch(slot=1, size=1))
    with computed(work, frozenset(receipt.lost_keys), 0, earlier={}, batches=batches) as made:
        errors: dict[str, Exception] = dict(made.failures)
        for key in made.good:
            errors[key] = SampleError(
                "its error is lost with the ledger, and it does not fail any more; run: "
                f"resmaster repair {quoted(work.dataset.url)} --retry-errors"
            )
        failures = [(key, errors[key]) for key in receipt.failed_keys if key in errors]
        work.dataset.folder.write(ledger, encode_failures(work.commits, work.shard, receipt.attempt, failures))


def _batches(work: Work, receipt: Receipt) -> dict[str, Batch]:
    """The batch of each good sample: that of the record or, where the record has none, that of the configuration."""
    out = {*receipt.failed_keys, *receipt.lost_keys}
    keys = [sample.key for sample in work.dataset.plan.read(work.shard) if sample.key not in out]
    usual = usual_batch(work.dataset.config, work.stage, receipt.lost_keys)
    return dict.fromkeys(keys, usual) | batch_of_each(receipt.batches, keys)


def _differs(work: Work, receipt: Receipt, stored: StoredObject) -> str:
    facts, model = receipt.provenance, work.dataset.config.model
    where = [str(facts.get("gpu") or facts.get("host") or "another machine")]
    where.append(f"torch {facts.get('versions', {}).get('torch', 'of an unknown version')}")
    where += [f"torch threads {count}" for count in sorted({each.threads for each in receipt.batches if each.threads})]
    were = {name: facts[name] for name in ("exactness", "compile") if name in facts}
    where += [f"model.{name}: {value}" for name, value in were.items() if value != getattr(model, name)]
    return (
        f"{stored.name} came out with other bytes than its commit recorded ({', '.join(where)}); nothing was put back. "
        f"Repair it on such a machine, or {_replaced(work)}"
    )


def _replaced(work: Work) -> str:
    return (
        "accept new bytes for these shards and all that was made from them with: "
        f"resmaster repair {quoted(work.dataset.url)} --replace"
    )
