"""kohya's sd-scripts: images with captions beside them, and `dataset.toml` for `--dataset_config`.

The trainer sorts images into aspect buckets itself. The file says in comments what each bucket will hold.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from resmaster_stages.publish.exports.buckets import STEP_PX, buckets, resolution_of
from resmaster_stages.publish.exports.format import Format, Part, Place, write_captioned

SHOWN_BUCKETS = 20
"""Maximum number of buckets that are told on the terminal. The file lists all."""
HEAD = f"""# Dataset of sd-scripts: accelerate launch sdxl_train_network.py --dataset_config dataset.toml ...
[general]
caption_extension = ".txt"
shuffle_caption = false
enable_bucket = true
bucket_no_upscale = true
bucket_reso_steps = {STEP_PX}
"""


def finish(parts: Sequence[Part], whole: Place, scratch: Path) -> Sequence[str]:
    """`dataset.toml` with a dataset for each part. Says what the buckets hold."""
    sections = [_section(part) for part in parts]
    whole.write("dataset.toml", "\n".join([HEAD, *(text for text, _ in sections)]).encode())
    lines = [line for _, lines in sections for line in lines]
    more = len(lines) - SHOWN_BUCKETS
    return lines if more <= 0 else [*lines[:SHOWN_BUCKETS], f"{more} more buckets are listed in dataset.toml"]


def _section(part: Part) -> tuple[str, list[str]]:
    """The dataset of one part as TOML, and its buckets in lines for people."""
    resolution = resolution_of(part.size, part.rows())
    found = buckets(part.rows(), resolution)
    sides = [side for bucket in found for side in bucket.size if side]
    settings = {
        "resolution": resolution,
        "min_bucket_reso": min([resolution, *sides]),
        "max_bucket_reso": max([resolution, *sides]),
        "batch_size": 1,
    }
    lines = [bucket.spelled() for bucket in found]
    text = [f"# {line}" for line in lines]
    text += ["[[datasets]]", *(f"{name} = {value}" for name, value in settings.items()), ""]
    text += ["  [[datasets.subsets]]", f"  image_dir = {toml_text(part.place.path('images'))}", "  num_repeats = 1", ""]
    return "\n".join(text), lines


def toml_text(text: str) -> str:
    """`text` as a string of TOML. JSON's strings are the same, but for one control character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


FORMAT = Format("kohya", "sd-scripts by kohya-ss, and trainers that read its folders", write_captioned, finish)
