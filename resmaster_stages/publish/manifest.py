"""Writes the manifest, the index of shards and the dataset card, from the plan, commit records and quality tables.

Metrics and flags come from the tables of the quality stage. Only the flag `near_duplicate` is added (by
`near_duplicates.py`), because it needs the whole dataset.

Invariants:
- Every key occurs at most once.
- Only shards that are committed in every stage, and not marked as damaged, are published. The card says how many shards
  are missing.
- Equal commits and settings give equal files: no time or host is in them. Only the licences in the card depend on which
  models' own cards lie on the machine.
- Rows, records and the index are written to disk as they come. Memory grows by 60 to 70 bytes per sample, and by the
  names in listings per shard (docs/scale.md has numbers).
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.chain import CHUNK_SHARDS, Chain, read_chains
from resmaster_stages.dataset.commit import Receipt, StoredObject, describe
from resmaster_stages.dataset.curation import Choice, count
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.publication import CommitsDigest
from resmaster_stages.dataset.schemas import manifest_schema
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import ShardError
from resmaster_stages.keys import digest_of_keys
from resmaster_stages.publish.card import Contents, Publication, dataset_card
from resmaster_stages.publish.curated import write_curated
from resmaster_stages.publish.near_duplicates import flag_near_duplicates
from resmaster_stages.redaction import quoted
from resmaster_stages.storage.scratch import scratch_folder
from resmaster_stages.storage.shards import Member, parse_image
from resmaster_stages.storage.tables import TableWriter, decode_table

TABLES = ("quality", "recaptions")
"""The stages whose rows are in the manifest."""


def write_manifest(
    dataset: Dataset, choices: Mapping[str, Choice] = MappingProxyType({}), curated: bool = False
) -> Publication:
    """Write manifest.parquet, index.json and README.md from what is committed. Replaces older files.

    choices: key -> what somebody chose about the sample. curated: also write the index without rejected samples.

    Raises ShardError if an object is gone or damaged, or if a key occurs twice.
    """
    config, plan = dataset.config, dataset.plan
    failures: dict[str, int] = dict.fromkeys(dataset.hashes, 0)
    seconds: dict[str, float] = dict.fromkeys(dataset.hashes, 0.0)
    sizes: set[tuple[int, int]] = set()
    prints = array("Q")
    prompted = 0
    published_tars: dict[str, list[StoredObject]] = {"high_res": [], "low_res": []}
    tars = frozenset(name for stage in published_tars for name in dataset.folder.names(stage))
    digest = CommitsDigest(dataset.hashes, config.quality.publication())
    complete = flagged = 0
    chosen: list[Choice] = []
    with scratch_folder() as scratch:
        local, local_index = scratch / layout.MANIFEST, scratch / layout.INDEX
        with (
            TableWriter(local, manifest_schema(config.quality)) as table,
            local_index.open("w", encoding="utf-8") as index,
        ):
            head = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": config.name}
            index.write(json.dumps(head)[:-1] + ', "shardlist": [')
            found = (
                (chain, list(_manifest_rows(dataset, shard, chain, tables, tars)))
                for shard, chain, tables in _complete_chains(dataset)
            )
            for chain, rows in flag_near_duplicates(dataset, found, scratch):
                chosen += _add_choices(rows, choices)
                table.write(rows)
                prints.extend(int(row["key"][:16], 16) for row in rows)
                prompted += sum(bool(row["prompt"]) for row in rows)
                sizes.update((row["height"], row["width"]) for row in rows)
                flagged += sum(bool(row["flags"]) for row in rows)
                complete += 1
                for stage, receipt in chain.committed.items():
                    failures[stage] += receipt.samples_failed
                    seconds[stage] += receipt.seconds
                    digest.add(receipt)
                    if stage in published_tars and receipt.samples_ok:  # readers may fail at an empty tar
                        published_tars[stage].append(receipt.objects[0])
                images = chain.committed["high_res"]
                if images.samples_ok:
                    tar = images.objects[0]
                    item = {"url": tar.name, "nsamples": images.samples_ok, "filesize": tar.bytes}
                    index.write(",\n " * (len(published_tars["high_res"]) > 1) + json.dumps(item))
            times = {stage: round(each, 3) for stage, each in seconds.items()}
            index.write(f'], "device_seconds": {json.dumps(times)}}}\n')
        if (twice := _repeated(local, prints)) is not None:
            raise ShardError(f"{dataset.url}: sample {twice} occurs twice; restore the folder plan/ from a copy")
        published = Publication(table.rows, complete, plan.shards - complete, failures, count(chosen))
        stored = [
            _uploaded(dataset, name, path) for name, path in {layout.MANIFEST: local, layout.INDEX: local_index}.items()
        ]
        if curated:
            index_object, published_tars["curated"] = write_curated(dataset, published_tars["high_res"])
            stored.append(index_object)
        card = scratch / layout.CARD
        xmp = config.image_metadata != "none"
        contents = Contents(sorted(sizes), flagged, prompted, published_tars, xmp, sum(seconds.values()))
        card.write_bytes(dataset_card(config, plan, published, contents).encode())
        stored.append(_uploaded(dataset, layout.CARD, card))
    return replace(published, commits=digest.hexdigest(), files=tuple(stored))


def _uploaded(dataset: Dataset, name: str, path: Path) -> StoredObject:
    """Upload a file. Returns its description."""
    dataset.folder.upload(name, path)
    return describe(name, path)


def published_chains(dataset: Dataset) -> Iterator[tuple[int, Chain]]:
    """Yield (shard, its commits) in order, for shards committed in every stage and not damaged."""
    damaged = {shard for stage in dataset.hashes for shard in dataset.commits(stage).marked()}
    for shard, chain in read_chains(dataset, range(dataset.plan.shards)):
        if shard not in damaged and chain.complete:
            yield shard, chain


def _complete_chains(dataset: Dataset) -> Iterator[tuple[int, Chain, dict[str, bytes]]]:
    """`published_chains`, with the quality tables (name -> content).

    The tables are fetched for many shards together. Missing tables are absent.
    """
    chains = published_chains(dataset)
    while batch := list(itertools.islice(chains, CHUNK_SHARDS)):
        needed = [stage for stage in TABLES if stage in dataset.hashes]
        names = [chain.committed[stage].objects[0].name for _, chain in batch for stage in needed]
        tables = dataset.folder.read_many(names)
        for shard, chain in batch:
            yield shard, chain, tables


def _manifest_rows(
    dataset: Dataset, shard: int, chain: Chain, tables: dict[str, bytes], tars: frozenset[str]
) -> Iterator[dict[str, Any]]:
    """The manifest's rows of one shard, in the plan's order.

    tables: name -> content of tables. tars: names of the tars that exist.
    """
    receipts = chain.committed
    low_res, high_res, quality = (receipts[name] for name in ("low_res", "high_res", "quality"))
    captions, planned = receipts.get("captions"), dataset.plan.read(shard)
    low_entries, high_entries = (
        _image_places(dataset, receipt, [each.key for each in planned if each.key not in lost], tars)
        for receipt, lost in ((each, {*each.lost_keys, *each.failed_keys}) for each in (low_res, high_res))
    )
    rows = {row["key"]: row for row in _rows_of(dataset, quality, tables)}
    recaptions = receipts.get("recaptions")
    described: dict[str, list[dict[str, str]]] = {}
    for row in _rows_of(dataset, recaptions, tables) if recaptions else ():
        described.setdefault(row["key"], []).append({"style": row["style"], "caption": row["caption"]})
    unfinished, takes = chain.unfinished(), chain.made()
    for sample in planned:
        if sample.key in unfinished:
            continue
        for found, receipt in (
            (low_entries, low_res),
            (high_entries, high_res),
            (rows, quality),
            (described, recaptions),
        ):
            if receipt and sample.key not in found:
                raise ShardError(
                    f"{receipt.objects[0].name}: lacks sample {sample.key}, which its commit record counts"
                )
        low_member, high_member = low_entries[sample.key], high_entries[sample.key]
        yield {
            **rows[sample.key],
            "key": sample.key,
            "index": sample.index,
            "shard": shard,
            "replica": sample.replica,
            "take": takes.get(sample.key, 0),
            "prompt": sample.prompt,
            "negative_prompt": sample.negative_prompt,
            "source": sample.source,
            "high_res_object": high_res.objects[0].name,
            "high_res_member": high_member.name,
            "high_res_offset": high_member.offset,
            "high_res_bytes": high_member.size,
            "low_res_object": low_res.objects[0].name,
            "low_res_member": low_member.name,
            "low_res_offset": low_member.offset,
            "low_res_bytes": low_member.size,
            "low_res_height": sample.height,
            "low_res_width": sample.width,
            "captions_object": captions.objects[0].name if captions else None,
            "recaptions_object": recaptions.objects[0].name if recaptions else None,
            "recaptions": described.get(sample.key),
            "low_res_hash": low_res.stage_hash,
            "captions_hash": captions.stage_hash if captions else None,
            "high_res_hash": high_res.stage_hash,
            "quality_hash": quality.stage_hash,
            "recaptions_hash": recaptions.stage_hash if recaptions else None,
        }


def _add_choices(rows: Sequence[dict[str, Any]], choices: Mapping[str, Choice]) -> list[Choice]:
    """Add to rows what was chosen about them. Returns these choices."""
    found = []
    for row in rows:
        choice = choices.get(row["key"])
        if choice and choice.take == row["take"]:
            row["verdict"], row["rating"] = None if choice.verdict == "none" else choice.verdict, choice.rating
            found.append(choice)
    return found


def _image_places(dataset: Dataset, receipt: Receipt, keys: Sequence[str], tars: frozenset[str]) -> dict[str, Member]:
    """Key -> place of its image in a committed tar with the samples `keys`, from the commit record."""
    name = receipt.objects[0].name
    if name not in tars:
        raise ShardError(_gone(dataset, receipt))
    if digest_of_keys(keys) != receipt.keys_digest or len(keys) != len(receipt.images):
        raise ShardError(
            f"{name}: its commit record is of other samples than the plan's; restore the folder plan/ from a copy"
        )
    try:
        return {key: parse_image(key, text) for key, text in zip(keys, receipt.images)}
    except ValueError as error:
        raise ShardError(
            f"{name}: damaged commit record ({error}); delete it, then run: resmaster repair {quoted(dataset.url)}"
        ) from error


def _rows_of(dataset: Dataset, receipt: Receipt, tables: dict[str, bytes]) -> list[dict[str, Any]]:
    name = receipt.objects[0].name
    if name not in tables:
        raise ShardError(_gone(dataset, receipt))
    schema = STAGES[receipt.stage].columns(dataset.config)
    rows: list[dict[str, Any]] = decode_table(tables[name], schema, name).to_pylist()
    return rows


def _gone(dataset: Dataset, receipt: Receipt) -> str:
    place = quoted(dataset.url)
    return f"{receipt.objects[0].name} is gone; run: resmaster verify {place}, then: resmaster repair {place}"


def _repeated(manifest: Path, prints: array[int]) -> str | None:
    """A key that occurs twice in a manifest, or None.

    prints: the first 64 bits of each key. They are sorted in place.
    """
    values = np.asarray(prints)
    values.sort()
    suspects = set(values[1:][values[1:] == values[:-1]].tolist())
    if not suspects:
        return None
    batches = pq.ParquetFile(manifest).iter_batches(columns=["key"])
    keys = (key for batch in batches for key in batch["key"].to_pylist())
    seen = Counter(key for key in keys if int(key[:16], 16) in suspects)
    return next((key for key, count in seen.items() if count > 1), None)
