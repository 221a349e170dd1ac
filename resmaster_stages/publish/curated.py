"""Writes the curated index, and shards without the samples that somebody rejected.

Readers of tars cannot leave samples out, so a shard with rejected samples gets a copy without these, in `curated/`. A
shard without rejected samples is not copied: the index names its committed tar.

Invariants:
- Committed shards never change. A copy holds the files of the samples byte for byte.
- The name of a copy says which samples it lacks. So a copy that the earlier index names is not made again, and readers
  of an older index keep theirs until `gc` removes it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence

import pyarrow.compute as pc

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import StoredObject, describe, described
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.reading import committed_outputs
from resmaster_stages.dataset.schemas import manifest_schema
from resmaster_stages.errors import ShardError
from resmaster_stages.keys import digest
from resmaster_stages.storage.scratch import scratch_folder
from resmaster_stages.storage.shards import ShardWriter
from resmaster_stages.storage.tables import decode_table


def write_curated(dataset: Dataset, tars: Sequence[StoredObject]) -> tuple[StoredObject, list[StoredObject]]:
    """Write the curated index, and the shards that it needs, from the manifest and index that were just written.

    tars: the committed tars that the index names. Returns the curated index, and the tars that it names.
    Raises ShardError if a committed tar is gone or damaged.
    """
    index = json.loads(dataset.folder.read(layout.INDEX))
    rejected, known = _rejected(dataset), _known(dataset)
    shards, named = [], []
    for item, tar in zip(index["shardlist"], tars, strict=True):
        without = rejected.get(tar.name, ())
        if left := item["nsamples"] - len(without):
            made = _copy(dataset, tar, without, known) if without else tar
            shards.append({"url": made.name, "nsamples": left, "filesize": made.bytes, "sha256": made.sha256})
            named.append(made)
    text = json.dumps({**index, "shardlist": shards}, indent=1).encode()
    dataset.folder.write(layout.CURATED_INDEX, text)
    return described(layout.CURATED_INDEX, text), named


def _rejected(dataset: Dataset) -> dict[str, list[str]]:
    """Name of a committed tar -> the keys of its rejected samples, in order."""
    columns = ("key", "high_res_object", "verdict")
    table = decode_table(dataset.folder.read(layout.MANIFEST), manifest_schema(), layout.MANIFEST, columns)
    found: dict[str, list[str]] = {}
    for row in table.filter(pc.equal(table["verdict"], "rejected")).to_pylist():
        found.setdefault(row["high_res_object"], []).append(row["key"])
    return found


def _known(dataset: Dataset) -> dict[str, StoredObject]:
    """The tars that the earlier curated index names, by name. None if there is no such index, or if it is damaged."""
    try:
        index = json.loads(dataset.folder.read(layout.CURATED_INDEX))
        return {each["url"]: StoredObject(each["url"], each["sha256"], each["filesize"]) for each in index["shardlist"]}
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return {}


def _copy(
    dataset: Dataset, tar: StoredObject, without: Collection[str], known: Mapping[str, StoredObject]
) -> StoredObject:
    """The copy of a committed tar without some samples. One that is known and of its size is not made again."""
    _, shard = layout.object_of(tar.name) or ("", -1)
    receipt = dataset.commits("high_res").read(shard)
    if receipt is None or receipt.objects[0] != tar:
        raise ShardError(f"{tar.name}: another attempt was committed meanwhile; publish again")
    name = layout.curated_shard(shard, digest({"tar": tar.sha256, "without": sorted(without)}))
    if name in known and dataset.folder.size(name) == known[name].bytes:
        return known[name]
    with scratch_folder() as scratch, committed_outputs(dataset, receipt) as outputs:
        path = scratch / "curated.tar"
        with ShardWriter(path) as writer:
            for key in outputs:
                if key not in without:
                    writer.write(key, outputs[key].files)
        copy = describe(name, path)
        dataset.folder.upload(name, path)
    return copy
