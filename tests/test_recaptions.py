"""Stage 6, captions of finished images by style: rows, hashes, checks, and what readers and operators see of it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from resmaster_stages import recaptions
from resmaster_stages.config.dataset import CaptionsConfig, DatasetConfig, RecaptionConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.dataset import Dataset, create_or_open, open_dataset
from resmaster_stages.dataset.ledger import ledger_rows
from resmaster_stages.dataset.publication import read_publication
from resmaster_stages.dataset.retry import number_of, retries_of
from resmaster_stages.dataset.sample import EncodedImage, Sample
from resmaster_stages.dataset.schemas import RECAPTIONS_SCHEMA, manifest_schema
from resmaster_stages.dataset.stages import hashes_of, stages_of
from resmaster_stages.errors import ConfigError, SampleError
from resmaster_stages.inspection.explain import explain, spelled
from resmaster_stages.inspection.published import published_shards
from resmaster_stages.inspection.status import pending, status
from resmaster_stages.inspection.verify import verify
from resmaster_stages.models import captioner
from resmaster_stages.models.captioner import LocalCaptioner, load_captioner
from resmaster_stages.models.identity import Weights, weights_of
from resmaster_stages.models.licences import licences_of
from resmaster_stages.picturebook.truth import true_image
from resmaster_stages.planning.checks import check
from resmaster_stages.planning.estimate import estimate
from resmaster_stages.planning.preview import preview
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.publish.publish import publish
from resmaster_stages.recaptions import process, reduced
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.tables import TableWriter, decode_table
from tests.checkout import ROOT
from tests.fake_stages import EVERY_FAKE, planned
from tests.test_captions import FakeChat

TWO = {"short": "Say it in five words.", "long": "Describe everything."}
PICTUREBOOK = {"model": "picturebook", "styles": {"plain": "Describe it."}}
SERVER = {"model": "vlm", "source": "server", "base_url": "http://127.0.0.1:9/v1", "styles": TWO}
PROMPTS = ("a red house on a green meadow", "a blue boat on the water at night", "a white cat in the snow")


def config(**values: Any) -> DatasetConfig:
    return parse_config({"name": "d", **values})


def sample(image: Image.Image, key: str = "k") -> Sample:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Sample(key, 0, "a cat", "", 16, 16, 0, high_res=EncodedImage(buffer.getvalue(), "png", {"key": key}))


class Echo:
    """A captioner that says the instruction and the size of the image."""

    name, revision = "echo", "7"

    def __init__(self, settings: CaptionsConfig, answer: Callable[[str, Image.Image], str] | None = None) -> None:
        self.settings, self.answer = settings, answer or (lambda asked, image: f"{asked} {image.width}x{image.height}")

    def caption(self, images: Sequence[Image.Image]) -> list[str]:
        return [self.answer(self.settings.instruction, image) for image in images]


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recaptions, "load_captioner", lambda settings, device, told: Echo(settings))


# ------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.usefixtures("echo")
def test_every_style_gets_the_answer_to_its_instruction() -> None:
    settings = config(recaption={"model": "some/chat", "styles": TWO, "longest_px": 64})
    (output,) = process(settings, [sample(Image.new("RGB", (256, 128)))])
    assert output.error is None
    assert output.rows == [
        {"style": style, "caption": f"{TWO[style]} 64x32", "model": "echo", "revision": "7", "status": "ok"}
        for style in ("long", "short")
    ]
    assert {*output.rows[0], "key"} == set(RECAPTIONS_SCHEMA.names)


def test_an_answer_is_cleaned_and_no_answer_is_no_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"Say it in five words.": ' "The image shows a cat.\n\n', "Describe everything.": " \n"}
    monkeypatch.setattr(
        recaptions, "load_captioner", lambda settings, *_: Echo(settings, lambda asked, image: said[asked])
    )
    (output,) = process(config(recaption={"model": "some/chat", "styles": TWO}), [sample(Image.new("RGB", (8, 8)))])
    assert [(row["style"], row["caption"], row["status"]) for row in output.rows] == [
        ("long", None, "empty"),
        ("short", "a cat.", "ok"),
    ]


def test_an_image_that_cannot_be_captioned_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(asked: str, image: Image.Image) -> str:
        if image.width == 9:
            raise SampleError("refused")
        return "a cat"

    monkeypatch.setattr(recaptions, "load_captioner", lambda settings, device, told: Echo(settings, answer))
    images = [sample(Image.new("RGB", (width, 8)), str(width)) for width in (8, 9, 10)]
    broken = Sample("x", 0, "", "", 8, 8, 0, high_res=EncodedImage(b"no image", "png", {"key": "x"}))
    settings = config(recaption={"model": "some/chat", "styles": TWO})
    outputs = list(process(settings, [*images, broken, Sample("none", 0, "", "", 8, 8, 0)]))
    assert [output.key for output in outputs] == ["8", "9", "10", "x", "none"]
    assert [output.error is None for output in outputs] == [True, False, True, False, False]
    assert all(isinstance(output.error, SampleError) for output in outputs if output.error)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((256, 64), (64, 16)), ((64, 256), (16, 64)), ((1000, 1), (64, 1)), ((64, 64), (64, 64)), ((3, 5), (3, 5))],
)
def test_large_images_are_reduced_and_small_ones_stay(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = Image.effect_noise(size, 50).convert("RGB")
    small = reduced(image, 64)
    assert small.size == expected
    assert (small is image) == (size == expected)


def test_picturebook_describes_its_world_and_rows_depend_on_no_batch() -> None:
    settings = config(recaption=PICTUREBOOK)
    samples = [sample(true_image(prompt, 512, 512), str(number)) for number, prompt in enumerate(PROMPTS)]
    together = [output.rows for output in process(settings, samples)]
    alone = [output.rows for each in reversed(samples) for output in process(settings, [each])]
    assert together == alone[::-1]
    for (row,), word in zip(together, ("house", "boat", "cat"), strict=True):
        assert word in row["caption"]
        assert (row["style"], row["model"], row["status"]) == ("plain", "picturebook", "ok")
        assert row["revision"] == weights_of(settings).model.partition("@")[2]


# ------------------------------------------------------------------------------------------------ captioners and checks


def test_weights_are_loaded_once_for_all_styles_and_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    captioner._load_local.cache_clear()
    patches = load_captioner(CaptionsConfig(), "cpu")
    (image,) = recaptions.load_captioners(config(recaption=PICTUREBOOK, model={"device": "cpu"})).values()
    assert isinstance(patches, LocalCaptioner)
    assert isinstance(image, LocalCaptioner)
    assert image.model is patches.model
    assert captioner._load_local.cache_info().misses == 1
    assert (patches.instruction, image.instruction) == (CaptionsConfig().instruction, "Describe it.")


def test_a_chat_model_is_asked_each_instruction_by_one_set_of_weights() -> None:
    fake = FakeChat()
    first = LocalCaptioner(fake, fake, name="m", revision="", instruction="", max_new_tokens=1)
    for style, instruction in TWO.items():
        asked = first.asked(instruction, 9, captioner.told_of(config(recaption={"styles": TWO}).recaption))
        assert asked.caption([Image.new("RGB", (8, 8))]) == ["7 7"], style
        assert fake.conversations[0][0]["content"][1]["text"] == instruction
        assert fake.options["max_new_tokens"] == 9
    assert first.takes_instructions
    assert (first.instruction, first.max_new_tokens) == ("", 1)


def test_a_captioner_without_instructions_is_asked_for_one_style_only(tmp_path: Path) -> None:
    line = (
        "recaption.styles: the captioner picturebook takes no instruction, so long and short would be the same "
        "caption; keep one style, or name a chat model in recaption.model"
    )
    two = config(root=str(tmp_path), prompts="p", recaption={"styles": TWO})
    with pytest.raises(ConfigError) as caught:
        check(two)
    assert caught.value.mistakes == (line,)
    with pytest.raises(ConfigError, match="takes no instruction"):
        next(iter(process(two, [sample(Image.new("RGB", (8, 8)))])))
    one = check(config(root=str(tmp_path), prompts="p", recaption=PICTUREBOOK))
    assert [note for note in one.notes if "plain is the caption that it writes of any image" in note]
    assert not [note for note in check(config(root=str(tmp_path), prompts="p")).notes if "recaption" in note]


@pytest.mark.parametrize("file", ["chat_template.jinja", "processor_config.json", "tokenizer_config.json"])
def test_a_chat_model_is_known_by_its_files(file: str, tmp_path: Path) -> None:
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    settings = CaptionsConfig(model=str(tmp_path))
    assert not captioner.takes_instructions(settings)
    (tmp_path / file).write_text('{"chat_template": "{{ messages }}"}')
    assert captioner.takes_instructions(settings)
    assert captioner.takes_instructions(CaptionsConfig(source="server", model="vlm"))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"recaption": {"model": "./nowhere", "styles": TWO}}, "recaption.model: model ./nowhere: no such folder"),
        (
            {"captions": {"model": "./nowhere"}, "recaption": {"styles": TWO}},
            "captions.model: model ./nowhere: no such",
        ),
        (
            {"recaption": {"model": "vlm", "source": "server", "styles": TWO}},
            "recaption.source is `server` but recaption.base_url is missing",
        ),
        (
            {"recaption": {"model": "vlm", "source": "server", "base_url": "ftp://x", "styles": TWO}},
            "recaption.base_url 'ftp://x' is not an http:// or https:// address",
        ),
    ],
)
def test_a_captioner_that_cannot_be_used_is_known_before_the_first_commit(
    values: dict[str, Any], line: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        check(config(root=str(tmp_path), prompts="p", **values))
    assert any(line in each for each in caught.value.mistakes), caught.value.mistakes


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"styles": {"Long text": "x"}}, "style 'Long text': use 1 to 40 small letters"),
        ({"styles": {"short": " "}}, "style short: has no instruction; write what the captioner is asked"),
        ({"styles": {"short": "x" * 10_001}}, "has 10,001 characters"),
        ({"styles": {"short": "see http://me:secret@host"}}, "holds a user, password"),
        ({"styles": {f"s{number}": "x" for number in range(21)}}, "has 21 styles; give at most 20"),
        ({"source": "server"}, "source needs a captioner in model beside it"),
        ({"stylez": {}}, "unknown key 'recaption.stylez' (did you mean 'styles'?)"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(recaption=values)
    assert line in str(caught.value)
    assert "secret" not in str(caught.value)


def test_without_a_captioner_of_patches_one_must_be_named() -> None:
    for source in ("attention", "prompt"):
        with pytest.raises(ConfigError, match=f"captions.source: {source} has no captioner"):
            config(captions={"source": source}, recaption={"styles": TWO})
        assert config(captions={"source": source}, recaption=PICTUREBOOK).recaptioner().source == "model"


def test_a_captioner_of_its_own_comes_before_that_of_patches() -> None:
    captions = {"source": "server", "model": "small", "base_url": "http://a/v1", "max_new_tokens": 20}
    same = config(captions=captions, recaption={"styles": TWO}).recaptioner()
    assert (same.source, same.model, same.base_url, same.max_new_tokens) == ("server", "small", "http://a/v1", 150)
    own = {"model": "large", "source": "server", "styles": TWO}
    other = config(captions=captions, recaption=own).recaptioner()
    assert (other.source, other.model, other.base_url) == ("server", "large", "http://a/v1")
    elsewhere = config(captions=captions, recaption={**own, "base_url": "http://b/v1"}).recaptioner()
    assert elsewhere.base_url == "http://b/v1"
    local = config(captions=captions, recaption={"model": "owner/vlm", "revision": "v2", "styles": TWO}).recaptioner()
    assert (local.source, local.model, local.revision) == ("model", "owner/vlm", "v2")


# ----------------------------------------------------------------------------------------------------- hashes and plans


WEIGHTS = Weights("m", "c", "q")


def hashes(weights: Weights = WEIGHTS, **values: Any) -> dict[str, str]:
    return hashes_of(config(**values), weights)


def test_it_is_left_out_by_default_and_leaves_all_other_identities_as_they_were() -> None:
    assert "recaptions" not in stages_of(config())
    plain, more = hashes(), hashes(recaption={"model": "some/chat", "styles": TWO})
    assert list(more) == [*plain, "recaptions"]
    assert {stage: more[stage] for stage in plain} == plain


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"recaption": {"model": "some/chat", "styles": {**TWO, "short": "Another."}}}, {"recaptions"}),
        ({"recaption": {"model": "some/chat", "styles": {"short": TWO["short"]}}}, {"recaptions"}),
        ({"recaption": {"model": "other/chat", "styles": TWO}}, {"recaptions"}),
        ({"recaption": {"model": "some/chat", "styles": TWO, "longest_px": 512}}, {"recaptions"}),
        ({"recaption": {"model": "some/chat", "styles": TWO, "max_new_tokens": 9}}, {"recaptions"}),
        ({"recaption": {"model": "some/chat", "styles": dict(reversed(TWO.items()))}}, set()),
        ({"recaption": {"model": "some/chat", "styles": TWO, "base_url": "http://b/v1"}}, set()),
        ({"quality": {"max_seam": 9.0}}, {"quality"}),
        ({"upscale": {"steps": 7}}, {"high_res", "quality", "recaptions"}),
    ],
)
def test_what_changes_a_caption_and_nothing_else_makes_it_anew(values: dict[str, Any], changed: set[str]) -> None:
    own = {"recaption": {"model": "some/chat", "styles": TWO}}
    before, after = hashes(**own), hashes(**{**own, **values})
    assert {stage for stage in before if before[stage] != after[stage]} == changed


def test_other_weights_caption_anew() -> None:
    own = {"model": "some/chat", "styles": TWO}
    before = hashes(recaption=own)
    after = hashes(Weights("m", "c", "q", recaptioner="other"), recaption=own)
    assert {stage for stage in before if before[stage] != after[stage]} == {"recaptions"}
    assert weights_of(config()).recaptioner is None
    assert weights_of(config(recaption=PICTUREBOOK)).recaptioner == weights_of(config()).captioner


def test_plan_knows_its_time_and_its_licence(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    place = {"root": str(tmp_path), "prompts": str(tmp_path / "prompts.txt")}
    found = estimate(preview(config(**place, recaption=PICTUREBOOK)))
    (stage,) = [each for each in found.stages if each.stage == "recaptions"]
    assert stage.samples == 2
    assert 0.05 < (stage.seconds_per_sample or 0) < 0.1  # one caption of a small image
    assert stage.bytes > 0
    assert estimate(preview(config(**place, recaption=SERVER))).unknown == ("recaptions",)
    parts = [each.part for each in licences_of(config(recaption=PICTUREBOOK))]
    assert parts == ["base model", "captioner", "captioner of large images"]
    assert len(licences_of(config(recaption=SERVER))) == 2


# ------------------------------------------------------------------------------------------------- datasets and readers


def work(dataset: Dataset) -> None:
    retries, _ = retries_of(dataset)
    for stage in dataset.hashes:
        for shard in pending(dataset, stages=[stage], retries=retries)[stage]:
            run_stage(dataset, stage, shard, process=EVERY_FAKE[stage], number=number_of(retries, stage, shard))


@pytest.fixture
def fake_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))


def rows_of(dataset: Dataset) -> list[dict[str, Any]]:
    return pq.read_table(dataset.folder.open(layout.MANIFEST)).to_pylist()


@pytest.mark.usefixtures("fake_weights")
def test_a_dataset_that_exists_gets_captions_without_drawing_anything_again(tmp_path: Path) -> None:
    dataset = planned(tmp_path / "root", ["a", "b", "c"], tmp_path)
    work(dataset)
    write_manifest(dataset)
    assert [row["recaptions"] for row in rows_of(dataset)] == [None] * 3
    assert "recaptions" not in dataset.folder.read(layout.CARD).decode()

    more = RecaptionConfig.model_validate(SERVER)
    dataset = create_or_open(dataset.config.model_copy(update={"recaption": more}))
    todo = {stage: shards for stage, shards in pending(dataset).items() if shards}
    assert todo == {"recaptions": [0, 1]}
    work(dataset)
    publish(dataset)
    assert not any(pending(open_dataset(dataset.url)).values())
    assert not verify(dataset).damage
    assert status(dataset).stages[-1].samples_ok == 3
    rows = rows_of(dataset)
    assert [row["recaptions"] for row in rows] == [
        [{"style": style, "caption": f"{style} of {row['prompt']}"} for style in ("long", "short")] for row in rows
    ]
    assert {row["recaptions_hash"] for row in rows} == {dataset.hashes["recaptions"]}
    card = dataset.folder.read(layout.CARD).decode()
    assert "`recaptions/*.parquet`" in card
    assert "styles `long`, `short`" in card
    assert "caption   long: long of a" in spelled(explain(dataset, rows[0]["key"]))
    record = read_publication(dataset.folder)
    assert record is not None
    told = {shard.objects["recaptions"] for shard in published_shards(dataset.folder, record)}
    assert told == {row["recaptions_object"] for row in rows}


@pytest.mark.usefixtures("fake_weights")
def test_a_sample_without_caption_waits_for_repair_and_the_others_are_published(tmp_path: Path) -> None:
    prompts = ["a", "bad recaptions", "c"]
    dataset = planned(tmp_path / "root", prompts, tmp_path, samples_per_shard=3, recaption=SERVER)
    work(dataset)
    assert write_manifest(dataset).failures["recaptions"] == 1
    assert [row["prompt"] for row in rows_of(dataset)] == ["a", "c"]
    (failed,) = ledger_rows(dataset.commits("recaptions"))
    assert failed["message"] == "told to fail"
    assert dataset.commits("quality").read_all()[0].samples_ok == 3
    assert retries_of(dataset)[0] == {"recaptions": {"0": 2}}


def test_a_manifest_of_before_is_read(tmp_path: Path) -> None:
    schema = manifest_schema()
    names = [name for name in schema.names if not name.startswith("recaptions")]
    row = {field.name: None for field in schema if field.nullable}
    kinds = {"string": "x", "int64": 1, "int32": 1, "list<element: string>": [], "list<item: string>": []}
    row |= {field.name: kinds[str(field.type)] for field in schema if not field.nullable}
    with TableWriter(tmp_path / "manifest.parquet", schema) as table:
        table.write([row])
    whole = pq.read_table(tmp_path / "manifest.parquet")
    pq.write_table(whole.select(names), tmp_path / "old.parquet")
    (found,) = decode_table(tmp_path / "old.parquet", schema, "old.parquet").to_pylist()
    assert found["recaptions"] is None


def test_the_example_of_the_page_is_a_configuration() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    (example,) = re.findall(r"^```yaml\n(recaption:.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert list(config(**yaml.safe_load(example)).recaption.styles) == ["short", "long", "tags"]
