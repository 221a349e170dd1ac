"""What readers use: the manifest, the index of shards and the dataset card, from commit records only.

Knows nothing about models, and computes nothing about images: qualities come from the quality stage's tables.

Invariants:
- Every key occurs at most once.
- Only shards committed in every stage and not known to be damaged are published; the card says how many are still missing.
- Equal commits give equal files: no time or host is in them.
- Rows, records and the index go to disk as they come. What grows is 8 bytes per sample, and per shard the names that listings
  give (docs/scale.md has numbers).
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from resmaster_stages.config import DatasetConfig, Stage
from resmaster_stages.errors import ShardError
from resmaster_stages.identity import digest_of_keys
from resmaster_stages.lineage import stage_hashes
from resmaster_stages.scratch import scratch_folder
from resmaster_stages.storage import layout
from resmaster_stages.storage.commit import Receipt
from resmaster_stages.storage.damage import marked_shards
from resmaster_stages.storage.dataset import Dataset
from resmaster_stages.storage.plan import Plan, read_plan
from resmaster_stages.storage.shards import Member, parse_image, read_index
from resmaster_stages.storage.tables import MANIFEST_SCHEMA, QUALITY_SCHEMA, TableWriter, decode_table
from resmaster_stages.supplements import CHUNK_SHARDS, Chain, read_chains


@dataclass(frozen=True)
class Publication:
    """What was published."""

    samples: int
    """Samples that survived every stage."""
    shards: int
    """Shards committed in every stage."""
    shards_missing: int
    """Planned shards that are not."""
    failures: dict[Stage, int]
    """Stage -> samples that failed in it, in published shards."""


def write_manifest(dataset: Dataset, config: DatasetConfig | None = None) -> Publication:
    """Write manifest.parquet, index.json and README.md of what is committed, replacing older ones.

    Raises ShardError if an object is gone or damaged, or if a key occurs twice.
    """
    config = config or dataset.config
    plan = read_plan(dataset.folder)
    hashes = stage_hashes(config)
    damaged = {shard for stage, own_hash in hashes.items() for shard in marked_shards(dataset.folder, stage, own_hash)}
    failures: dict[Stage, int] = dict.fromkeys(hashes, 0)
    sizes: set[tuple[int, int]] = set()
    prints = array("Q")
    tars = frozenset(name for stage in ("low_res", "high_res") for name in dataset.folder.names(stage))
    complete = flagged = listed = total_bytes = 0
    chains = (
        (shard, chain)
        for shard, chain in read_chains(dataset.folder, hashes, plan.shards)
        if shard not in damaged and all(link.commit for link in chain.links.values())
    )
    with scratch_folder() as scratch:
        local, local_index = scratch / layout.MANIFEST, scratch / layout.INDEX
        with TableWriter(local, MANIFEST_SCHEMA) as table, local_index.open("w", encoding="utf-8") as index:
            head = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": config.name}
            index.write(json.dumps(head)[:-1] + ', "shardlist": [')
            while batch := list(itertools.islice(chains, CHUNK_SHARDS)):
                tables = _quality_tables(dataset, [chain for _, chain in batch])
                for shard, chain in batch:
                    rows = list(_manifest_rows(dataset, plan, shard, chain, tables, tars))
                    table.write(rows)
                    prints.extend(int(row["key"][:16], 16) for row in rows)
                    sizes.update((row["height"], row["width"]) for row in rows)
                    flagged += sum(bool(row["flags"]) for row in rows)
                    complete += 1
                    for stage, link in chain.links.items():
                        failures[stage] += len(link.failed)
                    for receipt in chain.links["high_res"].receipts:
                        if receipt.samples_ok:  # an empty tar would only make readers stumble
                            tar = receipt.objects[0]
                            item = {"url": tar.name, "nsamples": receipt.samples_ok, "filesize": tar.bytes}
                            index.write(",\n " * bool(listed) + json.dumps(item))
                            listed += 1
                            total_bytes += tar.bytes
            index.write("]}\n")
        if (twice := _repeated(local, prints)) is not None:
            raise ShardError(f"{dataset.url}: sample {twice} occurs twice; restore the folder plan/ from a copy")
        published = Publication(table.rows, complete, plan.shards - complete, failures)
        card = dataset_card(config, plan, published, sorted(sizes), flagged, total_bytes)
        dataset.folder.upload(layout.MANIFEST, local)
        dataset.folder.upload(layout.INDEX, local_index)
    dataset.folder.write(layout.CARD, card.encode())
    return published


def _repeated(manifest: Path, prints: array[int]) -> str | None:
    """A key that occurs twice in a manifest. `prints`: the first 64 bits of its keys, all that is held of them; sorted in place."""
    values = np.asarray(prints)
    values.sort()
    suspects = set(values[1:][values[1:] == values[:-1]].tolist())
    if not suspects:
        return None
    batches = pq.ParquetFile(manifest).iter_batches(columns=["key"])
    keys = (key for batch in batches for key in batch["key"].to_pylist())
    seen = Counter(key for key in keys if int(key[:16], 16) in suspects)
    return next((key for key, count in seen.items() if count > 1), None)


def _manifest_rows(
    dataset: Dataset, plan: Plan, shard: int, chain: Chain, tables: dict[str, bytes], tars: frozenset[str]
) -> Iterator[dict[str, Any]]:
    """The manifest's rows of one shard, in the plan's order.

    `tables`: the content of its quality tables, by name. `tars`: names of the tars that are there.
    """
    planned = plan.read(shard)
    indices: dict[str, dict[str, Member]] = {}
    qualities: dict[str, dict[str, dict[str, Any]]] = {}
    for sample in planned:
        holders = {stage: chain.holder(stage, sample.key) for stage in chain.links}
        if not all(holders.values()):
            continue
        low_res, high_res, quality = holders["low_res"], holders["high_res"], holders["quality"]
        captions = holders.get("captions")
        assert low_res is not None
        assert high_res is not None
        assert quality is not None
        for receipt in (low_res, high_res):
            if receipt.attempt not in indices:
                lost = chain.lost(receipt.stage)
                own = receipt.keys or [each.key for each in planned if each.key not in lost]
                indices[receipt.attempt] = _images(dataset, receipt, own, tars)
        if quality.attempt not in qualities:
            qualities[quality.attempt] = {row["key"]: row for row in _quality_rows(dataset, quality, tables)}
        low_entries, high_entries = indices[low_res.attempt], indices[high_res.attempt]
        rows = qualities[quality.attempt]
        for found, receipt in ((low_entries, low_res), (high_entries, high_res), (rows, quality)):
            if sample.key not in found:
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
            "low_res_hash": low_res.stage_hash,
            "captions_hash": captions.stage_hash if captions else None,
            "high_res_hash": high_res.stage_hash,
            "quality_hash": quality.stage_hash,
        }


def _images(dataset: Dataset, receipt: Receipt, keys: Sequence[str], tars: frozenset[str]) -> dict[str, Member]:
    """Key -> place of its image in a committed tar that holds `keys`: from its commit record, else from the tar's headers."""
    name = receipt.objects[0].name
    if name not in tars:
        raise ShardError(_gone(dataset, receipt))
    if not receipt.images:  # a record of an earlier version
        with dataset.folder.open(name) as file:
            return {entry.key: entry.image[1] for entry in read_index(file, name)}
    if digest_of_keys(keys) != receipt.keys_digest or len(keys) != len(receipt.images):
        raise ShardError(
            f"{name}: its commit record is of other samples than the plan's; restore the folder plan/ from a copy"
        )
    try:
        return {key: parse_image(key, text) for key, text in zip(keys, receipt.images)}
    except ValueError as error:
        raise ShardError(f"{name}: damaged commit record ({error}); delete it, then run: resmaster repair") from error


def _quality_tables(dataset: Dataset, chains: Sequence[Chain]) -> dict[str, bytes]:
    """Name -> content of the chains' quality tables, fetched together; what is gone is absent."""
    receipts = [receipt for chain in chains for receipt in chain.links["quality"].receipts]
    return dataset.folder.read_many([receipt.objects[0].name for receipt in receipts])


def _quality_rows(dataset: Dataset, receipt: Receipt, tables: dict[str, bytes]) -> list[dict[str, Any]]:
    name = receipt.objects[0].name
    if name not in tables:
        raise ShardError(_gone(dataset, receipt))
    rows: list[dict[str, Any]] = decode_table(tables[name], QUALITY_SCHEMA, name).to_pylist()
    return rows


def _gone(dataset: Dataset, receipt: Receipt) -> str:
    return (
        f"{receipt.objects[0].name} is gone; run: resmaster verify {dataset.url}, then: resmaster repair {dataset.url}"
    )


# ----------------------------------------------------------------------------------------------------------------------
# the card


def dataset_card(
    config: DatasetConfig,
    plan: Plan,
    published: Publication,
    sizes: list[tuple[int, int]],
    flagged: int,
    total_bytes: int,
) -> str:
    """The dataset's README.md: a YAML header as dataset hubs read it, facts, and code that reads the dataset.

    `sizes`: the (height, width) that occur, in px, sorted. `flagged`: samples with a flag.
    """
    facts = [
        ("Samples", f"{published.samples:,}"),
        ("Shards", f"{published.shards:,}" + (f" ({published.shards_missing:,} still missing)" * bool(published.shards_missing))),
        ("High-resolution images", f"{_size_range(sizes)} px, {spell_bytes(total_bytes)}"),
        ("Low-resolution images", "the user's own" if config.images else f"generated by `{_model(config)}`"),
        ("Upscaled by", f"`{config.upscale.method}`, scale {config.upscale.scale:g}, model `{_model(config)}`"),
        ("Failed samples", ", ".join(f"{stage}: {count}" for stage, count in published.failures.items())),
        ("Flagged by the quality stage", f"{flagged:,} (kept; see the column `flags`)"),
        ("Inputs rejected or repeated", f"{sum(g.rejected_count for g in plan.generations):,} rejected, "
         f"{sum(g.duplicates for g in plan.generations):,} repeated"),
        ("Base seed", str(config.seed)),
    ]  # fmt: skip
    return CARD.format(
        name=config.name,
        size_category=_size_category(published.samples),
        facts="\n".join(f"| {name} | {value} |" for name, value in facts),
        captions=CAPTIONS_LINE if config.upscale.uses_captions() else "",
        features=FEATURES_LINE.format(config.quality.features) if config.quality.features != "none" else "",
    )


CAPTIONS_LINE = "| `captions/*.parquet` | one caption per patch, with its pixel box (y0, x0, y1, x1; half-open) |\n"
FEATURES_LINE = "| `quality/*.features.parquet` | feature vectors ({}) of every image and of crops, for FID and KID without images |\n"

CARD = """\
---
pretty_name: {name}
size_categories:
- {size_category}
task_categories:
- text-to-image
- image-to-image
tags:
- synthetic
- high-resolution
- webdataset
---

# {name}

High-resolution images with their low-resolution originals, prompts and quality measures, made by ResMaster Pipeline.

| | |
|---|---|
{facts}

## Files

Follow `index.json` or `manifest.parquet`, not folder listings: folders may hold leftovers of interrupted attempts.

| File | Content |
|---|---|
| `manifest.parquet` | one row per sample: prompt, where its images lie, sizes, quality |
| `index.json` | the shards of high-resolution images |
| `high_res/*.tar`, `low_res/*.tar` | WebDataset shards: `KEY.webp` or `KEY.png`, `KEY.json`, `KEY.txt` (the prompt) |
{captions}| `quality/*.parquet` | the quality measures, also in the manifest |
{features}
## Reading it

All samples, with webdataset (run it in this folder):

```python
import json

import webdataset as wds

shards = [shard["url"] for shard in json.load(open("index.json"))["shardlist"]]
for sample in wds.WebDataset(shards, shardshuffle=False).decode("pil"):
    image, prompt = sample.get("webp", sample.get("png")), sample["txt"]
```

Chosen samples, with pyarrow and one range read each:

```python
import io

import pyarrow.parquet as pq
from PIL import Image

for row in pq.read_table("manifest.parquet", filters=[("agreement_psnr", ">", 20)]).to_pylist():
    with open(row["high_res_object"], "rb") as shard:
        shard.seek(row["high_res_offset"])
        image = Image.open(io.BytesIO(shard.read(row["high_res_bytes"])))
```
"""


def _model(config: DatasetConfig) -> str:
    revision = config.model.revision
    return f"{config.model.id}@{revision}" if revision else config.model.id


def _size_range(sizes: list[tuple[int, int]]) -> str:
    """Sizes (height, width) as width x height, the smallest and the largest."""
    shown = [f"{width}x{height}" for height, width in sizes]
    return "no" if not shown else shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"


def spell_bytes(count: float) -> str:
    """`1234567` -> `1.2 MB`."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _size_category(samples: int) -> str:
    """The size category that dataset hubs use."""
    limits = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((name for limit, name in limits if samples < limit), "n>1M")
