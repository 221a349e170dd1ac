"""MosaicML Streaming's MDS: `index.json` and shards that many machines stream from a store.

Columns: `image`, `key`, `prompt` and `facts` (JSON). The image has the encoding `png`, with which readers open it by
its content, so that WebP works too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from resmaster_stages.publish.exports.chunks import CHUNK_BYTES, chunks, record
from resmaster_stages.publish.exports.format import Format, Item, Part, Place, Row, json_of

COLUMNS = {"facts": "json", "image": "png", "key": "str", "prompt": "str"}
"""Name -> encoding. The format wants the names sorted."""
SHARD: dict[str, Any] = {
    "version": 2,
    "format": "mds",
    "compression": None,
    "hashes": ["sha256"],
    "size_limit": CHUNK_BYTES,
    "column_names": list(COLUMNS),
    "column_encodings": list(COLUMNS.values()),
    "column_sizes": [None] * len(COLUMNS),
}
"""What all shards have in common. Each shard holds it."""


def write(items: Iterator[Item], place: Place) -> Iterator[Row]:
    """The samples as some shards. Yields the shards' entries of the index."""
    header = json.dumps(SHARD, sort_keys=True).encode()
    for number, chunk in enumerate(chunks(map(_record, items), header)):
        name = f"shard.{place.shard:06d}.{number:03d}.mds"
        place.write(name, chunk.data)
        raw = {"basename": name, "bytes": len(chunk.data), "hashes": {"sha256": chunk.sha256}}
        yield {**SHARD, "raw_data": raw, "zip_data": None, "samples": chunk.samples}


def _record(item: Item) -> bytes:
    return record([json_of(item.facts).encode(), item.image, item.key.encode(), item.prompt.encode()])


def finish(parts: Sequence[Part], whole: Place, scratch: Path) -> Sequence[str]:
    """The index of each part."""
    for part in parts:
        part.place.write_lines("index.json", _index(part.rows()), scratch)
    return ()


def _index(shards: Iterator[Row]) -> Iterator[str]:
    yield '{"shards": ['
    for number, shard in enumerate(shards):
        yield (",\n " if number else "") + json_of(shard)
    yield '], "version": 2}\n'


FORMAT = Format("mds", "MosaicML Streaming (StreamingDataset)", write, finish)
