"""Lists samples and inputs by name: what failed, what is flagged, what somebody chose, what was never planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.curation import Choice, Verdict, read_choices
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.schemas import DUPLICATES_SCHEMA, REJECTED_SCHEMA, manifest_schema
from resmaster_stages.errors import UserError
from resmaster_stages.inspection.failures import failures
from resmaster_stages.redaction import quoted
from resmaster_stages.storage.tables import decode_table

Item = dict[str, Any]
"""What is known of one sample or input; the first value names it."""


def _failed(dataset: Dataset) -> Iterator[Item]:
    for row in failures(dataset):
        yield {"key": row["key"], "stage": row["stage"], "error": row["error_class"], "message": row["message"]}


def _flagged(dataset: Dataset) -> Iterator[Item]:
    for row in _manifest(dataset, "key", "flags"):
        if row["flags"]:
            yield row


def _duplicates(dataset: Dataset) -> Iterator[Item]:
    for row in _manifest(dataset, "key", "flags", "near_duplicate_of"):
        if "near_duplicate" in row["flags"]:
            yield {"key": row["key"], "of": row.get("near_duplicate_of")}


def counting_choices(dataset: Dataset) -> dict[str, Choice]:
    """Key -> the choice that counts: the latest one, unless the sample was made anew since, as far as is published."""
    choices = read_choices(dataset.folder)
    if not choices or not dataset.folder.exists(layout.MANIFEST):
        return choices
    takes = {row["key"]: row["take"] or 0 for row in _manifest(dataset, "key", "take")}
    return {key: choice for key, choice in choices.items() if choice.take == takes.get(key, choice.take)}


def _chosen(verdict: Verdict) -> Callable[[Dataset], Iterator[Item]]:
    def chosen(dataset: Dataset) -> Iterator[Item]:
        for choice in counting_choices(dataset).values():
            if choice.verdict == verdict:
                yield {"key": choice.key, "reason": choice.reason, "who": choice.who, "when": choice.when}

    return chosen


def _inputs(dataset: Dataset) -> Iterator[Item]:
    for generation in dataset.plan.generations:
        if generation.rejected:
            data = dataset.folder.read(generation.rejected.name)
            for row in decode_table(data, REJECTED_SCHEMA, generation.rejected.name).to_pylist():
                yield {"source": row["source"], "reason": row["reason"], "text": row["text"]}
        if generation.duplicates:
            data = dataset.folder.read(generation.duplicates.name)
            for row in decode_table(data, DUPLICATES_SCHEMA, generation.duplicates.name).to_pylist():
                yield {
                    "source": row["source"],
                    "reason": f"equals {row['first'] or 'sample ' + row['key']}",
                    "text": "",
                }


LISTS: dict[str, tuple[Callable[[Dataset], Iterator[Item]], str]] = {
    "failed": (_failed, "samples that failed and are still missing"),
    "flagged": (_flagged, "published samples with flags"),
    "duplicates": (_duplicates, "published samples that look the same as an earlier one"),
    "rejected": (_chosen("rejected"), "samples that somebody rejected"),
    "kept": (_chosen("kept"), "samples that somebody kept"),
    "inputs": (_inputs, "inputs that were never planned, because they cannot be used or repeat an earlier one"),
}
"""Name of a list -> what gives its items, and what it holds."""


def listed(dataset: Dataset, name: str) -> Iterator[Item]:
    """The items of a list. Raises UserError if the list is of published samples and nothing is published."""
    return LISTS[name][0](dataset)


def _manifest(dataset: Dataset, *columns: str) -> Iterator[Item]:
    if not dataset.folder.exists(layout.MANIFEST):
        raise UserError(f"{dataset.url}: nothing is published yet; run: resmaster publish {quoted(dataset.url)}")
    schema = manifest_schema()
    known = [name for name in columns if name in schema.names]
    table = decode_table(dataset.folder.read(layout.MANIFEST), schema, layout.MANIFEST, known)
    for batch in table.to_batches(10_000):
        yield from batch.to_pylist()
