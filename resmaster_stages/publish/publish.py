"""Writes all that readers get: manifest, index, dataset card, report and contact sheets, and the record of these."""

from __future__ import annotations

from collections.abc import Mapping

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import StoredObject, described
from resmaster_stages.dataset.curation import Choice, digest_of_choices, encode_choices, read_choices
from resmaster_stages.dataset.dataset import Dataset, current_config
from resmaster_stages.dataset.publication import PublicationRecord, read_publication, write_publication
from resmaster_stages.errors import ShardError
from resmaster_stages.publish.card import Publication
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.publish.report import write_report


def publish(dataset: Dataset, curated: bool | None = None) -> Publication:
    """Publish what is committed, with the choices that count. Replaces the files of an earlier publication.

    curated: whether there is an index without rejected samples. None: if the earlier publication has one.
    Raises ShardError if an object is gone or damaged, if a key occurs twice, or if choices cannot be read.
    """
    if curated is None:
        curated = _was_curated(dataset)
    choices = read_choices(dataset.folder)
    published = write_manifest(dataset, choices, curated)
    files = (*published.files, *write_report(dataset), *_write_choices(dataset, choices))
    if not curated:
        dataset.folder.remove(layout.CURATED_INDEX)
    name = current_config(dataset.folder)
    config = described(name, dataset.folder.read(name))
    shards = 0 if published.shards_missing else published.shards
    record = PublicationRecord(published.commits, files, config, dataset.hashes, shards, digest_of_choices(choices))
    write_publication(dataset.folder, record)
    return published


def _was_curated(dataset: Dataset) -> bool:
    """Whether the earlier publication has a curated index. One whose record cannot be read counts as having none if
    there is no such index."""
    try:
        earlier = read_publication(dataset.folder)
    except ShardError:
        return dataset.folder.exists(layout.CURATED_INDEX)
    return earlier is not None and earlier.curated


def _write_choices(dataset: Dataset, choices: Mapping[str, Choice]) -> tuple[StoredObject, ...]:
    """Write the table of the choices that count. Without any there is no table."""
    if not choices:
        dataset.folder.remove(layout.CURATION_TABLE)
        return ()
    data = encode_choices(choices.values())
    dataset.folder.write(layout.CURATION_TABLE, data)
    return (described(layout.CURATION_TABLE, data),)
