"""ostris' AI Toolkit: images with captions beside them, and `datasets.yaml` to be put into the job's configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from resmaster_stages.publish.exports.buckets import resolution_of
from resmaster_stages.publish.exports.format import Format, Part, Place, write_captioned

HEAD = """# Put this into a job of AI Toolkit, under `process`.
# The trainer scales images down to about `resolution` px in the square, and cuts them to the nearest of its own shapes.
datasets:
"""


def finish(parts: Sequence[Part], whole: Place, scratch: Path) -> Sequence[str]:
    """`datasets.yaml` with a dataset for each part."""
    whole.write("datasets.yaml", (HEAD + "".join(map(_section, parts))).encode())
    return ()


def _section(part: Part) -> str:
    """The dataset of one part. A string of JSON is one of YAML, too, if it is ASCII."""
    return (
        f"  - folder_path: {json.dumps(part.place.path('images'))}\n"
        f'    caption_ext: "txt"\n'
        f"    shuffle_tokens: false\n"
        f"    resolution: [{resolution_of(part.size, part.rows())}]\n"
    )


FORMAT = Format("ai-toolkit", "AI Toolkit by ostris", write_captioned, finish)
