"""What is said of images that wrap before anything is computed."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset.stages import stage_hashes
from resmaster_stages.errors import ConfigError
from resmaster_stages.planning.checks import check, check_sizes, notes_of
from resmaster_stages.planning.drafts import draft_samples
from resmaster_stages.planning.estimate import _patches
from tests.tiny_transformers import make_flux

SAMPLING = {"steps": 3, "guidance_scale": 3.5}


def config_of(**changes: Any) -> DatasetConfig:
    return parse_config({"name": "wraps", **changes})


def test_low_res_images_that_do_not_wrap_are_told_of() -> None:
    (note,) = notes_of(config_of(upscale={"wrap": "both"}))
    assert note.startswith("upscale.wrap: both: low-res images do not continue")
    assert note.endswith("set low_res.wrap: both")
    (note,) = notes_of(config_of(upscale={"wrap": "both"}, low_res={"wrap": "horizontal"}))
    assert note.endswith("set low_res.wrap: both")
    assert list(notes_of(config_of(upscale={"wrap": "both"}, low_res={"wrap": "both"}))) == []
    assert list(notes_of(config_of(upscale={"method": "multidiffusion", "wrap": "both"}))) == [], "it follows no image"
    (note,) = notes_of(config_of(low_res={"wrap": "vertical"}))
    assert "set upscale.wrap: vertical too" in note
    assert list(notes_of(config_of(low_res={"wrap": "both"}, upscale={"method": "lanczos", "scale": 1}))) == []


def test_images_of_your_own_must_wrap_themselves() -> None:
    (note,) = notes_of(config_of(images="my-images", upscale={"wrap": "horizontal"}))
    assert note.startswith("upscale.wrap: horizontal: your images must themselves continue")
    assert list(notes_of(config_of(images="my-images", low_res={"wrap": "both"}))) == []


def test_sizes_on_the_way_that_cannot_wrap_are_refused_at_planning() -> None:
    """Targets of generated images are whole latents anyway. Images on the way to them need not be."""
    upscale = {"scale": 4, "via": [1.53], "wrap": "horizontal"}
    with pytest.raises(ConfigError, match=r"^upscale\.wrap: at 1\.53x its width 196 px is no multiple of 8") as caught:
        check_sizes(config_of(upscale=upscale))
    assert "\n" not in str(caught.value)
    check_sizes(config_of(upscale={**upscale, "wrap": "none"}))
    check_sizes(config_of(upscale={**upscale, "wrap": "vertical"}, low_res={"height": 800}))


def test_images_whose_size_cannot_wrap_are_rejected_one_by_one(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for width, height in ((64, 33), (65, 64)):
        Image.new("RGB", (width, height)).save(folder / f"{width}.png")
    values: dict[str, Any] = {"root": str(tmp_path / "out"), "images": str(folder)}
    draft = draft_samples(config_of(upscale={"scale": 2, "wrap": "horizontal"}, **values))
    assert [(each.width, each.height) for each in draft.samples] == [(64, 33)]
    (rejected,) = draft.rejected
    assert rejected.reason == (
        "at 2x its width 130 px is no multiple of 8, so the image cannot wrap there; choose another size or scale, or "
        "let this axis not wrap"
    )
    assert len(draft_samples(config_of(upscale={"scale": 2}, **values)).samples) == 2


def test_a_transformer_draws_no_whole_image_that_wraps(tmp_path: Path) -> None:
    make_flux().save_pretrained(tmp_path / "flux")
    (tmp_path / "p.txt").write_text("a red house\n")
    base: dict[str, Any] = {
        "root": str(tmp_path / "out"),
        "prompts": str(tmp_path / "p.txt"),
        "model": {"id": str(tmp_path / "flux"), "device": "cpu"},
        "captions": {"source": "prompt"},
        "quality": {"clip": None},
    }
    upscale = {"method": "direct", "scale": 2, "wrap": "both", **SAMPLING}
    with pytest.raises(ConfigError) as caught:
        check(config_of(**base, low_res={"wrap": "both", **SAMPLING}, upscale=upscale))
    first, second = caught.value.mistakes
    assert first.startswith("upscale.wrap: needs convolutions")
    assert "upscale.method to resmaster or multidiffusion" in first
    assert second.startswith("low_res.wrap: needs convolutions")
    assert "images: FOLDER" in second
    views = {**upscale, "method": "multidiffusion", "init": "noised_lr", "start": 0.3}
    (note,) = check(config_of(**base, low_res=SAMPLING, upscale=views)).notes
    assert "low_res.wrap" in note


def test_captions_are_written_anew_where_their_boxes_change() -> None:
    plain, wrapping = (stage_hashes(config_of(upscale={"wrap": wrap})) for wrap in ("none", "both"))
    assert plain == stage_hashes(config_of())
    assert {stage for stage in plain if plain[stage] != wrapping[stage]} == {"captions", "high_res", "quality"}
    assert stage_hashes(config_of(low_res={"wrap": "none"})) == plain
    assert stage_hashes(config_of(low_res={"wrap": "both"}))["low_res"] != plain["low_res"]
    assert _patches(config_of(upscale={"wrap": "both"}), 128, 128) == 64
    assert _patches(config_of(), 128, 128) == 49
