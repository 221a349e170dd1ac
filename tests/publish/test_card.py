"""The dataset card: a header that the hub's rules allow, and facts without paths."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset.commit import StoredObject
from resmaster_stages.dataset.curation import Chosen
from resmaster_stages.dataset.plan import Plan
from resmaster_stages.publish.card import Contents, Publication, _size_category, dataset_card
from resmaster_stages.storage.filesystem import open_root
from tests.hub_server import SIZES, mistakes

CONTENTS = Contents([(64, 64)], 0, 3, {"high_res": [StoredObject("high_res/000000-00000000.tar", "", 5)]})


def card(contents: Contents = CONTENTS, samples: int = 3, chosen: Chosen = Chosen(), **values: Any) -> str:  # noqa: B008
    config = parse_config({"name": "demo", "prompts": "prompts.txt", **values})
    return dataset_card(
        config, Plan(open_root("nowhere"), ()), Publication(samples, 1, 0, {"low_res": 0}, chosen), contents
    )


def header(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def facts(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|`]+) \| (.*) \|$", text, re.MULTILINE))


@pytest.mark.parametrize("name", ["demo", "null", "123", "on", "1e5", "0x1F", "1_000", "2026-11-29", "No", "1-a"])
def test_the_header_is_valid_whatever_the_name(name: str) -> None:
    text = card(name=name)
    assert mistakes(text) == []
    assert header(text)["pretty_name"] == name
    assert not {"license", "language"} & set(header(text)), "they are the publisher's to state"


def test_names_of_files_stay_what_they_are() -> None:
    names = ["a: b.tar", "- x.tar", "{{ y }}.tar", "'\".tar", "\u202e.tar", "on", "---.tar"]
    tars = {"high_res": [StoredObject(name, "", 1) for name in names]}
    text = card(replace(CONTENTS, tars=tars))
    assert mistakes(text) == []
    assert header(text)["configs"][0]["data_files"] == [{"split": "train", "path": names}]
    assert "\u202e" not in text


@pytest.mark.parametrize(
    ("samples", "category"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1_000, "1K<n<10K"),
        (99_999, "10K<n<100K"),
        (10**6, "1M<n<10M"),
        (2 * 10**9, "1B<n<10B"),
    ],
)
def test_size_categories_are_those_of_the_hub(samples: int, category: str) -> None:
    assert _size_category(samples) == category
    assert category in SIZES


@pytest.mark.parametrize(
    ("values", "term", "tags"),
    [
        ({}, "trainedAlgorithmicMedia", ["synthetic", "high-resolution", "webdataset"]),
        (
            {"prompts": None, "images": "photos"},
            "compositeWithTrainedAlgorithmicMedia",
            ["synthetic", "high-resolution", "webdataset"],
        ),
        (
            {"prompts": None, "images": "photos", "upscale": {"method": "super_resolution"}},
            "compositeWithTrainedAlgorithmicMedia",
            ["synthetic", "high-resolution", "webdataset"],
        ),
        (
            {"prompts": None, "images": "photos", "upscale": {"method": "lanczos"}},
            "algorithmicallyEnhanced",
            ["high-resolution", "webdataset"],
        ),
    ],
)
def test_the_card_says_by_what_the_images_were_made(values: dict[str, Any], term: str, tags: list[str]) -> None:
    text = card(**values)
    assert f"[`{term}`](http://cv.iptc.org/newscodes/digitalsourcetype/{term})" in text
    assert header(text)["tags"] == tags
    assert mistakes(text) == []
    assert ("drawn from prompts" in text) is ("images" not in values)
    method = values.get("upscale", {}).get("method", "resmaster")
    assert f"by the method `{method}`" in text
    assert ("without a diffusion model" in text) is (method in ("lanczos", "super_resolution"))
    assert ("super-resolution network `picturebook`" in text) is (method == "super_resolution")
    assert ("| super-resolution network | `picturebook` | apache-2.0 |" in text) is (method == "super_resolution")


def test_who_wrote_the_captions() -> None:
    assert "No person wrote them" in card()
    assert "captioner" in card()
    assert "the attention of the base model" in card(captions={"source": "attention"})
    assert "the prompt itself" in card(captions={"source": "prompt"})
    assert "Captions of patches" not in card(upscale={"method": "multidiffusion"})


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("/home/alice/secret/prompts v2.txt", " of `prompts v2.txt`"),
        ("s3://bucket/secret/prompts.jsonl", " of `prompts.jsonl`"),
        ("https://host/secret/prompts.txt?version=secret#secret", " of `prompts.txt`"),
        ("/home/secret/a|b`c.txt", ""),
        ("/home/secret/<script>.txt", ""),
        ("/home/secret/[x](y).txt", ""),
        ("/home/secret/a\nb.txt", ""),
    ],
)
def test_of_the_input_only_the_last_name_is_told(place: str, shown: str) -> None:
    text = card(prompts=place)
    assert facts(text)["Input"] == f"0 prompts{shown}"
    assert "secret" not in text
    silent = card(replace(CONTENTS, prompted=1), prompts=None, images=place, replicas=2)
    of_images = f"0 images{shown}, 2 images each; 1 samples with a text beside the image, 2 without"
    assert facts(silent)["Input"] == of_images
    assert "secret" not in silent


def test_models_in_folders_are_named_without_them(tmp_path: Path) -> None:
    model = {"id": "/home/secret/models/own", "revision": None}
    text = card(model=model, captions={"model": "/home/secret/captioner"}, quality={"clip": "/home/secret/clip"})
    assert "secret" not in text
    assert "drawn from prompts by the base model `own`" in text
    assert "| base model | `own` |" in text
    assert "`stabilityai/sdxl-turbo`" in card(model={"id": "stabilityai/sdxl-turbo"})


def test_texts_are_a_task_only_where_there_are_texts() -> None:
    assert header(card())["task_categories"] == ["text-to-image", "image-to-image"]
    silent = card(replace(CONTENTS, prompted=0), prompts=None, images="photos")
    assert header(silent)["task_categories"] == ["image-to-image"]


def test_marks_and_choices_are_told_where_they_are() -> None:
    plain = card()
    assert not re.search("XMP|Chosen by people|curation.parquet", plain)
    marked = card(replace(CONTENTS, xmp=True), chosen=Chosen(1_200, 3, 40))
    assert "Each image file says so itself, in XMP" in marked
    assert "curation.parquet" in marked
    assert facts(marked)["Chosen by people"] == "1,200 kept, 3 rejected, 40 rated"


def test_a_further_view_is_a_configuration() -> None:
    tars = {**CONTENTS.tars, "curated": [StoredObject("curated/000000-00000000.tar", "", 1)]}
    found = header(card(replace(CONTENTS, tars=tars)))["configs"]
    assert [(config["config_name"], config.get("default", False)) for config in found] == [
        ("high_res", True),
        ("curated", False),
    ]
