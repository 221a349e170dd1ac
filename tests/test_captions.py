"""Stage 3 and the captioners: text clean-up, patches, batching, a local model, a server that misbehaves."""

from __future__ import annotations

import base64
import gzip
import http.client
import io
import itertools
import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from resmaster_stages import captions
from resmaster_stages.captions import Writer, caption_rows, even_batches, load_writer, process, style_suffix
from resmaster_stages.config.dataset import CaptionsConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.dataset.sample import EncodedImage, Sample
from resmaster_stages.dataset.schemas import CAPTIONS_SCHEMA
from resmaster_stages.diffusion.views import patch_grid, view_grid
from resmaster_stages.errors import ConfigError, SampleError, UserError
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.models.busy import timing
from resmaster_stages.models.captioner import (
    CAPTION_CHARACTERS,
    LocalCaptioner,
    ServerCaptioner,
    _load_local,
    clean_caption,
    load_captioner,
    shorten,
    token_counter,
)
from resmaster_stages.models.geometry import geometry_of
from tests.tiny_models import save
from tests.tiny_transformers import make_flux


def words(text: str) -> int:
    """A token counter for tests: one token per word, commas are words."""
    return len(text.replace(",", " , ").split())


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def gradient(height: int = 32, width: int = 32) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([y * 7 % 256, x * 7 % 256, (x + y) % 256], axis=2).astype(np.uint8))


def sample(key: str, image: bytes | None, prompt: str = "a red house") -> Sample:
    picture = None if image is None else EncodedImage(data=image, extension="png", meta={})
    return Sample(key=key, index=0, prompt=prompt, negative_prompt="", height=32, width=32, replica=0, low_res=picture)


class Echo:
    """Names the mean colour of what it sees, and remembers the batches."""

    name, revision = "echo", "1"

    def __init__(self, answer: Callable[[Image.Image], str] | None = None) -> None:
        self.batches: list[list[Image.Image]] = []
        self.answer = answer or (
            lambda image: "grey " + str(image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))
        )

    def caption(self, images: Any) -> list[str]:
        self.batches.append(list(images))
        return [self.answer(image) for image in images]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stage reads of an SDXL folder: two sizes and a tokenizer. Native 32 px, latent factor 8."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("model")
    for name, values in {"unet": {"sample_size": 4}, "vae": {"block_out_channels": [8, 8, 8, 8]}}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(values))
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = {
        t: i for i, t in enumerate([*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"])
    }
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder / "tokenizer")
    return folder


# ------------------------------------------------------------------------------------------------- text of captions


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("The image shows a red house.", "a red house."),
        ("This image patch depicts bricks", "bricks"),
        ("In this image, we can see two birds", "two birds"),
        ('"A boat"\n', "A boat"),
        ("**A photo of a boat**", "a boat"),
        ("Sure! Here is a description: The picture features snow", "snow"),
        ("<think>hm, bricks?</think> A wall", "A wall"),
        ("A wall\x00 with\x1b[31m ivy\u202e", "A wall with [31m ivy"),
        ("  \n ", ""),
        ("...", ""),
        ("there is a dog", "a dog"),
        ("the picture book lies open", "the picture book lies open"),
        ("a scenery of hills", "a scenery of hills"),
    ],
)
def test_clean_caption(raw: str, clean: str) -> None:
    assert clean_caption(raw) == clean


@given(st.text(max_size=80))
@settings(max_examples=150)
def test_clean_caption_is_idempotent_and_one_line(text: str) -> None:
    clean = clean_caption(text)
    assert clean_caption(clean) == clean
    assert clean == clean.strip()
    assert all(c.isprintable() or c == "\u200d" or c == " " for c in clean)


@given(st.lists(st.text("abcdefgh", min_size=1, max_size=12), max_size=120), st.sampled_from(["", ", oil painting"]))
@settings(max_examples=100)
def test_shorten_fits_keeps_a_prefix_and_the_suffix(parts: list[str], suffix: str) -> None:
    text = " ".join(parts)
    short, tokens, truncated = shorten(text, words, 75, suffix)
    assert tokens == words(short) <= 75
    assert truncated == (words(text + suffix) > 75)
    assert short.endswith(suffix)
    assert (text + suffix).startswith(short.removesuffix(suffix))
    if truncated:
        assert tokens == 75  # nothing more than needed was dropped


def test_shorten_cuts_text_without_blanks_between_characters() -> None:
    text, tokens, truncated = shorten("漢字" * 100, len, 75, ", ink")
    assert (text, tokens, truncated) == (("漢字" * 100)[:70] + ", ink", 75, True)


def test_real_tokens_are_counted_without_the_marks(model_folder: Path) -> None:
    count = token_counter(ModelConfig(id=str(model_folder)))
    assert count("abc de") == 5  # this vocabulary has no merges: one token per letter
    assert count("") == 0
    assert count("a" * 300) == 300


def test_a_style_that_leaves_no_room_is_refused() -> None:
    assert style_suffix("  oil  painting, ", words) == ", oil painting"
    assert style_suffix(" ", words) == ""
    with pytest.raises(ConfigError, match=r"captions.style has 61 tokens"):
        style_suffix("very " * 60, words)


# ----------------------------------------------------------------------------------------------------- sizes of models


def test_native_size_and_latent_factor_come_from_json(model_folder: Path) -> None:
    model = ModelConfig(id=str(model_folder))
    assert geometry_of(model) == Geometry(32, 8)


def test_a_model_without_sizes_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model_index.json.*give the top folder"):
        geometry_of(ModelConfig(id=str(tmp_path)))
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(ConfigError, match=r"unet/config.json.*give the top folder"):
        geometry_of(ModelConfig(id=str(tmp_path)))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="not a JSON object"):
        geometry_of(ModelConfig(id=str(tmp_path)))


# ------------------------------------------------------------------------------------------------------------- patches


def rows_of(
    image: Image.Image,
    captioner: Any,
    prompt: str = "a red house",
    grid: str = "views",
    clip: Any = None,
    **config: Any,
) -> list[dict[str, Any]]:
    values = CaptionsConfig(grid=grid, **config)  # type: ignore[arg-type]
    dataset = parse_config({"name": "t", "captions": {"grid": grid}})
    patches = patch_grid(dataset, Geometry(32, 8), image.height * 4, image.width * 4)
    writer = Writer(values, captioner, words, 75, style_suffix(values.style, words), clip)
    return caption_rows(image, prompt, patches, writer)


def test_views_overlap_tiles_do_not_and_both_end_at_the_border() -> None:
    image = gradient(20, 32)  # target 80 x 128: the last row of windows is pulled back
    views, tiles = rows_of(image, Echo()), rows_of(image, Echo(), grid="tiles")
    assert views[0]["grid"] == "80x128/32/16"
    assert tiles[0]["grid"] == "80x128/32/32"
    assert len(views) == 4 * 7
    assert [(r["row"], r["col"]) for r in tiles] == [(i, j) for i in range(3) for j in range(4)]
    assert (tiles[-1]["y0"], tiles[-1]["x0"], tiles[-1]["y1"], tiles[-1]["x1"]) == (48, 96, 80, 128)


def test_patches_beyond_a_border_that_wraps_continue_at_the_opposite_border() -> None:
    image, captioner = gradient(16, 32), Echo()
    grid = view_grid(Geometry(32, 8), 64, 128, 0.5, (False, True))
    writer = Writer(CaptionsConfig(), captioner, words, 75, "", None)
    table = caption_rows(image, "a red house", grid, writer)
    assert {row["grid"] for row in table} == {"64x128/32/16/horizontal"}
    assert [row["x1"] for row in table if row["row"] == 0] == [32, 48, 64, 80, 96, 112, 128, 144]
    crops = [crop for batch in captioner.batches for crop in batch]
    assert {crop.size for crop in crops} == {(32, 32)}
    rolled = Image.fromarray(np.roll(np.asarray(image), 4, axis=1))  # by one stride of the views, 16 px
    moved = captions.patches(rolled, grid)
    for number, crop in enumerate(crops):
        row, col = divmod(number, 8)
        there = np.asarray(moved[row * 8 + (col + 1) % 8]).astype(int)
        assert np.abs(np.asarray(crop).astype(int) - there).max() <= 1


def test_each_patch_is_a_crop_of_the_bicubic_reference() -> None:
    captioner = Echo()
    image = gradient()
    rows = rows_of(image, captioner, batch_size=5)
    crops = [crop for batch in captioner.batches for crop in batch]
    reference = np.asarray(image.resize((128, 128), Image.Resampling.BICUBIC)).astype(int)
    for row, crop in zip(rows, crops, strict=True):
        expected = reference[row["y0"] : row["y1"], row["x0"] : row["x1"]]
        # PIL's bicubic differs a little in its kernel; another patch would differ by far more
        assert np.abs(np.asarray(crop).astype(int) - expected).mean() < 3


def test_rows_fit_the_schema_and_say_who_wrote_them() -> None:
    row = rows_of(gradient(), Echo(lambda _: "bricks"), style="ink drawing")[0]
    assert set(row) == set(CAPTIONS_SCHEMA.names) - {"key"}
    assert row["caption"] == "bricks, ink drawing"
    assert (row["n_tokens"], row["truncated"], row["status"]) == (4, False, "ok")
    assert (row["model"], row["revision"]) == ("echo", "1")


def test_flat_patches_fall_back_without_asking_and_empty_answers_say_so() -> None:
    values = np.full((32, 32, 3), 128, np.uint8)
    values[:, 24:] = np.random.default_rng(0).integers(0, 256, (32, 8, 3))
    captioner = Echo(lambda image: "bricks" if image.getpixel((0, 0)) != (128, 128, 128) else '" "')
    rows = rows_of(Image.fromarray(values), captioner, grid="tiles", min_detail=1.0)
    status = {(row["row"], row["col"]): (row["status"], row["caption"]) for row in rows}
    assert status[0, 0] == status[3, 1] == ("fallback", "a red house")
    assert status[0, 3] == ("ok", "bricks")
    assert sum(len(batch) for batch in captioner.batches) < 16
    empty = rows_of(gradient(), Echo(lambda _: "\x00"))[0]
    assert (empty["status"], empty["caption"]) == ("empty", "a red house")


def test_without_a_captioner_every_patch_has_the_global_prompt() -> None:
    rows = rows_of(gradient(), None, prompt="word " * 99)
    assert {row["status"] for row in rows} == {"fallback"}
    assert {(row["n_tokens"], row["truncated"]) for row in rows} == {(75, True)}


@given(st.integers(0, 60), st.integers(1, 20))
def test_even_batches(items: int, size: int) -> None:
    batches = even_batches(range(items), size)
    assert [i for batch in batches for i in batch] == list(range(items))
    assert len(batches) == -(-items // size)
    assert not batches or max(map(len, batches)) - min(map(len, batches)) <= 1


# ----------------------------------------------------------------------------------------------------------- the check


class Colours:
    """A CLIP stand-in: reads colours' names, and sees a crop's mean colour."""

    names = ("red", "green", "blue")

    def image_embeddings(self, images: Any) -> Any:
        return np.stack([np.asarray(image, np.float32).mean((0, 1)) for image in images])

    def text_embeddings(self, texts: Any) -> Any:
        return np.asarray([[text.split(",")[0] == name for name in self.names] for text in texts], np.float32)


def in_turn(answers: list[str]) -> Callable[[Image.Image], str]:
    left = iter(answers)
    return lambda _: next(left)


BLUE = Image.new("RGB", (32, 32), (0, 0, 200))


def test_a_wrong_caption_is_replaced_whole_and_says_so() -> None:
    answers = ["blue"] * 49
    answers[24] = "red"
    rows = rows_of(BLUE, Echo(in_turn(answers)), clip=Colours(), style="ink drawing", batch_size=7)
    assert {row["caption"] for row in rows} == {"blue, ink drawing"}
    assert {row["n_tokens"] for row in rows} == {4}
    assert [number for number, row in enumerate(rows) if row["status"] == "replaced"] == [24]
    assert {row["status"] for row in rows} == {"ok", "replaced"}
    assert {row["fit"] for row in rows} == {100.0}
    assert set(rows[0]) == set(CAPTIONS_SCHEMA.names) - {"key"}
    unchecked = rows_of(BLUE, Echo(in_turn(answers)), style="ink drawing")
    assert (unchecked[24]["caption"], unchecked[24]["status"]) == ("red, ink drawing", "ok")
    assert {row["fit"] for row in unchecked} == {None}


def test_a_margin_beyond_reach_replaces_nothing_but_scores_all() -> None:
    rows = rows_of(BLUE, Echo(in_turn(["blue", "red"] * 25)), clip=Colours(), check={"margin": 100})
    assert [row["caption"] for row in rows] == (["blue", "red"] * 25)[:49]
    assert [row["fit"] for row in rows] == ([100.0, 0.0] * 25)[:49]


def test_a_single_view_keeps_its_caption() -> None:
    grid = view_grid(Geometry(32, 8), 32, 32, 0.5)
    (row,) = caption_rows(BLUE, "blue", grid, Writer(CaptionsConfig(), Echo(lambda _: "red"), words, 75, "", Colours()))
    assert (row["caption"], row["status"], row["fit"]) == ("red", "ok", 0.0)


def test_the_prompt_neither_gives_nor_takes() -> None:
    """Views without an answer hold the prompt, which would suit them all best."""
    answers = [""] * 49
    answers[24] = "red"
    rows = rows_of(BLUE, Echo(in_turn(answers)), prompt="blue", clip=Colours())
    assert (rows[24]["caption"], rows[24]["status"], rows[24]["fit"]) == ("red", "ok", 0.0)
    others = [row for number, row in enumerate(rows) if number != 24]
    assert {(row["caption"], row["status"], row["fit"]) for row in others} == {("blue", "empty", None)}
    assert {row["fit"] for row in rows_of(BLUE, None, clip=Colours())} == {None}


def test_the_model_of_the_check_is_loaded_as_configured(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(captions, "load_captioner", lambda *_: Echo())
    monkeypatch.setattr(captions, "load_clip", lambda *source: asked.append(source) or Colours())

    def judge(check: dict[str, Any], clip: str | None, **captions_config: Any) -> tuple[Any, ...] | None:
        asked.clear()
        values = {"name": "t", "model": {"id": str(model_folder)}, "captions": {"check": check, **captions_config}}
        writer = load_writer(parse_config({**values, "quality": {"clip": clip, "clip_revision": "1", "device": "cpu"}}))
        assert (writer.clip is None) == (not asked)
        return asked[0] if asked else None

    assert judge({}, "a/b") == ("a/b", "1", "cpu")
    assert judge({"clip": "c/d"}, "a/b") == ("c/d", None, "cpu")
    assert judge({"clip": "c/d", "clip_revision": "2"}, None) == ("c/d", "2", "cpu")
    assert judge({}, None) is None
    assert judge({"enabled": False}, "a/b") is None
    assert judge({}, "a/b", source="prompt") is None


def test_a_clip_model_that_is_not_there_is_one_line(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "load_captioner", lambda *_: Echo())
    config = config_for(model_folder, check={"clip": str(model_folder)})
    with pytest.raises(ConfigError, match=r"captions\.check\.clip") as error:
        list(process(config, [sample("aa", png(gradient()))]))
    assert "\n" not in str(error.value)


def test_picturebooks_clip_finds_a_planted_caption_and_leaves_true_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py")
    from resmaster_stages.picturebook import captions as sentences
    from resmaster_stages.picturebook.truth import true_image, true_scene

    prompt = "a red tree and a white boat on the water on a sunny day"
    config = parse_config({"name": "t", "captions": {"batch_size": 49}})
    grid = patch_grid(config, geometry_of(config.model), 512, 512)
    scene = true_scene(prompt, 512)
    answers = [sentences.caption(scene, (x0, y0, x1, y1)) for y0, x0, y1, x1 in grid.pixel_boxes]
    monkeypatch.setattr(captions, "load_captioner", lambda *_: Echo(in_turn(list(answers))))
    image = true_image(prompt, 128, 128)
    true = caption_rows(image, prompt, grid, load_writer(config))
    assert sum(row["status"] == "ok" for row in true) >= 40, "most of what is true stays"
    foreign = "close-up of leaves with veins of a purple tree and bricks of a green house"
    for planted in (0, 6, 24, 45):  # corners, the middle, a border
        wrong = [foreign if number == planted else text for number, text in enumerate(answers)]
        monkeypatch.setattr(captions, "load_captioner", lambda *_, wrong=wrong: Echo(in_turn(wrong)))
        rows = caption_rows(image, prompt, grid, load_writer(config))
        assert rows[planted]["status"] == "replaced"
        assert foreign not in {row["caption"] for row in rows}
        assert rows[planted]["fit"] > 20
        kept = [a["caption"] == b["caption"] for a, b in zip(true, rows)]
        assert sum(kept) >= 45, "one wrong caption hardly moves others"


# ----------------------------------------------------------------------------------------------------------- the stage


def config_for(folder: Path, **captions_config: Any) -> Any:
    return parse_config({"name": "t", "model": {"id": str(folder)}, "captions": captions_config})


def test_a_broken_neighbour_costs_its_own_sample_and_changes_no_other(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    echo = Echo()
    monkeypatch.setattr(captions, "load_captioner", lambda *_: echo)
    config = config_for(model_folder, batch_size=3)
    good = [sample("aa", png(gradient())), sample("cc", png(gradient().rotate(90)))]
    alone = [output for one in good for output in process(config, [one])]
    poisoned = list(process(config, [good[0], sample("bb", b"not an image"), sample("dd", None), good[1]]))
    assert [output.key for output in poisoned] == ["aa", "bb", "dd", "cc"]
    assert isinstance(poisoned[1].error, SampleError)
    assert isinstance(poisoned[2].error, SampleError)
    assert [poisoned[0].rows, poisoned[3].rows] == [output.rows for output in alone]
    assert len(alone[0].rows) == 49
    assert max(len(batch) for batch in echo.batches) <= 3


def test_the_size_of_the_image_counts_not_the_plan(model_folder: Path) -> None:
    (output,) = process(config_for(model_folder, source="prompt"), [sample("aa", png(gradient(16, 8)))])
    assert {row["grid"] for row in output.rows} == {"64x32/32/16"}
    assert {row["model"] for row in output.rows} == {""}


def test_a_captioner_that_loses_count_is_an_error(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(Echo):
        def caption(self, images: Any) -> list[str]:
            return ["one"]

    monkeypatch.setattr(captions, "load_captioner", lambda *_: Short())
    (output,) = process(config_for(model_folder), [sample("aa", png(gradient()))])
    assert "1 captions for" in str(output.error)


# ---------------------------------------------------------------------------------------------- words by attention


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A whole SDXL with random weights. Native 64 px."""
    from resmaster_stages.models.load import load_models

    yield save(tmp_path_factory.mktemp("whole") / "tiny")
    load_models.cache_clear()


def attended(folder: Path, prompt: str, image: Image.Image | None = None, **values: Any) -> list[dict[str, Any]]:
    config = config_for(folder, source="attention", **values)
    (output,) = process(config, [sample("aa", png(image or gradient(48, 64)), prompt)])
    assert output.error is None
    return list(output.rows)


def test_views_get_words_of_the_prompt_in_its_order(whole_model: Path) -> None:
    prompt = "a red house, by the sea - at night"
    rows = attended(whole_model, prompt, coverage=0.5)
    assert len(rows) == 35
    kept = [row["caption"] for row in rows if row["status"] == "ok"]
    assert len(set(kept)) > 3
    for caption in kept:
        rest = iter(prompt.split())
        assert all(word in rest for word in caption.split()), f"{caption!r} is not in the prompt's order"
    assert all(row["caption"] == prompt for row in rows if row["status"] != "ok")
    (source,) = {(row["model"], bool(row["revision"]), row["fit"]) for row in rows}
    assert source == ("tiny", True, None)
    assert all(row["n_tokens"] <= 75 for row in rows)


def test_with_coverage_0_every_view_gets_the_whole_prompt(whole_model: Path) -> None:
    prompt = "a  red house, by the sea - at night"
    rows = attended(whole_model, prompt, coverage=0)
    assert {(row["caption"], row["status"]) for row in rows} == {(prompt, "ok")}
    styled = attended(whole_model, prompt, coverage=0, style="oil painting")
    assert {row["caption"] for row in styled} == {f"{prompt}, oil painting"}


def test_views_that_keep_no_word_get_the_whole_prompt(whole_model: Path) -> None:
    full = attended(whole_model, "a red house", coverage=1)
    assert {row["caption"] for row in full if row["status"] == "empty"} == {"a red house"}
    empty = attended(whole_model, "")
    assert {(row["caption"], row["status"]) for row in empty} == {("", "empty")}
    flat = attended(whole_model, "a red house", Image.new("RGB", (64, 64)), min_detail=5, coverage=0)
    assert {(row["caption"], row["status"]) for row in flat} == {("a red house", "fallback")}


def test_a_prompt_that_is_too_long_or_of_another_script_is_cut_as_elsewhere(whole_model: Path) -> None:
    long = " ".join(chr(97 + number % 26) for number in range(120))
    rows = attended(whole_model, long, coverage=0)
    assert {row["caption"] for row in rows} == {long.rsplit(" ", 45)[0]}
    assert all(row["truncated"] and row["n_tokens"] == 75 for row in rows)
    for prompt in ("красный дом", "一只红色的房子", "🙂", "..."):
        captions_of = {row["caption"] for row in attended(whole_model, prompt)}
        assert all(set(caption.split()) <= set(prompt.split()) for caption in captions_of)


def test_words_do_not_depend_on_other_samples_and_own_images_have_any_size(whole_model: Path) -> None:
    config = config_for(whole_model, source="attention", coverage=0.5)
    several = [
        sample("aa", png(gradient(300, 20)), "a red house"),
        sample("bb", b"no image", "a dog"),
        sample("cc", png(gradient(13, 7)), "a cat by the sea"),
    ]
    together = list(process(config, several))
    assert isinstance(together[1].error, SampleError)
    for one, output in zip(several, together):
        (alone,) = process(config, [one])
        assert alone.rows == output.rows


def test_words_are_not_checked_by_clip(whole_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "load_clip", lambda *_: pytest.fail("no captioner, nothing to check"))
    assert attended(whole_model, "a red house")


def test_a_base_model_without_cross_attention_is_refused(tmp_path: Path) -> None:
    from resmaster_stages.models.load import load_models

    make_flux().save_pretrained(tmp_path / "flux")
    with pytest.raises(ConfigError, match=r"captions\.source: attention: needs attention, which model") as error:
        list(process(config_for(tmp_path / "flux", source="attention"), [sample("aa", png(gradient()))]))
    load_models.cache_clear()
    assert "set it to model, server or prompt" in str(error.value)


def test_images_on_the_way_get_words_of_their_own(whole_model: Path) -> None:
    from resmaster_stages.diffusion.cost import counting
    from resmaster_stages.library import upscale_as_configured
    from resmaster_stages.planning.workload import stage_work

    upscale = {"method": "c_upscale", "steps": 2, "scale": 3, "via": [1.5], "view_batch": 1}
    values = {"name": "t", "model": {"id": str(whole_model)}, "captions": {"source": "attention", "noise_levels": 3}}
    config = parse_config({**values, "upscale": upscale})
    with counting() as cost:
        upscale_as_configured(config, gradient(32, 64), "a red house")
    work = stage_work(config, 32, 64)
    assert [(each.rows, each.area) for each in work["captions"]] == [(3, 0.5)]
    assert sum(each.rows for stage in ("captions", "high_res") for each in work[stage]) == cost.rows
    areas = sum(each.rows * each.area for stage in ("captions", "high_res") for each in work[stage])
    assert areas == pytest.approx(cost.native_rows)


# ------------------------------------------------------------------------------------------------------ a local model


def tiny_vocabulary(folder: Path) -> Path:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(27))]
    path = folder / "vocab.txt"
    path.write_text("\n".join(tokens))
    return path


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP captioner with random weights: shapes and plumbing only, its words mean nothing."""
    import torch
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
    )

    folder = tmp_path_factory.mktemp("blip")
    tokenizer = BertTokenizer(str(tiny_vocabulary(folder)))
    text = {
        "vocab_size": 32,
        "hidden_size": 16,
        "encoder_hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer).save_pretrained(folder)
    return folder


def test_a_local_captioner_is_deterministic_and_bounded(blip_folder: Path) -> None:
    _load_local.cache_clear()
    captioner = load_captioner(CaptionsConfig(model=str(blip_folder), max_new_tokens=6), "cpu")
    assert isinstance(captioner, LocalCaptioner)
    images = [gradient(), gradient().rotate(90), Image.new("RGB", (32, 32), "red")]
    with timing() as device:
        first = captioner.caption(images)
    assert device.seconds > 0
    assert len(first) == 3
    assert first == captioner.caption(images)
    assert all(len(text.split()) <= 6 for text in first)
    assert captioner.caption([]) == []


@pytest.fixture(scope="module")
def git_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GIT captioner with random weights, few positions and CLIP's tokenizer, whose padding is its end mark."""
    import torch
    from transformers import CLIPImageProcessorPil, CLIPTokenizer, GitConfig, GitForCausalLM, GitProcessor

    folder = tmp_path_factory.mktemp("git")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    letters = [chr(c) for c in range(97, 123)]
    vocabulary = {
        t: i for i, t in enumerate([*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"])
    }
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = GitConfig(
        vision_config={**shape, "image_size": 16, "patch_size": 8},
        **shape,
        vocab_size=54,
        max_position_embeddings=12,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    GitForCausalLM(config).half().save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    GitProcessor(processor, CLIPTokenizer(vocab=vocabulary, merges=[])).save_pretrained(folder)
    return folder


def test_a_captioner_with_few_positions_stays_within_them_and_batches_do_not_matter(
    git_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    _load_local.cache_clear()
    captioner = load_captioner(CaptionsConfig(model=str(git_folder), max_new_tokens=75), "cpu")
    assert isinstance(captioner, LocalCaptioner)
    assert captioner.model.dtype == torch.float32  # half precision on disk
    images = [gradient(), gradient().rotate(90), Image.new("RGB", (32, 24), "red")]
    together = captioner.caption(images)
    assert together == [captioner.caption([image])[0] for image in images]
    assert all(text for text in together)
    assert "attention mask" not in caplog.text


class FakeChat:
    """Stands in for a chat model's processor and model: what goes in, and that the prompt's tokens are cut off."""

    chat_template = "x"
    is_encoder_decoder = False

    def __init__(self) -> None:
        import torch

        self.tokenizer, self.config = type("T", (), {"padding_side": "right"})(), self
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.conversations: Any = None
        self.options: dict[str, Any] = {}

    def get_text_config(self) -> Any:
        return self

    def apply_chat_template(self, conversations: Any, **_options: Any) -> dict[str, Any]:
        import torch

        self.conversations = conversations
        return {"input_ids": torch.ones(len(conversations), 5, dtype=torch.long), "extra": "text"}

    def generate(self, input_ids: Any, **options: Any) -> Any:
        import torch

        self.options = options
        return torch.cat([input_ids, torch.full((len(input_ids), 2), 7)], dim=1)

    def batch_decode(self, tokens: Any, **_options: Any) -> list[str]:
        return [" ".join(map(str, row.tolist())) for row in tokens]


def test_a_chat_model_is_asked_the_instruction_and_answers_without_it() -> None:
    fake = FakeChat()
    captioner = LocalCaptioner(fake, fake, name="m", revision="", instruction="Describe!", max_new_tokens=9)
    assert captioner.caption([gradient(), gradient()]) == ["7 7", "7 7"]
    content = fake.conversations[1][0]["content"]
    assert content[1] == {"type": "text", "text": "Describe!"}
    assert isinstance(content[0]["image"], Image.Image)
    assert fake.tokenizer.padding_side == "left"
    assert fake.options["do_sample"] is False
    assert fake.options["max_new_tokens"] == 9


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_captioner(CaptionsConfig(model=str(tmp_path)), "cpu")
    assert "\n" not in str(error.value)
    assert "captions.source" in str(error.value)


# ---------------------------------------------------------------------------------------------------------- a server

Reply = tuple[int, bytes]


def answer(text: str | None) -> Reply:
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


class Server:
    """An HTTP server that replies from a list, the last reply for ever, and remembers what it was sent."""

    def __init__(self, replies: list[Reply], headers: dict[str, str] | None = None) -> None:
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        lock, owner = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    owner.requests.append((self.path, dict(self.headers), body))
                    code, content = replies.pop(0) if len(replies) > 1 else replies[0]
                self.send_response(code)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[Server, ServerCaptioner, list[float]]]]:
    servers: list[Server] = []

    def start(*replies: Reply, headers: dict[str, str] | None = None) -> tuple[Server, ServerCaptioner, list[float]]:
        server = Server(list(replies), headers)
        servers.append(server)
        waits: list[float] = []
        captioner = ServerCaptioner(
            server.url + "/", "vlm", instruction="Describe!", max_new_tokens=40, concurrency=2, sleep=waits.append
        )
        return server, captioner, waits

    yield start
    for server in servers:
        server.close()


def test_a_server_gets_the_image_the_instruction_and_the_key(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test\n")
    server, captioner, waits = serve(answer("a wall"))
    assert captioner.caption([gradient()] * 3) == ["a wall"] * 3
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sk-test"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("vlm", 0, 40)
    image, text = body["messages"][0]["content"]
    assert text["text"] == "Describe!"
    kind, _, data = image["image_url"]["url"].partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (32, 32)
    assert waits == []


def test_a_busy_server_is_asked_again_after_the_time_it_names(serve: Any) -> None:
    server, captioner, waits = serve((429, b"{}"), (503, b""), answer("a wall"), headers={"Retry-After": "7"})
    assert captioner.caption([gradient()]) == ["a wall"]
    assert waits == [7.0, 7.0]
    assert len(server.requests) == 3


@pytest.mark.parametrize("named", ["86400", "1e400", "nan", "-7", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_a_time_that_no_worker_can_wait_is_a_minute_at_most(serve: Any, named: str) -> None:
    _, captioner, waits = serve((429, b"{}"), answer("a wall"), headers={"Retry-After": named})
    assert captioner.caption([gradient()]) == ["a wall"]
    assert [0 < wait <= 60 for wait in waits] == [True]


def test_waits_grow_with_jitter_and_are_bounded(serve: Any) -> None:
    _, captioner, waits = serve((500, b"oops"))
    with pytest.raises(SampleError, match="HTTP 500, 5 times"):
        captioner.caption([gradient()])
    assert len(waits) == 4
    assert all(0.5 * 2**i <= wait <= 2**i for i, wait in enumerate(waits))


@pytest.mark.parametrize(
    "body", [b"not json", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": 5}}]}']
)
def test_malformed_answers_cost_one_sample(serve: Any, body: bytes) -> None:
    _, captioner, _ = serve((200, body))
    with pytest.raises(SampleError, match="malformed answer"):
        captioner.caption([gradient()])


def test_a_refused_image_costs_one_sample_at_once(serve: Any) -> None:
    server, captioner, _ = serve((400, b"content\npolicy"))
    with pytest.raises(SampleError, match=r"refused an image \(HTTP 400\): content policy"):
        captioner.caption([gradient()])
    assert len(server.requests) == 1


@pytest.mark.parametrize(("code", "hint"), [(401, "OPENAI_API_KEY"), (404, "base_url"), (302, "final address")])
def test_wrong_settings_are_the_users_to_mend(
    serve: Any, monkeypatch: pytest.MonkeyPatch, code: int, hint: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server, captioner, _ = serve((code, b"sk-secret"), headers={"Location": "http://127.0.0.1:9/"})
    with pytest.raises(ConfigError, match=hint) as error:
        captioner.caption([gradient()])
    assert "sk-secret" not in str(error.value)
    assert len(server.requests) == 1


def test_a_server_that_has_nothing_to_say_says_nothing(serve: Any) -> None:
    _, captioner, _ = serve(answer(None))
    assert captioner.caption([gradient()]) == [""]


def test_a_rate_limit_without_end_and_an_absent_server_are_user_errors(serve: Any) -> None:
    server, captioner, _ = serve((429, b""))
    with pytest.raises(UserError, match="rate limit"):
        captioner.caption([gradient()])
    server.close()
    server.close = lambda: None  # type: ignore[method-assign]
    with pytest.raises(UserError, match="is it running"):
        captioner.caption([gradient()])


class Rude:
    """A server that sends whatever bytes it is given to each request, and counts how many it got rid of."""

    def __init__(self, pieces: Callable[[], Iterator[bytes]]) -> None:
        self.sent = 0
        owner = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                length = next(
                    int(line.split(b":")[1])
                    for line in iter(self.rfile.readline, b"")
                    if b"content-length" in line.lower()
                )
                while self.rfile.readline().strip():
                    pass
                self.rfile.read(length)
                with suppress(OSError):  # the client has heard enough
                    for piece in pieces():
                        self.wfile.write(piece)
                        owner.sent += len(piece)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def ask(self, timeout_seconds: float = 30.0) -> str:
        """The caption of one image, asked for twice at most."""
        captioner = ServerCaptioner(self.url, "vlm", instruction="", max_new_tokens=9, sleep=lambda seconds: None)
        captioner.attempts, captioner.timeout_seconds = 2, timeout_seconds
        return captioner.caption([gradient()])[0]


@pytest.fixture
def rude() -> Iterator[Callable[[Callable[[], Iterator[bytes]]], Rude]]:
    servers: list[Rude] = []

    def start(pieces: Callable[[], Iterator[bytes]]) -> Rude:
        servers.append(Rude(pieces))
        return servers[-1]

    yield start
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


OK = b"HTTP/1.1 200 OK\r\n"
SIZED = OK + b"Content-Length: 999999999999999\r\n\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
KIB = b"x" * 1024


@pytest.mark.parametrize(
    ("start", "piece", "reason"),
    [
        (SIZED, KIB, "longer than 1024 KiB"),
        (OK + b"\r\n", KIB, "longer than 1024 KiB"),
        (CHUNKED, b"400\r\n" + KIB + b"\r\n", "longer than 1024 KiB"),
        (CHUNKED + b"1\r\n{\r\n0\r\n", b"trailer: x\r\n", "."),
        (CHUNKED + b"ffffffffffffffff\r\n", KIB, "longer than 1024 KiB"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", "longer than 1024 KiB"),
        (OK, b"a: b\r\n", "100 headers"),
        (OK + b"a: ", KIB, "header"),
        (b"", KIB, "."),
        (b"HTTP/1.1 400 No\r\n" + b"Content-Length: 99999999999\r\n\r\n", KIB, "refused an image"),
    ],
)
def test_a_server_that_never_stops_sending_costs_a_mebibyte_and_one_sample(
    rude: Any, start: bytes, piece: bytes, reason: str
) -> None:
    """128 MiB are there to be read, per request."""
    server = rude(lambda: itertools.chain([start], itertools.repeat(piece, (128 << 20) // len(piece))))
    with pytest.raises((SampleError, UserError), match=reason) as caught:
        server.ask()
    assert server.sent < 2 * (32 << 20), "the rest was never read: only buffers of the system took it"
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value) or "refused" in str(caught.value)


def test_a_server_behind_tls_is_held_to_the_same_length(rude: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test leaves the encryption out: the connection is made as one without."""
    monkeypatch.setattr(http.client.HTTPSConnection, "connect", http.client.HTTPConnection.connect)
    server = rude(lambda: itertools.chain([SIZED], itertools.repeat(KIB, 128 << 10)))
    server.url = server.url.replace("http://", "https://")
    with pytest.raises(SampleError, match=r"https://.*longer than 1024 KiB"):
        server.ask()
    assert server.sent < 2 * (32 << 20)


@pytest.mark.parametrize("start", [b"", OK, OK + b"Content-Length: 999\r\n\r\n", CHUNKED])
def test_a_server_that_sends_byte_by_byte_does_not_hold_a_worker(rude: Any, start: bytes) -> None:
    """Each byte comes long before the time-out of a read; all of them never come."""
    over = threading.Event()

    def pieces() -> Iterator[bytes]:
        yield start
        while not over.wait(0.02):
            yield b"1"

    server = rude(pieces)
    try:
        with pytest.raises(UserError, match=r"cannot be used \((the answer does not end|timed out), 2 attempts\)"):
            server.ask(timeout_seconds=0.3)
    finally:
        over.set()


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("body", "headers", "reason"),
    [
        (DEEP, b"", "nested too deeply"),
        (b'{"choices": ' + DEEP + b"}", b"", "nested too deeply"),
        (b"<!doctype html><title>Log in</title>", b"Content-Type: text/html\r\n", "malformed"),
        (gzip.compress(bytes(1 << 24)), b"Content-Encoding: gzip\r\n", r"compressed \(gzip\)"),
        (b"\xff\xfe\x00", b"", "malformed"),
        (b'{"choices": {"0": 1}}', b"", "no choices"),
        (b'{"choices": "abc"}', b"", "no choices"),
        (b'{"choices": [{"message": "abc"}]}', b"", "no choices"),
        (b'{"choices": [{"message": {"content": {"a": 1}}}]}', b"", "content is not text"),
        (b'{"choices": [{"message": {"content": [{"text": {"a": []}}]}}]}', b"", "content is not text"),
        (b'{"choices": [' + b"9" * 5000 + b"]}", b"", "malformed"),
        (b"", b"", "malformed"),
    ],
)
def test_an_answer_that_is_none_costs_one_sample_and_says_what_it_was(
    rude: Any, body: bytes, headers: bytes, reason: str
) -> None:
    whole = OK + headers + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    with pytest.raises(SampleError, match=reason) as caught:
        rude(lambda: iter([whole])).ask()
    assert str(caught.value).endswith("2 times for one image; look at the server, and check captions.base_url")


@pytest.mark.parametrize(
    ("said", "clean"),
    [
        ("a wall\0 of \ud800 stone", "a wall of stone"),
        ("\u202ea wall\u202c\u2066", "a wall"),
        ("a\x1b[2Jwall\x9b", "a [2Jwall"),
        ("<think>" + "hm " * 50_000 + "</think> a wall", "a wall"),
        (" ".join(["The image shows"] * 50_000), ""),
        ("a" * 900_000, "a" * CAPTION_CHARACTERS),
    ],
)
def test_odd_texts_become_plain_captions_in_bounded_time(serve: Any, said: str, clean: str) -> None:
    _, captioner, _ = serve(answer(said))
    caption = clean_caption(captioner.caption([gradient()])[0])
    assert caption.startswith(clean)
    assert len(caption) <= CAPTION_CHARACTERS
    caption.encode()


def test_a_server_needs_an_address() -> None:
    with pytest.raises(ConfigError, match=r"captions\.base_url is missing"):
        load_captioner(CaptionsConfig(source="server", model="vlm"))
    with pytest.raises(ConfigError, match="not an http"):
        load_captioner(CaptionsConfig(source="server", model="vlm", base_url="file:///etc/passwd"))


def test_a_key_that_cannot_be_a_header_is_not_shown(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a\nsecret")
    _, captioner, _ = serve(answer("x"))
    with pytest.raises(ConfigError) as error:
        captioner.caption([gradient()])
    assert "secret" not in str(error.value)
