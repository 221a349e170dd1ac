"""Names the files of a dataset that its readers need, as records name them: what goes along when a dataset is shared.

Invariants:
- Every file is named by the record of the publication or by a commit of a published shard, never by a listing.
- The settings hold no credential and no address, and of paths only the last name.

Not shared are the plan and the ledgers (inputs that were rejected or failed may be nobody's business), the report (its
commands name the place of the dataset), caches, and attempts that were replaced.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import yaml

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.part import Part
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import StoredObject
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.publication import CommitsDigest, read_publication
from resmaster_stages.dataset.reading import fetch
from resmaster_stages.errors import PlanError
from resmaster_stages.publish.card import last_name, without_folders
from resmaster_stages.publish.manifest import published_chains
from resmaster_stages.redaction import quoted
from resmaster_stages.storage.scratch import scratch_folder

SETTINGS = "config.yaml"
"""Name of the settings among the shared files."""


@dataclass(frozen=True)
class Shared:
    """The files of a dataset that readers need."""

    objects: tuple[StoredObject, ...]
    """Objects of commits that hold a sample, in the order of the shards."""
    entries: tuple[StoredObject, ...]
    """Published files, which lead to the objects."""
    settings: bytes
    """The configuration as YAML."""


def shared(dataset: Dataset) -> Shared:
    """The files of a published dataset that readers need.

    Raises PlanError if the publication is not of its commits, and ShardError if an index is gone or damaged.
    """
    record = read_publication(dataset.folder)
    if record is None:
        raise PlanError(f"{dataset.url}: is not published; run: resmaster publish {quoted(dataset.url)}")
    digest = CommitsDigest(dataset.hashes, dataset.config.quality.publication())
    objects: list[StoredObject] = []
    for _, chain in published_chains(dataset):
        for receipt in chain.committed.values():
            digest.add(receipt)
            if receipt.samples_ok:
                objects += receipt.objects
    if digest.hexdigest() != record.commits:
        raise PlanError(
            f"{dataset.url}: has other commits than it was published from (does a run work on it?); run: "
            f"resmaster publish {quoted(dataset.url)}"
        )
    entries = tuple(file for file in record.files if not file.name.startswith(f"{layout.REPORT}/"))
    known = {file.name for file in objects}
    objects += [file for entry in entries for file in _indexed(dataset, entry) if file.name not in known]
    text: str = yaml.safe_dump(settings(dataset.config), sort_keys=False)
    return Shared(tuple(objects), entries, text.encode())


def _indexed(dataset: Dataset, entry: StoredObject) -> list[StoredObject]:
    """The files that a published index names with their sha256: those that no commit names, because they were made from
    committed ones for readers."""
    if not entry.name.endswith(".json"):
        return []
    with scratch_folder() as scratch:
        items = json.loads(fetch(dataset, entry, scratch).read_bytes())["shardlist"]
    return [StoredObject(item["url"], item["sha256"], item["filesize"]) for item in items if "sha256" in item]


def settings(config: DatasetConfig) -> dict[str, Any]:
    """What a configuration says about the images, for others: without how and where they were computed, and with the
    last name of the file or folder that was read."""
    source = "images" if config.images else "prompts"
    values = _lasting(config)
    head = {"name": values.pop("name"), source: last_name(getattr(config, source))}
    return {**{name: value for name, value in head.items() if value}, **values}


def _lasting(part: Part) -> dict[str, Any]:
    """The fields of a part that are not operational, as JSON has them."""
    values = part.model_dump(mode="json")
    found: dict[str, Any] = {}
    for name, field in type(part).model_fields.items():
        marks = field.json_schema_extra
        if not (isinstance(marks, dict) and marks.get("operational")):
            value = getattr(part, name)
            if isinstance(value, Part):
                found[name] = _lasting(value)
            elif isinstance(value, str) and name in (*part.places, "id"):
                found[name] = without_folders(value)
            else:
                found[name] = values[name]
    return {name: value for name, value in found.items() if value != {}}
