"""Writes all that readers get: manifest, index, dataset card, report and contact sheets, and the record of these."""

from __future__ import annotations

from resmaster_stages.dataset.commit import described
from resmaster_stages.dataset.dataset import Dataset, current_config
from resmaster_stages.dataset.publication import PublicationRecord, write_publication
from resmaster_stages.publish.card import Publication
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.publish.report import write_report


def publish(dataset: Dataset) -> Publication:
    """Publish what is committed. Replaces the files of an earlier publication.

    Raises ShardError if an object is gone or damaged, or if a key occurs twice.
    """
    published = write_manifest(dataset)
    files = (*published.files, *write_report(dataset))
    name = current_config(dataset.folder)
    config = described(name, dataset.folder.read(name))
    shards = 0 if published.shards_missing else published.shards
    record = PublicationRecord(published.commits, files, config, dataset.hashes, shards)
    write_publication(dataset.folder, record)
    return published
