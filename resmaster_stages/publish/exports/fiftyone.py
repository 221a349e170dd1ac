"""FiftyOne: a dataset folder with images, prompts, metrics, flags as tags, and patch captions as boxes.

The folder has FiftyOne's type `LegacyFiftyOneDataset`, which any version of FiftyOne reads, because its values have no
database types. What FiftyOne exports can be read back as choices (`choices_in`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from resmaster_stages.dataset.curation import RATINGS, Choice, Verdict, now
from resmaster_stages.errors import UserError
from resmaster_stages.publish.exports.format import Format, Item, Part, Place, Row, json_of

LOW_RES = "fields/low_res"
"""Folder of the low-res images. FiftyOne takes the value of field `low_res` for a path because of this name."""
WHO = "fiftyone"
TAGS: tuple[Verdict, ...] = ("kept", "rejected")


def write(items: Iterator[Item], place: Place) -> Iterator[Row]:
    """The images, large and small. Yields samples as FiftyOne spells them."""
    for item in items:
        place.write(f"data/{item.file}", item.image)
        sample = {name: value for name, value in item.facts.items() if value is not None and name != "flags"}
        if item.low_res:
            sample["low_res"] = f"{LOW_RES}/{item.key}.{item.low_res.extension}"
            place.write(sample["low_res"], item.low_res.data)
        if item.captions:
            sample["captions"] = {
                "_cls": "Detections",
                "detections": [_box(row, *item.boxes_px) for row in item.captions],
            }
        yield {**sample, "filepath": f"data/{item.file}", "tags": list(item.facts["flags"]), "metadata": None}


def _box(row: Mapping[str, Any], height: int, width: int) -> Row:
    """The caption of a patch. A box that goes on at the opposite border ends at this one."""
    left, top = row["x0"] / width, row["y0"] / height
    right, bottom = min(1.0, row["x1"] / width), min(1.0, row["y1"] / height)
    box = [left, top, right - left, bottom - top]
    return {"_cls": "Detection", "label": row["caption"], "bounding_box": box, "tags": [], "attributes": {}}


def finish(parts: Sequence[Part], whole: Place, scratch: Path) -> Sequence[str]:
    """The list of samples of each part."""
    for part in parts:
        part.place.write("metadata.json", b'{"media_type": "image"}\n')
        part.place.write_lines("samples.json", _samples(part.rows()), scratch)
    return ()


def _samples(rows: Iterator[Row]) -> Iterator[str]:
    yield '{"samples": ['
    for number, row in enumerate(rows):
        yield (",\n " if number else "") + json_of(row)
    yield "]}\n"


FORMAT = Format("fiftyone", "FiftyOne (Dataset.from_dir)", write, finish, reads=("low_res", "captions"))


def choices_in(data: bytes, name: str = "samples.json", who: str = WHO, when: str = "") -> Iterator[Choice]:
    """What was chosen in FiftyOne, from the `samples.json` that it exported (types FiftyOneDataset and
    LegacyFiftyOneDataset). Samples without a verdict or rating give nothing.

    A tag `rejected` or `kept`, which the app gives by a few keys, counts more than the field `verdict`. The fields
    `rating` and `reason` count, too. who, when: of the choices ("": now). Raises UserError, naming `name`, for any
    other file, and for both tags at once.
    """
    try:
        samples = [*json.loads(data)["samples"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{name}: is no samples.json of FiftyOne; export the dataset from FiftyOne again") from error
    when = when or now()
    for number, sample in enumerate(samples):
        if not isinstance(sample, Mapping) or "key" not in sample:
            raise UserError(f"{name}: sample {number}: has no key; export a dataset that came from `resmaster export`")
        try:
            choice = _choice(sample, who, when)
        except (ValueError, TypeError) as error:
            raise UserError(f"{name}: sample {sample['key']}: {error}; mend that in FiftyOne") from error
        if not choice.empty:
            yield choice


def _choice(sample: Mapping[str, Any], who: str, when: str) -> Choice:
    """The choice in a sample of FiftyOne. Raises ValueError or TypeError."""
    if not isinstance(sample["key"], str):
        raise ValueError("its key is no text")
    tagged = [tag for tag in TAGS if tag in (sample.get("tags") or ())]
    if len(tagged) > 1:
        raise ValueError(f"has the tags {' and '.join(tagged)}")
    rating, reason = sample.get("rating"), sample.get("reason") or ""
    if isinstance(rating, bool):
        raise ValueError(f"rating {rating} is no number from {RATINGS[0]} to {RATINGS[-1]}")
    if not isinstance(reason, str):
        raise ValueError(f"reason {reason!r} is no text")
    return Choice(
        key=sample["key"],
        verdict=tagged[0] if tagged else sample.get("verdict") or "none",
        rating=int(rating) if isinstance(rating, float) and rating.is_integer() else rating,
        reason=reason,
        who=who,
        when=when,
        take=int(sample.get("take") or 0),
    )
