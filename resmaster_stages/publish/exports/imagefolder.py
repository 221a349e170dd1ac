"""Hugging Face's imagefolder: images/KEY.png, and `metadata.jsonl` with a row for each image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from resmaster_stages.publish.exports.format import Format, Item, Part, Place, Row, json_of


def write(items: Iterator[Item], place: Place) -> Iterator[Row]:
    """The images. Column `text` is the prompt under the name that training scripts look for."""
    for item in items:
        name = f"images/{item.file}"
        place.write(name, item.image)
        yield {"file_name": name, "text": item.prompt, **item.facts}


def finish(parts: Sequence[Part], whole: Place, scratch: Path) -> Sequence[str]:
    """The table of each part. A column without any value is left out, because the reader cannot tell its type."""
    for part in parts:
        known = {name for row in part.rows() for name, value in row.items() if value is not None}
        lines = (f"{json_of({name: row[name] for name in row if name in known})}\n" for row in part.rows())
        part.place.write_lines("metadata.jsonl", lines, scratch)
    return ()


FORMAT = Format("imagefolder", "Hugging Face's datasets, and the training scripts of diffusers", write, finish)
