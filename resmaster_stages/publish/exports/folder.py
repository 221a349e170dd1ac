"""Plain files: KEY.png, KEY.txt (the prompt) and KEY.json (all that is known of the sample)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from resmaster_stages.publish.exports.format import Format, Item, Part, Place, Row, json_of, text_of


def write(items: Iterator[Item], place: Place) -> Iterator[Row]:
    """Three files for each sample."""
    for item in items:
        place.write(item.file, item.image)
        place.write(f"{item.key}.txt", text_of(item.prompt))
        place.write(f"{item.key}.json", f"{json_of({**item.facts, 'made': dict(item.made)})}\n".encode())
        yield {}


def finish(parts: Sequence[Part], whole: Place, scratch: Path) -> Sequence[str]:
    """Nothing."""
    return ()


FORMAT = Format("folder", "everything: plain images, texts and JSON", write, finish)
