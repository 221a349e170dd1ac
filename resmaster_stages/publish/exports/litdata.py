"""Lightning's LitData: `index.json` and chunks that many machines stream from a store.

A sample is a dictionary with `image` (the encoded image as bytes), `key`, `prompt` and `facts` (JSON as text).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from resmaster_stages.keys import digest
from resmaster_stages.publish.exports.chunks import CHUNK_BYTES, chunks, record
from resmaster_stages.publish.exports.format import Format, Item, Part, Place, Row, json_of

FIELDS = {"image": "bytes", "key": "str", "prompt": "str", "facts": "str"}
"""Name -> serializer, in the order in which a record holds them."""
_LEAF: Row = {"type": None, "context": None, "children_spec": []}
_DICTIONARY = {"type": "builtins.dict", "context": json.dumps(list(FIELDS)), "children_spec": [_LEAF] * len(FIELDS)}
CONFIG = {
    "chunk_bytes": CHUNK_BYTES,
    "chunk_size": None,
    "compression": None,
    "data_format": list(FIELDS.values()),
    "data_spec": json.dumps([1, _DICTIONARY]),
    "encryption": None,
    "item_loader": "PyTreeLoader",
}
"""What the chunks hold. `data_spec` is torch's spelling of a dictionary with these keys."""


def write(items: Iterator[Item], place: Place) -> Iterator[Row]:
    """The samples as some chunks. Yields the chunks' entries of the index."""
    for number, chunk in enumerate(chunks(map(_record, items))):
        name = f"chunk-{place.shard}-{number}.bin"
        place.write(name, chunk.data)
        yield {
            "chunk_bytes": len(chunk.data),
            "chunk_size": chunk.samples,
            "dim": None,
            "filename": name,
            "sha256": chunk.sha256,
        }


def _record(item: Item) -> bytes:
    return record([item.image, item.key.encode(), item.prompt.encode(), json_of(item.facts).encode()])


def finish(parts: Sequence[Part], whole: Place, scratch: Path) -> Sequence[str]:
    """The index of each part. Readers keep copies of chunks by `updated_at`, so it changes with the chunks alone."""
    for part in parts:
        entries = list(part.rows())
        index = {"chunks": entries, "config": CONFIG, "updated_at": digest(entries)}
        part.place.write("index.json", f"{json_of(index)}\n".encode())
    return ()


FORMAT = Format("litdata", "Lightning's LitData (StreamingDataset)", write, finish)
