import pytest
import torch
from diffusers.models.embeddings import IPAdapterPlusImageProjection, MultiIPAdapterImageProjection
from PIL import Image
from transformers import CLIPImageProcessorPil

from resmaster_stages.diffusion.conditions import make_conditions, size_and_crop
from resmaster_stages.diffusion.guidance import ClassifierFree, DenoiserCall
from resmaster_stages.diffusion.image_prompts import embed_crops, embed_images, required_adapter
from resmaster_stages.diffusion.loop import predict, static_batches
from resmaster_stages.diffusion.reference import pad_to_multiple, to_image, to_tensor, upsample
from resmaster_stages.diffusion.text import encode_prompts, truncated
from resmaster_stages.diffusion.views import Grid, view_grid
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.bases.adapter_files import CLIP_MEAN, CLIP_STD
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.models.ip_adapter import adapter_scale, preprocess
from resmaster_stages.models.parts import Models
from resmaster_stages.models.schedule import make_schedule
from tests.tiny_models import make_adapted_pipeline, tiny, tiny_adapted

WHOLE = [(0, 0, 64, 64)]


def models() -> Models:
    return Models.from_pipeline(tiny_adapted())


def crops(count, size=64, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("negative", ["", "blurry, ugly"])
def test_text_embeddings_are_those_of_diffusers(negative):
    pipe, prompts = tiny(), ["a cat", "a dog and a house", "a cat", "x" * 200]
    expected = pipe.encode_prompt(
        prompts, negative_prompt=[negative] * 4 if negative else None, do_classifier_free_guidance=True
    )
    ours = Models.from_pipeline(pipe)
    text = encode_prompts(ours, prompts)
    none = encode_prompts(ours, [negative] * 4, negative=True)
    assert len(text.states) == 3
    for mine, theirs in zip(
        (text.states[text.index], none.states[none.index], text.pooled[text.index], none.pooled[none.index]), expected
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_an_empty_prompt_is_only_zero_where_the_model_was_trained_so():
    pipe = make_adapted_pipeline()
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    ours = Models.from_pipeline(pipe)
    assert encode_prompts(ours, [""], negative=True).states.abs().max() > 0
    assert encode_prompts(models(), [""]).states.abs().max() > 0
    assert encode_prompts(models(), [""], negative=True).states.abs().max() == 0


def test_long_prompts_are_known_to_be_truncated():
    assert models().base.count(["a cat", "a"]) == [6, 3]
    assert truncated(models(), ["ab" * 37, "ab" * 37 + "abc"]) == [False, True]


def test_size_and_crop_of_canvas_and_native():
    grid = view_grid(Geometry(64, 4), 100, 160, 0.5)
    assert size_and_crop(grid, "canvas")[-1] == (100, 160, 36, 96, 100, 160)
    assert set(size_and_crop(grid, "native")) == {(64, 64, 0, 0, 64, 64)}


def test_preprocessing_is_that_of_clip():
    image = to_image(torch.nn.functional.interpolate(crops(1, 12), size=(96, 96), mode="bicubic").clamp(-1, 1)[0])
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = torch.as_tensor(processor(image, return_tensors="pt").pixel_values)
    ours = preprocess(to_tensor(image), 32, CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(ours, expected, atol=0.03, rtol=0)


def test_crop_embeddings_belong_to_their_crops_whatever_the_batch():
    batch = crops(19)
    image, nothing = embed_crops(models(), batch, WHOLE)
    assert image.shape == (19, 1, 12)
    assert not nothing.any()
    for place in (0, 16, 18):
        torch.testing.assert_close(
            image[place], embed_crops(models(), batch[place : place + 1], WHOLE)[0][0], atol=1e-5, rtol=1e-4
        )


def test_crops_are_taken_sample_by_sample():
    images = crops(2, 96)
    boxes = [(0, 0, 64, 64), (32, 8, 96, 72)]
    cut = torch.stack([p[:, y0:y1, x0:x1] for p in images for y0, x0, y1, x1 in boxes])
    torch.testing.assert_close(embed_crops(models(), images, boxes), embed_crops(models(), cut, WHOLE))


def test_images_of_any_size_are_embedded_one_by_one():
    square, wide = crops(1), torch.rand(1, 3, 40, 90) * 2 - 1
    image, nothing = embed_images(models(), [square, wide])
    assert image.shape == nothing.shape == (2, 1, 12)
    torch.testing.assert_close(image[:1], embed_crops(models(), square, WHOLE)[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(image[1:], embed_crops(models(), wide, [(0, 0, 40, 90)])[0], atol=1e-5, rtol=1e-4)


def test_plus_adapters_read_patch_features():
    pipe = make_adapted_pipeline()
    layer = IPAdapterPlusImageProjection(
        embed_dims=16, output_dims=32, hidden_dims=16, depth=1, dim_head=8, heads=2, num_queries=4
    )
    pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([layer])
    ours, views = Models.from_pipeline(pipe), torch.randn(5, 4, 16, 16)
    image, nothing = embed_crops(ours, crops(3), WHOLE)
    assert image.shape == nothing.shape == (3, 1, 17, 16)
    assert (image - nothing).abs().max() > 1e-3
    assert (predictions(ours, views, 0.8) - predictions(ours, views, 0.0)).abs().max() > 1e-3


def test_adapters_of_unknown_kind_are_refused():
    pipe = make_adapted_pipeline()
    pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([torch.nn.Identity()])
    with pytest.raises(ConfigError, match="unsupported kind"):
        required_adapter(Models.from_pipeline(pipe))


def test_image_prompts_without_an_adapter_are_refused_with_a_way_out():
    with pytest.raises(ConfigError, match=r"image_prompt\.enabled: false"):
        required_adapter(Models.from_pipeline(tiny()))


def test_adapter_scale_is_restored_after_exceptions():
    pipe = make_adapted_pipeline()
    pipe.set_ip_adapter_scale(0.35)
    projection = pipe.unet.encoder_hid_proj
    processors = [p for p in pipe.unet.attn_processors.values() if hasattr(p, "scale")]
    for scale in (0.0, 0.8):
        with pytest.raises(RuntimeError, match="boom"), adapter_scale(pipe.unet, scale):  # noqa: PT012
            assert processors[0].scale == [scale]
            raise RuntimeError("boom")
        assert pipe.unet.encoder_hid_proj is projection
        assert processors
        assert all(p.scale == [0.35] for p in processors)


def predictions(ours, views, scale, order=None, batch=4, guidance=3.0, image=True):
    """Guided predictions of as many views as given, each with its own prompt and crop, in `order`."""
    order = list(range(len(views))) if order is None else order
    prompts = [["a cat", "a dog", "tree", "the sky", "wall"][i] for i in order]
    conditions = make_conditions(
        ours,
        Grid(16, 16, 16, 16, 4),
        prompts,
        ["bad"] * len(views),
        guidance_scale=guidance,
        image=embed_crops(ours, crops(len(views))[order], WHOLE) if image else None,
    )
    with torch.inference_mode(), ours.base.image_scale(scale):
        rule, step = ClassifierFree(guidance), make_schedule({"beta_start": 1e-4}, 2)[0]
        batches = static_batches(len(views), batch)
        outputs = predict(
            ours.base, views[order], torch.tensor(500), conditions, DenoiserCall(step, rule.branches(step)), batches
        )
        return rule.combine(outputs, step)


def test_permuting_views_permutes_predictions():
    views = torch.randn(5, 4, 16, 16)
    order = [3, 0, 4, 2, 1]
    straight = predictions(models(), views, 0.8)
    torch.testing.assert_close(predictions(models(), views, 0.8, order), straight[order], atol=1e-5, rtol=1e-4)
    assert (
        predictions(models(), views, 0.8, image=True) - predictions(models(), views[[0] * 5], 0.8)
    ).abs().max() > 1e-3


def test_without_image_prompts_an_adapter_changes_nothing():
    views = torch.randn(5, 4, 16, 16)
    text_only = predictions(Models.from_pipeline(tiny()), views, 0.0, image=False)
    torch.testing.assert_close(predictions(models(), views, 0.0, image=False), text_only, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(predictions(models(), views, 0.0), text_only, atol=1e-6, rtol=1e-5)
    assert (predictions(models(), views, 0.8) - text_only).abs().max() > 1e-3


def test_batch_size_does_not_matter():
    views = torch.randn(5, 4, 16, 16)
    one = predictions(models(), views, 0.8, batch=1)
    for batch in (2, 3, 5, 16):
        torch.testing.assert_close(predictions(models(), views, 0.8, batch=batch), one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("items", "largest", "shapes"),
    [
        (49, 16, [7] * 7),
        (25, 16, [5] * 5),
        (36, 16, [12] * 3),
        (49, 49, [49]),
        (225, 16, [15] * 15),
        (17, 16, [9] * 2),  # a prime: no more than one is computed twice
        (5, 8, [5]),
        (9, 4, [3] * 3),
        (1, 16, [1]),
    ],
)
def test_batches_are_static_even_and_complete(items, largest, shapes):
    batches = static_batches(items, largest)
    assert [len(batch.items) for batch in batches] == shapes
    assert torch.cat([batch.items for batch in batches])[:items].tolist() == list(range(items))
    for batch in batches:
        assert batch.items.tolist() == list(batch.numbers)


def test_reference_is_clamped_and_padded_by_its_border():
    image = Image.new("RGB", (4, 4), "white")
    image.putpixel((1, 1), (0, 0, 0))
    pixels = upsample(image, 13, 18)
    assert pixels.shape == (1, 3, 13, 18)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    padded = pad_to_multiple(pixels, 8)
    assert padded.shape == (1, 3, 16, 24)
    assert torch.equal(padded[..., :13, :18], pixels)
    assert torch.equal(padded[..., 15, :18], pixels[..., 12, :])
    assert pad_to_multiple(padded, 8).shape == padded.shape


def test_images_survive_the_way_to_tensors_and_back():
    image = Image.effect_noise((17, 9), 80).convert("RGB")
    assert to_image(to_tensor(image)[0]).tobytes() == image.tobytes()
    assert upsample(image, 9, 17).equal(to_tensor(image))
