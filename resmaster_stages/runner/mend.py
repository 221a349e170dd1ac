"""Computes damaged objects of a commit again, and puts them back if every byte is as recorded."""

from __future__ import annotations

from resmaster_stages.dataset.batches import Batch, batch_of_each
from resmaster_stages.dataset.commit import Receipt, StoredObject, difference
from resmaster_stages.dataset.ledger import encode_failures, first_errors, ledger_is_whole
from resmaster_stages.errors import ShardError
from resmaster_stages.runner.attempt import Work, computed
from resmaster_stages.runner.compute import usual_batch
from resmaster_stages.storage.filesystem import sha256_of


def mend(work: Work, receipt: Receipt) -> None:
    """Compute a commit again, and put back its damaged objects and its ledger under their old names.

    Each sample is computed in the batch that the record names. Raises ShardError, and puts nothing back, if the result
    differs from the record.
    """
    folder = work.dataset.folder
    broken = {stored.name for stored in receipt.objects if difference(folder, stored)}
    ledger_lost = receipt.ledger is not None and not ledger_is_whole(folder, receipt.ledger)
    if not broken and not ledger_lost:
        return
    # Failed samples are computed again only if the ledger is lost, to get their errors.
    failed = frozenset(receipt.failed_keys) if ledger_lost else frozenset()
    batches = _batches(work, receipt) | dict.fromkeys(failed, Batch(slot=1, size=1))
    with computed(work, frozenset(receipt.lost_keys), 0, earlier={}, batches=batches) as made:
        if {key for key, _ in made.failures} != failed:
            raise ShardError(
                f"{work.place}: other samples fail now than when it was committed; nothing was put back\n"
                f"{first_errors(made.failures)}"
            )
        files = dict(made.objects(work, receipt.attempt))
        for stored in receipt.objects:
            if stored.name in broken and (stored.name not in files or sha256_of(files[stored.name]) != stored.sha256):
                raise ShardError(_differs(work, receipt, stored))
        for name in sorted(broken):
            folder.upload(name, files[name])
        if ledger_lost and receipt.ledger:
            folder.write(receipt.ledger, encode_failures(work.commits, work.shard, receipt.attempt, made.failures))


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
        "Repair it on such a machine, or accept new bytes for these shards and all that was made from them with: "
        f"resmaster repair {work.dataset.url} --replace"
    )
