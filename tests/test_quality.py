"""Stage 5: rows, flags, the CLIP score's plumbing, and the order of badness."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from resmaster_stages.config.dataset import QualityConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset.sample import EncodedImage, Output, Sample
from resmaster_stages.dataset.schemas import quality_schema
from resmaster_stages.errors import ConfigError, SampleError
from resmaster_stages.metrics.clip_score import ClipScorer, load_clip
from resmaster_stages.metrics.flags import badness, known_flags
from resmaster_stages.models.busy import timing
from resmaster_stages.quality import process
from tests.checkout import ROOT


def encode(image: Image.Image) -> EncodedImage:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return EncodedImage(data=buffer.getvalue(), extension="png", meta={})


def scene(size: int = 32, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(values).filter(ImageFilter.GaussianBlur(4))).astype(np.float32)
    return Image.fromarray(((smooth - smooth.min()) / np.ptp(smooth) * 180 + 30).astype(np.uint8))


def pair(key: str, low: Image.Image, high: Image.Image | None = None, prompt: str = "a boat") -> Sample:
    high = high or low.resize((low.width * 4, low.height * 4), Image.Resampling.BICUBIC)
    return Sample(
        key=key,
        index=0,
        prompt=prompt,
        negative_prompt="",
        height=low.height,
        width=low.width,
        replica=0,
        low_res=encode(low),
        high_res=encode(high),
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    for name, values in {"unet": {"sample_size": 4}, "vae": {"block_out_channels": [8, 8, 8, 8]}}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(values))
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    return parse_config({"name": "t", "model": {"id": str(folder)}, "quality": {"clip": None}})


def flags_of(output: Output) -> list[str]:
    return output.rows[0]["flags"]


def test_a_faithful_result_has_one_finite_row_without_flags(config: Any) -> None:
    (output,) = process(config, [pair("aa", scene())])
    (row,) = output.rows
    assert set(row) == set(quality_schema(config.quality).names) - {"key"}
    assert (row["width"], row["height"]) == (128, 128)
    assert row["clip_score"] is None
    assert row["flags"] == []
    assert row["agreement_psnr"] > 35
    assert all(np.isfinite(value) for value in row.values() if isinstance(value, float))


def test_each_flag_is_raised_by_its_defect(config: Any) -> None:
    low = scene()
    big = low.resize((128, 128), Image.Resampling.BICUBIC)
    values = np.asarray(big).astype(np.float32)
    edges = (np.indices((128, 128)) // 16).sum(axis=0) % 2 * 10.0 - 5.0  # views of 32 px, 16 px apart
    white = Image.new("RGB", (128, 128), "white")
    white.paste(big.crop((0, 0, 128, 80)))
    view, plain, marked = big.copy(), Image.new("RGB", (32, 32), (80, 80, 80)), Image.new("RGB", (32, 32), (80, 80, 80))
    view.paste((10, 40, 200), (32, 48, 64, 80))
    plain.putpixel((0, 0), (120, 120, 120))
    marked.paste((200, 190, 170), (12, 12, 20, 20))
    light = Image.fromarray((values + 40).clip(0, 255).astype(np.uint8))
    outputs = list(
        process(
            config,
            [
                pair("aa", low, big.transpose(Image.Transpose.ROTATE_180)),
                pair("bb", low, Image.fromarray((values + edges[:, :, None]).clip(0, 255).astype(np.uint8))),
                pair("cc", white.resize((32, 32), Image.Resampling.BOX), white),
                pair("dd", Image.new("RGB", (32, 32), (40, 40, 40))),
                pair("ee", scene(seed=4)),
                pair("ff", scene(seed=4)),
                pair("gg", Image.new("RGB", (32, 32), (90, 90, 90))),
                pair("hh", low, view),
                pair("ii", marked, plain.resize((128, 128), Image.Resampling.BICUBIC)),
                pair("jj", plain, marked.resize((128, 128), Image.Resampling.BICUBIC)),
                pair("kk", low, light),
            ],
        )
    )
    found = [flags_of(output) for output in outputs]
    assert "structure" in found[0]
    assert found[1:7] == [
        ["seam"],
        ["clipped"],
        ["blank"],
        [],
        [],  # as the one before, which is for the manifest to flag: it knows the whole dataset
        ["blank"],
    ]
    assert "border" in found[7]
    assert ("lost" in found[8], "added" in found[8]) == (True, False)
    assert ("lost" in found[9], "added" in found[9]) == (False, True)
    assert found[10] == ["structure", "colour"]
    assert {flag for output in outputs for flag in flags_of(output)} == set(known_flags(config.quality)) - {
        "near_duplicate"
    }
    assert outputs[4].rows[0]["phash"] == outputs[5].rows[0]["phash"], "by which it does"


def test_a_broken_image_costs_its_own_row(config: Any) -> None:
    good, bad, lost = pair("aa", scene()), pair("bb", scene()), pair("cc", scene())
    object.__setattr__(bad, "high_res", EncodedImage(data=b"", extension="png", meta={}))
    object.__setattr__(lost, "low_res", None)
    outputs = list(process(config, [bad, good, lost]))
    assert [type(output.error) for output in outputs] == [SampleError, type(None), SampleError]
    assert outputs[1].rows == next(process(config, [good])).rows


def test_the_page_on_evaluation_names_every_flag_with_its_threshold() -> None:
    page = (ROOT / "docs" / "evaluation-protocol.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (\w+) \| .*?(?:`((?:min|max)_\w+)` \| ([\d.]+).*)?\|$", page.split("### Flags")[1], re.MULTILINE
    )
    listed = {name: (setting, value) for name, setting, value in rows if name in known_flags()}
    assert list(listed) == list(known_flags())
    thresholds = {setting: float(value) for setting, value in listed.values() if setting}
    defaults = QualityConfig().model_dump()
    assert thresholds.pop("max_clipped") == 100 * defaults["max_clipped"]
    assert thresholds == {name: defaults[name] for name in thresholds}
    assert {name for name in defaults if name.startswith(("min_", "max_"))} == {*thresholds, "max_clipped"}


# -------------------------------------------------------------------------------------------------------- CLIP score


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model with random weights: plumbing only, its scores mean nothing."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(97, 123)]
    vocabulary = {
        t: i for i, t in enumerate([*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"])
    }
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shape, "vocab_size": 54, "max_position_embeddings": 16, "bos_token_id": 52, "eos_token_id": 53}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**shape, "image_size": 16, "patch_size": 8}, projection_dim=8)
    )
    model.save_pretrained(folder)
    # as one processor: its file is another than an image processor's alone
    processor = CLIPImageProcessorPil(size=16, crop_size=16, image_mean=[0.1, 0.2, 0.3])
    CLIPProcessor(processor, CLIPTokenizer.from_pretrained(folder)).save_pretrained(folder)
    return folder


def test_scores_do_not_depend_on_the_batch_and_see_the_whole_image(clip_folder: Path) -> None:
    scorer = load_clip(str(clip_folder), device="cpu")
    assert scorer._mean.tolist() == [0.1, 0.2, 0.3]
    wide = Image.new("RGB", (64, 16), "grey")
    marked = wide.copy()
    marked.paste((255, 0, 0), (0, 0, 8, 16))  # a centre crop would not see it
    texts = ["abc", "abcde" * 20, "a b"]
    images = [wide, marked, scene()]
    together = scorer.scores(images, texts)
    alone = [scorer.scores([image], [text])[0] for image, text in zip(images, texts)]
    assert together == pytest.approx(alone, abs=1e-3)
    embeds = [scorer._pixels(image) for image in (wide, marked)]
    assert np.abs(embeds[0] - embeds[1]).max() > 0.5
    assert scorer.scores([], []) == []
    with pytest.raises(ValueError, match="as many"):
        scorer.scores([wide], [])


@pytest.mark.parametrize(("cosine", "expected"), [(0.25, 25.0), (-0.5, 0.0), (1.0, 100.0)])
def test_a_score_is_a_hundred_times_the_positive_cosine(cosine: float, expected: float) -> None:
    import torch

    class Model:
        device, dtype = torch.device("cpu"), torch.float32

        class config:
            class vision_config:
                image_size = 8

            class text_config:
                max_position_embeddings = 77

        def __call__(self, **_inputs: Any) -> Any:
            text = torch.tensor([[2 * cosine, 2 * (1 - cosine**2) ** 0.5]])  # not normalised on purpose
            return type("O", (), {"image_embeds": torch.tensor([[3.0, 0.0]]), "text_embeds": text})()

    def tokenizer(_texts: list[str], **_options: Any) -> Any:
        return {"input_ids": torch.zeros(1, 1), "attention_mask": torch.ones(1, 1)}

    scorer = ClipScorer(Model(), tokenizer, [0.5] * 3, [0.5] * 3)
    assert scorer.scores([scene()], ["a boat"]) == pytest.approx([expected], abs=1e-4)


def test_the_stage_scores_prompts_and_leaves_none_without_one(config: Any, clip_folder: Path) -> None:
    with_clip = config.model_copy(update={"quality": QualityConfig(clip=str(clip_folder), device="cpu")})
    with timing() as device:
        outputs = list(process(with_clip, [pair("aa", scene()), pair("bb", scene(seed=2), prompt="")]))
    assert device.seconds > 0
    assert 0 <= outputs[0].rows[0]["clip_score"] <= 100
    assert outputs[1].rows[0]["clip_score"] is None


def test_the_stage_keeps_features_of_both_images_if_asked(config: Any, clip_folder: Path) -> None:
    assert next(process(config, [pair("aa", scene())])).arrays == {}
    asked = QualityConfig(clip=str(clip_folder), features="clip", device="cpu")
    with timing() as device:
        (output,) = process(config.model_copy(update={"quality": asked}), [pair("aa", scene())])
    assert device.seconds > 0
    assert {name: values.shape for name, values in output.arrays.items()} == {
        f"{image}.{view}": shape
        for image in ("high_res", "low_res")
        for view, shape in (("r", (8,)), ("c", (10, 8)), ("u", (10, 8)))
    }
    expected = load_clip(str(clip_folder), device="cpu").image_embeddings([scene()])[0]
    cosine = output.arrays["low_res.r"] @ expected / np.linalg.norm(expected) / 8**0.5
    assert cosine == pytest.approx(1.0, abs=1e-3)
    assert output.rows[0]["clip_score"] is not None


def test_a_clip_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quality\.clip") as error:
        load_clip(str(tmp_path), device="cpu")
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------- badness


WORST_PLACES = {"seam_worst": 20.0, "lost_worst": 5.0, "added_worst": 5.0, "colour_worst": 25.0}
"""Column -> what is as bad as can be."""


def row(**values: Any) -> dict[str, Any]:
    worst = dict.fromkeys(WORST_PLACES, 0.0)
    return {"agreement_psnr": 30.0, "seam": 1.0, **worst, "clipped": 0.0, "clip_score": 30.0, "flags": [], **values}


def test_badness_orders_the_worst_first() -> None:
    perfect = row(agreement_psnr=60.0, clip_score=100.0)
    assert badness(perfect) == 0.0
    order = [row(flags=["blank"]), row(flags=["seam"], seam=1.9), row(seam=1.4), row(clip_score=20.0), row(), perfect]
    assert [badness(r) for r in order] == sorted((badness(r) for r in order), reverse=True)
    assert badness(row(agreement_psnr=float("nan"))) < float("inf")
    assert badness(row(clip_score=None)) == pytest.approx(0.25 + 0.5)
    for name, most in WORST_PLACES.items():
        assert badness(row(**{name: most / 2})) == pytest.approx(badness(row()) + 0.5)
        assert badness(row(**{name: None})) == pytest.approx(badness(row()) + 0.5)  # a table of an older version
        assert badness(row(**{name: 9 * most})) == pytest.approx(badness(row()) + 1)
