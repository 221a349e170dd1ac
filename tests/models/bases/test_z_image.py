"""Z-Image through the engine, beside diffusers' own pipeline."""

import numpy as np
import pytest
import torch
from diffusers import ZImageImg2ImgPipeline, ZImageOmniPipeline

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.diffusion.text import encode_prompts
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.generate import generate
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.geometry import geometry_of
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from resmaster_stages.models.schedule import Timing
from resmaster_stages.planning.checks import check
from tests.methods.common import difference, settings, some_image
from tests.models.bases.common import engine, relative, start
from tests.models.bases.folders import built, configured, copied, fresh, spoiled
from tests.models.bases.whole import (
    CONVOLUTIONS,
    METHODS,
    counted_and_forecast,
    drawn,
    is_visible,
    refusals,
    rows_of,
    some_views,
)
from tests.tiny_z_image import make_z_image

PROMPTS = ("a cat", "a big house, red, with many small windows and a garden of roses")
NEGATIVE = ("bad", "an ugly and blurry image with far too many words in it")


@pytest.fixture(scope="module")
def pipe():
    return make_z_image()


@pytest.fixture(scope="module")
def models(pipe):
    return Models.from_pipeline(pipe)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    place = tmp_path_factory.mktemp("z") / "Z-Image"
    pipe.save_pretrained(place)
    with fresh():
        yield place


def theirs(pipe, noise, steps, scale, **more):
    """What the pipeline draws from the same noise. scale: as this project counts it."""
    height, width = (side * 4 for side in noise.shape[-2:])
    values = {"height": height, "width": width, "num_inference_steps": steps, "guidance_scale": scale - 1}
    values |= {"negative_prompt": list(NEGATIVE), "latents": noise.clone(), "output_type": "latent"}
    return pipe(list(PROMPTS), **values | more).images


@pytest.mark.parametrize(
    ("height", "width", "steps", "scale"), [(64, 64, 6, 5), (64, 64, 8, 1), (48, 64, 7, 3.5), (64, 40, 5, 1)]
)
def test_one_view_is_what_the_pipeline_draws(pipe, models, height, width, steps, scale):
    noise = start(models, height, width, batch=2)
    ours = engine(models, noise, PROMPTS, NEGATIVE, steps=steps, guidance_scale=scale)
    assert relative(ours, theirs(pipe, noise, steps, scale)) < 1e-5


def test_levels_are_the_pipelines(pipe, models):
    theirs(pipe, start(models, 64, 64, batch=2), 8, 1.0)
    path = models.base.path(8, Timing(cells=256))
    assert [step.sigma for step in path] == pipe.scheduler.sigmas[:-1].tolist()
    assert [step.t for step in path] == pipe.scheduler.timesteps.tolist()
    assert path[-1].sigma_next == 0


def test_latents_go_to_the_canvas_and_back(models):
    latents = torch.randn(2, 16, 6, 10)
    assert relative(models.base.from_canvas(models.base.to_canvas(latents)), latents) < 1e-6


@pytest.mark.parametrize("scale", [5.0, 1.0])
def test_generated_images_are_the_pipelines(pipe, models, scale):
    (ours,) = generate(models, [PROMPTS[1]], [NEGATIVE[0]], [11], 48, 64, 3, scale, 1)
    noise = torch.randn(1, 16, 12, 16, generator=torch.Generator().manual_seed(11))
    (expected,) = pipe(
        PROMPTS[1],
        negative_prompt=NEGATIVE[0],
        height=48,
        width=64,
        num_inference_steps=3,
        guidance_scale=scale - 1,
        latents=noise,
    ).images
    assert is_visible(ours)
    assert difference(ours, expected) <= 1


def test_bfloat16_sees_the_pipelines_times(models):
    """Rounding of the rows apart, the engine draws in bfloat16 what the pipeline draws there."""
    low = make_z_image().to(torch.bfloat16)
    low.vae.to(torch.float32)
    small = Models.from_pipeline(low)
    noise = start(small, 64, 64, batch=2)
    assert small.dtype == torch.bfloat16
    ours = engine(small, noise, PROMPTS, NEGATIVE, steps=4, guidance_scale=5.0)
    assert ours.dtype == torch.float32
    assert relative(ours, theirs(low, noise, 4, 5.0)) < 1e-5  # both keep float32 latents
    assert relative(ours, engine(models, noise, PROMPTS, NEGATIVE, steps=4, guidance_scale=5.0)) < 0.1


# ---------------------------------------------------------------------------------------------------------- rows


def test_permuted_views_have_permuted_predictions(models):
    views, order = some_views(models, 3), [2, 0, 1]
    prompts = ["a cat", "a dog", "a big house, red, with many small windows and a garden of roses"]
    plain = rows_of(models, views, prompts)
    assert torch.equal(rows_of(models, views[order], [prompts[i] for i in order]), plain[:, order])


def test_a_row_does_not_depend_on_the_other_rows(models):
    """Captions of 13 and of 70 tokens become 32 and 96 in the transformer, and each row keeps its own."""
    views, short = some_views(models, 3, 12, 16), ["a cat"] * 3
    plain = rows_of(models, views, short)
    mixed = rows_of(models, views, ["a cat", PROMPTS[1], "a cat"])
    assert relative(mixed[:, [0, 2]], plain[:, [0, 2]]) < 1e-6
    assert relative(mixed[1, 1], plain[1, 1]) > 1e-4
    alone = rows_of(models, views, ["a cat", PROMPTS[1], "a cat"], at_once=1)
    assert relative(alone, mixed) < 1e-6


def test_the_chat_template_is_counted(models):
    assert models.base.count(["", "a cat"]) == [8, 13]
    texts = models.base.encode(["", "a cat"], False, torch.device("cpu"))
    assert texts.mask.sum(dim=1).tolist() == [8, 13]
    assert texts.states.shape == (2, 13, 16)
    long = models.base.encode(["a" * 600], False, torch.device("cpu"))
    assert long.states.shape[1] == models.base.tokens == 512


def test_encoding_leaves_the_prompts_alone(models):
    prompts = ["a cat"]
    models.base.encode(prompts, False, torch.device("cpu"))
    assert prompts == ["a cat"]


# ------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", METHODS)
def test_methods_draw_what_is_asked_for(models, folder, method):
    image = drawn(models, method, guidance_scale=5.0)
    assert image.size == (112, 80)
    assert is_visible(image)
    assert difference(image, drawn(models, method, "a big house, red and very old", guidance_scale=5.0)) > 0
    counted, forecast = counted_and_forecast(ModelConfig(id=str(folder), device="cpu"), method, guidance_scale=5.0)
    assert counted == forecast


@pytest.mark.parametrize("shift", ["sqrt", 6.0])
def test_the_time_shift_is_the_configurations(models, shift):
    plain, moved = (drawn(models, "multidiffusion", guidance_scale=5.0, time_shift=each) for each in ("view", shift))
    assert is_visible(moved)
    assert difference(plain, moved) > 0


def test_methods_of_unets_are_refused(models):
    for method in CONVOLUTIONS:
        with pytest.raises(ConfigError, match=rf"method {method}: needs convolutions.*\(Z-Image\)"):
            upscale_image(models, some_image(), "a cat", config=settings(method))
    with pytest.raises(ConfigError, match=r"image_prompt.enabled: needs image prompts.*\(Z-Image\)"):
        upscale_image(models, some_image(), "a cat", config=settings("resmaster"))


def test_a_view_beyond_the_table_of_positions_is_refused(folder, tmp_path):
    models = Models.from_pipeline(make_z_image(axes_lens=[256, 8, 12]))
    assert models.geometry.largest_px == 64
    with pytest.raises(ConfigError, match=r"a view: .* at most 64 px a side .* 112 x 80 px; use a method of views"):
        drawn(models, "direct")
    assert drawn(models, "multidiffusion").size == (112, 80)
    direct = {"method": "direct", "steps": 2, "scale": 2}
    with spoiled(folder, "transformer/config.json", "axes_lens", [256, 8, 12]):
        with pytest.raises(
            ConfigError, match=r"upscale.method: .* at most 64 px a side .* 128 x 128 px; use a method of views"
        ):
            check(configured(tmp_path, folder, upscale=direct))
        check(configured(tmp_path, folder))


# ------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize(
    ("name", "guidance", "expected"),
    [
        ("Z-Image-Turbo", "auto", ("none", 8, 1.0)),
        ("Z-Image-Turbo", "cfg", ("cfg", 50, 5.0)),
        ("Z-Image-De-Turbo", "auto", ("cfg", 50, 5.0)),
        ("Z-Image", "auto", ("cfg", 50, 5.0)),
        ("Z-Image", "none", ("none", 8, 1.0)),
    ],
)
def test_turbo_has_no_guidance(folder, tmp_path, name, guidance, expected):
    (tmp_path / name).symlink_to(folder, target_is_directory=True)
    config = ModelConfig(id=str(tmp_path / name), device="cpu", guidance=guidance)
    sampling = load_models(config).base.sampling
    assert (sampling.kind, sampling.steps, sampling.guidance_scale) == expected
    dataset = configured(tmp_path, tmp_path / name, model={"guidance": guidance})
    if expected[0] == "cfg":
        check(dataset)
        return
    with pytest.raises(ConfigError, match=r"guidance_scale: 3 has no effect on .*; set low_res.steps: 8 and"):
        check(dataset)


def test_turbo_computes_one_branch_and_reads_no_negative_prompt(folder, tmp_path):
    (tmp_path / "z-image-turbo").symlink_to(folder, target_is_directory=True)
    turbo, plain = (ModelConfig(id=str(place), device="cpu") for place in (tmp_path / "z-image-turbo", folder))
    counted, forecast = counted_and_forecast(turbo, "multidiffusion", guidance_scale=1.0)
    assert counted == forecast
    assert counted_and_forecast(plain, "multidiffusion", guidance_scale=5.0) == (2 * counted, 2 * counted)
    sampling = {"steps": 2, "guidance_scale": 1.0}
    config = configured(
        tmp_path,
        tmp_path / "z-image-turbo",
        low_res={**sampling, "negative_prompt": "ugly"},
        upscale={"method": "multidiffusion", "scale": 2, **sampling},
    )
    (note,) = check(config).notes
    assert note.startswith("low_res.negative_prompt: not read")
    assert [each.samples_ok for each in built(config)] == [2] * len(built(config))


# ------------------------------------------------------------------------------------------------------- folders


def test_a_folder_goes_through_all_stages(folder, tmp_path):
    config = configured(tmp_path / "one", folder)
    assert (geometry_of(config.model).native_px, geometry_of(config.model).step_px) == (64, 8)
    assert check(config).notes == ()
    first, second = built(config), built(configured(tmp_path / "two", folder))
    assert [(each.samples_ok, each.samples_failed) for each in first] == [(2, 0)] * 4
    assert [each.objects[0].sha256 for each in first] == [each.objects[0].sha256 for each in second]


def test_negative_prompts_change_the_images(folder, tmp_path):
    upscale = {"method": "direct", "steps": 2, "scale": 1, "guidance_scale": 4.0}
    images = []
    for text in ("", "blurry"):
        config = configured(tmp_path / f"prompt {text}", folder, upscale={**upscale, "negative_prompt": text})
        images.append(built(config)[1].objects[0].sha256)
    assert images[0] != images[1]


def test_a_loaded_folder_draws_as_the_pipeline_does(folder, models):
    loaded = load_models(ModelConfig(id=str(folder), device="cpu"))
    noise = start(models, 64, 64)
    ours = engine(loaded, noise, PROMPTS[:1], steps=2, guidance_scale=5.0)
    assert torch.equal(ours, engine(models, noise, PROMPTS[:1], steps=2, guidance_scale=5.0))
    assert np.isfinite(ours.numpy()).all()


# ------------------------------------------------------------------------------------------------------ refusals


def test_pipelines_of_the_same_weights_are_taken_and_others_refused(pipe):
    parts = {name: pipe.components[name] for name in ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")}
    assert Models.from_pipeline(ZImageImg2ImgPipeline(**parts)).base.family.name == "Z-Image"
    omni = ZImageOmniPipeline(**parts, siglip=None, siglip_processor=None)
    with pytest.raises(ConfigError, match=r"is a ZImageOmniPipeline, and the known families .* give a base model"):
        Models.from_pipeline(omni)
    template, pipe.tokenizer.chat_template = pipe.tokenizer.chat_template, None
    try:
        with pytest.raises(ConfigError, match=r"its tokenizer has no chat template; download the model again"):
            Models.from_pipeline(pipe)
    finally:
        pipe.tokenizer.chat_template = template


@pytest.mark.parametrize(
    "name", ["ZImageControlNetPipeline", "ZImageControlNetInpaintPipeline", "ZImageInpaintPipeline"]
)
def test_pipelines_of_other_tasks_are_refused_at_planning(folder, tmp_path, name):
    with spoiled(folder, "model_index.json", "_class_name", name):
        assert refusals(configured(tmp_path, folder))[0].endswith("; give a base model of one of them")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", "has no file diffusion_pytorch_model.safetensors"),
        ("vae/config.json", "vae/config.json"),
        ("text_encoder/model.safetensors", "has no file model.safetensors"),
        ("tokenizer/tokenizer.json", "has no tokenizer.json, vocab.json"),
        ("tokenizer/chat_template.jinja", "its tokenizer has no chat template"),
        ("scheduler/scheduler_config.json", "scheduler/scheduler_config.json"),
    ],
)
def test_a_missing_file_is_named_at_planning(folder, tmp_path, file, message):
    place = copied(folder, tmp_path)
    (place / file).unlink()
    with fresh(), pytest.raises(ConfigError, match=message):
        check(configured(tmp_path, place))


def test_large_text_encoders_get_few_texts_at_once(models, monkeypatch):
    calls = []
    encode = models.base.pipe.encode_prompt
    monkeypatch.setattr(
        models.base.pipe, "encode_prompt", lambda texts, *a, **k: calls.append(len(texts)) or encode(texts, *a, **k)
    )
    texts = encode_prompts(models, ["a" * number for number in range(1, 12)])
    assert calls == [8, 3]
    assert texts.lengths == tuple(range(9, 20))
    assert texts.states.shape[:2] == (11, 19)


VARIANTS = [
    ("transformer/config.json", "siglip_feat_dim", 8, "also reads images"),
    ("transformer/config.json", "in_channels", 33, "reads 33 channels, and its VAE makes 16"),
    ("transformer/config.json", "_class_name", "ZImageControlNetModel", "its transformer is a ZImageControlNetModel"),
    ("vae/config.json", "_class_name", "AutoencoderDC", "its VAE is 'AutoencoderDC', not an AutoencoderKL"),
    ("scheduler/scheduler_config.json", "invert_sigmas", True, "invert_sigmas is not supported"),
]


@pytest.mark.parametrize(("file", "key", "value", "message"), VARIANTS, ids=lambda value: str(value)[:40])
def test_variants_are_refused_at_planning(folder, tmp_path, file, key, value, message):
    with spoiled(folder, file, key, value), pytest.raises(ConfigError, match=message):
        check(configured(tmp_path, folder))


DAMAGES = [
    (file, name, value)
    for file, names in {
        "model_index.json": ("_class_name", "scheduler", "transformer"),
        "transformer/config.json": ("in_channels", "axes_lens", "all_patch_size", "dim", "n_layers"),
        "vae/config.json": ("latent_channels", "block_out_channels", "sample_size", "scaling_factor", "shift_factor"),
        "scheduler/scheduler_config.json": ("shift", "use_dynamic_shifting", "num_train_timesteps"),
    }.items()
    for name in names
    for value in (..., None, "x", -3, 10**9, ["a"])
]


@pytest.mark.parametrize(("file", "name", "value"), DAMAGES, ids=lambda value: str(value).rpartition("/")[2])
def test_a_damaged_number_is_one_line(folder, tmp_path, file, name, value):
    """A damage is refused in one line, at planning or when the model is loaded, or the model still draws."""
    with spoiled(folder, file, name, value):
        for line in refusals(configured(tmp_path, folder)):
            assert "\n" not in line
            assert "; " in line
