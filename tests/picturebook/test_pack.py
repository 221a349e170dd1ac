"""The shipped pack: every part loads offline with sane shapes, and does what it was trained for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageOps
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPModel,
    CLIPProcessor,
)

from resmaster_stages.config.dataset import QualityConfig
from resmaster_stages.metrics.features import load_extractor
from resmaster_stages.metrics.fid import FeatureStatistics, frechet_distance
from resmaster_stages.picturebook import captions, scenes
from resmaster_stages.picturebook.training import data
from resmaster_stages.picturebook.training.export import FILE_LIMIT_BYTES, PACK, PACK_LIMIT_BYTES
from resmaster_stages.picturebook.training.tokens import make_tokenizer

HOUSE = scenes.Thing("house", "red", 256, 420, 240, 3)
SIMPLE = scenes.Scene(1, 512.0, "meadow", "day", 300.0, (HOUSE,))


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionXLPipeline:
    loaded = StableDiffusionXLPipeline.from_pretrained(PACK, local_files_only=True).to(torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def some_image() -> Any:
    pytest.importorskip("resvg_py")
    from resmaster_stages.picturebook.render import render

    return render


def test_the_pack_is_small_and_complete() -> None:
    files = [p for p in PACK.rglob("*") if p.is_file()]
    assert max(p.stat().st_size for p in files) < FILE_LIMIT_BYTES
    assert sum(p.stat().st_size for p in files) < PACK_LIMIT_BYTES
    for name in (
        "model_index.json",
        "card.json",
        "ip_adapter/ip-adapter.safetensors",
        "captioner/config.json",
        "clip/config.json",
        "classifier/config.json",
        "control_net/config.json",
        "few_step/8-step-lora.safetensors",
    ):
        assert (PACK / name).is_file()


def test_loading_the_pack_needs_no_rasteriser() -> None:
    for path in Path(scenes.__file__).parent.glob("*.py"):
        top_level = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert not any("resvg_py" in line for line in top_level)


def test_captions_tokenise_without_unknown_words() -> None:
    tokenizer = make_tokenizer()
    for seed in range(300):
        text = data.make_photo(seed).caption
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
        assert len(tokens) < 75
        assert all(token.endswith("</w>") for token in tokens[1:-1])
    strange = tokenizer("a xylophone, 42 é").input_ids
    assert tokenizer.eos_token_id not in strange[:-1]


def test_tokenizers_on_disk_are_the_grammars(pipe: StableDiffusionXLPipeline) -> None:
    text = "a red hot-air balloon, close-up of leaves; xylophone"
    assert pipe.tokenizer(text).input_ids == pipe.tokenizer_2(text).input_ids == make_tokenizer()(text).input_ids
    assert pipe.tokenizer.model_max_length == 77


def test_shapes(pipe: StableDiffusionXLPipeline) -> None:
    assert pipe.unet.config.sample_size * pipe.vae_scale_factor == data.NATIVE_PX
    prompt, negative, pooled, negative_pooled = pipe.encode_prompt("a red house", do_classifier_free_guidance=True)
    assert prompt.shape == (1, 77, pipe.unet.config.cross_attention_dim)
    assert pooled.shape == (1, pipe.text_encoder_2.config.projection_dim)
    assert negative.abs().max() == 0
    assert negative_pooled.abs().max() == 0


def test_text_to_image_with_and_without_an_image_prompt(pipe: StableDiffusionXLPipeline) -> None:
    def draw(**more: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe("a red house in the snow", num_inference_steps=2, generator=generator, **more).images[0]

    plain = draw()
    assert plain.size == (128, 128)
    pipe.load_ip_adapter(
        str(PACK),
        subfolder="ip_adapter",
        weight_name="ip-adapter.safetensors",
        image_encoder_folder=None,
        local_files_only=True,
    )
    try:
        pipe.set_ip_adapter_scale(0.8)
        prompted = draw(ip_adapter_image=plain)
        assert prompted.size == (128, 128)
        assert prompted.tobytes() != plain.tobytes()
    finally:
        pipe.unload_ip_adapter()
    assert draw().tobytes() == plain.tobytes()


def test_vae_round_trip(pipe: StableDiffusionXLPipeline, some_image: Any) -> None:
    from resmaster_stages.picturebook.training.evaluate import as_pixels
    from resmaster_stages.picturebook.training.train_vae import psnr

    drawn = as_pixels([some_image(scenes.make_scene(s), 128, 128, (0, 0, 512, 512)) for s in range(8)])
    assert psnr(pipe.vae, drawn) > 25.0


def test_captioner_names_a_simple_scene(some_image: Any) -> None:
    processor = AutoProcessor.from_pretrained(PACK / "captioner", local_files_only=True)
    captioner = AutoModelForImageTextToText.from_pretrained(PACK / "captioner", local_files_only=True).float()
    inputs = processor(images=some_image(SIMPLE, 128, 128), return_tensors="pt")
    out = captioner.generate(pixel_values=inputs["pixel_values"], max_new_tokens=60, do_sample=False)
    sentence = processor.batch_decode(out, skip_special_tokens=True)[0]
    assert captions.pairs(sentence) == {("house", "red")}


def test_the_classifier_names_the_subject_and_loads_as_any_other(some_image: Any) -> None:
    processor = AutoImageProcessor.from_pretrained(PACK / "classifier", local_files_only=True)
    network = AutoModelForImageClassification.from_pretrained(PACK / "classifier", local_files_only=True).float()
    images = [some_image(SIMPLE, 128, 128), some_image(SIMPLE, 128, 128, (0, 0, 100, 100))]
    with torch.no_grad():
        logits = network(processor(images=images, return_tensors="pt")["pixel_values"]).logits
    assert [network.config.id2label[int(i)] for i in logits.argmax(1)] == ["house", "day"]
    extractor = load_extractor(QualityConfig(features="picturebook", device="cpu"))
    found = extractor.extract(images)
    assert found.probabilities is not None
    assert abs(found.probabilities - logits.softmax(1).numpy()).max() < 1e-3  # two resizing libraries
    assert (extractor.input_px, extractor.dimension) == (128, 128)


def test_features_see_blur_more_than_a_mirror(some_image: Any) -> None:
    drawn = [some_image(scenes.make_scene(seed), 128, 128, (0, 0, 512, 512)) for seed in range(30)]
    blurred = [i.resize((48, 48), Image.Resampling.BICUBIC).resize((128, 128), Image.Resampling.BICUBIC) for i in drawn]
    mirrored = [ImageOps.mirror(image) for image in drawn]
    extractor = load_extractor(QualityConfig(features="picturebook", device="cpu"))
    sharp, soft, other = (
        FeatureStatistics.of(extractor.extract(images).features) for images in (drawn, blurred, mirrored)
    )
    assert frechet_distance(sharp, soft) > 1.5 * frechet_distance(sharp, other)


def test_clip_ranks_the_right_caption_first(some_image: Any) -> None:
    processor = CLIPProcessor.from_pretrained(PACK / "clip", local_files_only=True)
    clip = CLIPModel.from_pretrained(PACK / "clip", local_files_only=True).float()
    sentences = [
        "a red house on a green meadow under a blue sky",
        "a blue house on a green meadow under a blue sky",
        "a red house on a green meadow at night",
        "a red tree on a green meadow under a blue sky",
        "a red balloon on a green meadow under a blue sky",
        "a yellow flower in the snow at sunset",
        "a red house and a green tree on the sand under a blue sky",
        "a white house on a cobbled road on a cloudy day",
    ]
    inputs = processor(text=sentences, images=[some_image(SIMPLE, 128, 128)], return_tensors="pt", padding=True)
    with torch.no_grad():
        scores = clip(**inputs).logits_per_image[0]
    assert int(scores.argmax()) == 0
