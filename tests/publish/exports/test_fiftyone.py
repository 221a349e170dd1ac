"""The folder that FiftyOne reads, and the choices that come back from FiftyOne."""

import json
from pathlib import Path

import pytest

from resmaster_stages.dataset.curation import Choice, Session, read_choices
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.errors import UserError
from resmaster_stages.publish.exports.export import export
from resmaster_stages.publish.exports.fiftyone import choices_in
from resmaster_stages.publish.exports.record import Options
from tests.publish.exports.common import NAMES, WIDE, built, choose, image_of, key_of


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return built(tmp_path / "out", tmp_path)


def test_samples_have_images_metrics_choices_and_boxes(dataset: Dataset, tmp_path: Path) -> None:
    choose(dataset, "a house", "kept", 4)
    export(dataset, str(tmp_path / "x"), Options("fiftyone"))
    samples = json.loads((tmp_path / "x" / "samples.json").read_text())["samples"]
    assert [sample["prompt"] for sample in samples] == NAMES
    for sample in samples:
        assert (tmp_path / "x" / sample["filepath"]).read_bytes() == image_of(dataset, sample["prompt"])
        assert (tmp_path / "x" / sample["low_res"]).read_bytes() == image_of(dataset, sample["prompt"], "low_res")
        assert sample["tags"] == []
        assert None not in [value for name, value in sample.items() if name != "metadata"], "FiftyOne infers the types"
        assert len(sample["captions"]["detections"]) == 4
        right = 1 / 3 if sample["prompt"] == WIDE else 0.5
        assert sample["captions"]["detections"][3]["bounding_box"] == pytest.approx([right, 0.5, right, 0.5])
        assert sample["captions"]["detections"][3]["label"] == sample["prompt"]
    assert (samples[0]["verdict"], samples[0]["rating"]) == ("kept", 4)
    assert json.loads((tmp_path / "x" / "metadata.json").read_text()) == {"media_type": "image"}


def exported(**samples: dict) -> bytes:
    """What FiftyOne exports: its own values beside those of the user."""
    own = {"_id": {"$oid": "6b0c9ae0142545fb85f7792f"}, "_media_type": "image", "_rand": 0.5, "filepath": "data/x.png"}
    found = [{**own, "key": key, "tags": [], **sample} for key, sample in samples.items()]
    return json.dumps({"samples": found}).encode()


def test_tags_and_fields_come_back_as_choices(dataset: Dataset) -> None:
    data = exported(
        a={"tags": ["rejected", "seam"], "verdict": "kept", "rating": 5},
        b={"verdict": "kept", "reason": "sharp", "take": 2},
        c={"rating": 3.0, "verdict": None},
        d={"tags": ["validation"]},
    )
    found = list(choices_in(data))
    when = found[0].when
    assert found == [
        Choice("a", "rejected", 5, "", "fiftyone", when),
        Choice("b", "kept", None, "sharp", "fiftyone", when, take=2),
        Choice("c", "none", 3, "", "fiftyone", when),
    ]
    Session(dataset.folder).add(found)
    assert read_choices(dataset.folder) == {each.key: each for each in found}


def test_what_was_exported_comes_back_as_it_is(dataset: Dataset, tmp_path: Path) -> None:
    choose(dataset, "a house", "kept", 4)
    export(dataset, str(tmp_path / "x"), Options("fiftyone"))
    (choice,) = choices_in((tmp_path / "x" / "samples.json").read_bytes())
    assert (choice.key, choice.verdict, choice.rating) == (key_of(dataset, "a house"), "kept", 4)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is no samples.json of FiftyOne"),
        (b"[]", "is no samples.json of FiftyOne"),
        (b"[" * 100_000, "is no samples.json of FiftyOne"),
        (b'{"samples": 3}', "is no samples.json of FiftyOne"),
        (b'{"samples": ["x"]}', "sample 0: has no key"),
        (b'{"samples": [{"tags": []}]}', "sample 0: has no key"),
        (b'{"samples": [{"key": 7}]}', "sample 7: its key is no text"),
        (exported(a={"tags": ["kept", "rejected"]}), "sample a: has the tags kept and rejected"),
        (exported(a={"verdict": "maybe"}), "sample a: verdict 'maybe' is none of"),
        (exported(a={"rating": 9}), "sample a: rating 9 is no number from 1 to 5"),
        (exported(a={"rating": "4"}), "sample a: rating '4' is no number from 1 to 5"),
        (exported(a={"rating": True}), "sample a: rating True is no number from 1 to 5"),
        (exported(a={"verdict": "kept", "reason": 3}), "sample a: reason 3 is no text"),
    ],
)
def test_other_files_are_one_line(data: bytes, said: str) -> None:
    with pytest.raises(UserError) as error:
        list(choices_in(data, "mine.json"))
    assert str(error.value).startswith("mine.json: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
