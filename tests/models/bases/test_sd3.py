"""Stable Diffusion 3 and 3.5 through the engine, beside diffusers' own pipeline."""

import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Img2ImgPipeline

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.generate import generate
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.captioner import content_tokens, token_counter
from resmaster_stages.models.geometry import geometry_of
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from resmaster_stages.models.schedule import Timing
from resmaster_stages.planning.checks import check
from tests.methods.common import difference, settings, some_image
from tests.models.bases.common import engine, relative, start
from tests.models.bases.folders import VALUES, built, configured, copied, planned, spoiled, stored
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
from tests.tiny_sd3 import make_sd3

PROMPTS = ("a cat", "a big house, red, of old stones and wood and glass")
NEGATIVE = ("blurry", "")
UPSCALE = {"method": "resmaster", "steps": 2, "scale": 2, "image_prompt": {"enabled": False}}
VARIANTS = {"3.5": ("3.5", True), "3": ("3", True), "without T5": ("3.5", False)}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def pipe(request):
    return make_sd3(*request.param)


@pytest.fixture(scope="module")
def models():
    return Models.from_pipeline(make_sd3())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("sd3") / "stable-diffusion-3.5-medium"
    make_sd3().save_pretrained(place)
    return place


def theirs(pipe, noise, steps, scale, **more):
    """What the pipeline draws from the same noise."""
    height, width = (side * 4 for side in noise.shape[-2:])
    values = {"height": height, "width": width, "num_inference_steps": steps, "guidance_scale": scale}
    values |= {"negative_prompt": list(NEGATIVE), "latents": noise, "output_type": "latent"}
    if pipe.text_encoder_3 is not None:
        values["max_sequence_length"] = 48
    return pipe(list(PROMPTS), **values | more).images


@pytest.mark.parametrize(("height", "width", "steps", "scale"), [(64, 64, 6, 5), (48, 80, 7, 1), (64, 40, 5, 7.5)])
def test_one_view_is_what_the_pipeline_draws(pipe, height, width, steps, scale):
    models = Models.from_pipeline(pipe)
    noise = start(models, height, width, batch=2)
    ours = engine(models, noise, PROMPTS, NEGATIVE, steps=steps, guidance_scale=scale)
    assert relative(ours, theirs(pipe, noise, steps, scale)) < 1e-5


@pytest.mark.parametrize("shift", [{"shift": 3.0}, {"shift": 1.0}, {"use_dynamic_shifting": True}], ids=str)
def test_levels_are_the_pipelines(shift):
    pipe = make_sd3()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**shift)
    models = Models.from_pipeline(pipe)
    theirs(pipe, start(models, 48, 80, batch=2), 9, 1.0)
    path = models.base.path(9, Timing(cells=12 * 20))
    assert [step.sigma for step in path] == pipe.scheduler.sigmas[:-1].tolist()
    assert [step.t for step in path] == pipe.scheduler.timesteps.tolist()
    assert path[-1].sigma_next == 0


def test_the_last_level_is_shifted_twice(models):
    """The scheduler's smallest level is already shifted when the levels between are shifted."""
    path = models.base.path(28, Timing(cells=256))
    assert path[0].sigma == 1
    assert path[-1].sigma == pytest.approx(0.00893, abs=1e-5)


def test_latents_go_to_the_canvas_and_back(models):
    latents = torch.randn(2, 16, 6, 10)
    assert relative(models.base.from_canvas(models.base.to_canvas(latents)), latents) < 1e-6


@pytest.mark.parametrize("scale", [5.0, 1.0])
def test_generated_images_are_the_pipelines(pipe, scale):
    models = Models.from_pipeline(pipe)
    (ours,) = generate(models, [PROMPTS[1]], [NEGATIVE[0]], [11], 48, 64, 3, scale, 1)
    noise = torch.randn(1, 16, 12, 16, generator=torch.Generator().manual_seed(11))
    more = {} if pipe.text_encoder_3 is None else {"max_sequence_length": 48}
    (expected,) = pipe(
        PROMPTS[1],
        negative_prompt=NEGATIVE[0],
        height=48,
        width=64,
        num_inference_steps=3,
        guidance_scale=scale,
        latents=noise,
        **more,
    ).images
    assert is_visible(ours)
    assert difference(ours, expected) <= 1


def test_bfloat16_sees_the_pipelines_times(models):
    """One step, because the pipeline rounds its latents at every step."""
    low = make_sd3().to(torch.bfloat16)
    low.vae.to(torch.float32)
    small = Models.from_pipeline(low)
    noise = start(small, 64, 64, batch=2).to(torch.bfloat16).float()
    assert small.dtype == torch.bfloat16
    ours = engine(small, noise, PROMPTS, NEGATIVE, steps=1, guidance_scale=1.0)
    assert ours.dtype == torch.float32
    assert relative(ours, theirs(low, noise.to(torch.bfloat16), 1, 1.0).float()) < 1e-2
    assert relative(ours, engine(models, noise, PROMPTS, NEGATIVE, steps=1, guidance_scale=1.0)) < 2e-2


# ---------------------------------------------------------------------------------------------------------- texts


def test_texts_are_clips_then_t5s(pipe):
    models = Models.from_pipeline(pipe)
    texts = models.base.encode(list(PROMPTS), False, torch.device("cpu"))
    t5 = 256 if pipe.text_encoder_3 is None else 48
    assert texts.states.shape == (2, 77 + t5, 64)
    assert texts.pooled.shape == (2, 32)
    assert texts.mask is None, "the pipeline reads padding"
    assert not texts.states[:, :77, 32:].any(), "CLIP's states are narrower than T5's"
    assert bool(texts.states[:, 77:].any()) == (pipe.text_encoder_3 is not None)


def test_tokens_are_counted_by_t5_if_there_is_one(pipe, tmp_path):
    base = Models.from_pipeline(pipe).base
    pipe.save_pretrained(tmp_path / "model")
    config = ModelConfig(id=str(tmp_path / "model"))
    t5 = pipe.text_encoder_3 is not None
    assert base.tokens == (48 if t5 else 77)
    assert base.count(["a cat"]) == [6]  # four letters, and a space and an end mark, or a begin and an end mark
    assert content_tokens(config) == base.tokens - (1 if t5 else 2)
    assert token_counter(config)("a cat") == base.count(["a cat"])[0] - (1 if t5 else 2)
    assert planned(configured(tmp_path / "data", tmp_path / "model")) == ""


# ---------------------------------------------------------------------------------------------------------- rows


def test_permuted_views_have_permuted_predictions(models):
    views, order = some_views(models, 3), [2, 0, 1]
    prompts = ["a cat", "a dog", PROMPTS[1]]
    plain = rows_of(models, views, prompts)
    assert torch.equal(rows_of(models, views[order], [prompts[i] for i in order]), plain[:, order])


def test_a_row_does_not_depend_on_the_other_rows(models):
    views = some_views(models, 3, 12, 16)
    plain = rows_of(models, views, ["a cat"] * 3)
    mixed = rows_of(models, views, ["a cat", PROMPTS[1], "a cat"])
    assert relative(mixed[:, [0, 2]], plain[:, [0, 2]]) < 1e-6
    assert relative(mixed[1, 1], plain[1, 1]) > 1e-4
    alone = rows_of(models, views, ["a cat", PROMPTS[1], "a cat"], at_once=1)
    assert relative(alone, mixed) < 1e-6


# ------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", METHODS)
def test_methods_draw_what_is_asked_for(models, folder, method):
    image = drawn(models, method, guidance_scale=5.0)
    assert image.size == (112, 80)
    assert is_visible(image)
    assert difference(image, drawn(models, method, PROMPTS[1], guidance_scale=5.0)) > 0
    counted, forecast = counted_and_forecast(ModelConfig(id=str(folder), device="cpu"), method, guidance_scale=5.0)
    assert counted == forecast


def test_views_without_a_share_of_a_step_are_not_counted(folder):
    """At pure noise the dilated views have all of it, and at the last level, shifted twice, none."""
    for values in ({"start": 0.0}, {"start": 0.0, "cosine_scale_2": 0.0}, {"start": 0.0, "steps": 7}):
        counted, forecast = counted_and_forecast(ModelConfig(id=str(folder), device="cpu"), "demofusion", **values)
        assert counted == forecast


def test_methods_of_unets_are_refused(models):
    for method in CONVOLUTIONS:
        with pytest.raises(ConfigError, match=rf"method {method}: needs convolutions.*\(Stable Diffusion 3\)"):
            upscale_image(models, some_image(), "a cat", config=settings(method))
    with pytest.raises(ConfigError, match=r"upscale.share: needs attention"):
        upscale_image(models, some_image(), "a cat", config=settings("c_upscale"))


# ------------------------------------------------------------------------------------------- the table of positions


def test_a_view_beyond_the_table_of_positions_is_refused(models, folder, tmp_path):
    """24 patches of 2 x 2 latents of 4 px."""
    with pytest.raises(ConfigError, match=r"a view: the model reads at most 192 px .* 256 x 128 px; use a method of v"):
        upscale_image(models, some_image(64, 32), "a cat", config=settings("direct", scale=4))
    assert upscale_image(models, some_image(64, 32), "a cat", config=settings("multidiffusion", scale=4)).size[0] == 256

    def said(**values):
        return planned(configured(tmp_path / "data", folder, **values))

    assert said(model={"native_px": 200}).startswith("model.native_px: the model reads at most 192 px a side")
    assert said(model={"native_px": 192}) == ""
    assert said(low_res={"height": 64, "width": 256}).startswith("low_res: the model reads at most 192 px a side")
    assert said(upscale={"method": "multidiffusion", "scale": 4}) == ""
    assert said(upscale={"method": "direct", "scale": 3}) == ""
    line = said(upscale={"method": "direct", "scale": 4})
    assert line.startswith(
        "upscale.method: the model reads at most 192 px a side in one piece, and this is 256 x 256 px"
    )
    with pytest.raises(ConfigError, match=r"model.native_px: the model reads at most 192 px"):
        Models.from_pipeline(make_sd3(), config=ModelConfig(native_px=200))


def test_positions_without_a_table_are_computed():
    models = Models.from_pipeline(make_sd3(pos_embed_max_size=None))
    assert models.geometry.largest_px is None
    assert upscale_image(models, some_image(64, 32), "a cat", config=settings("direct", scale=4)).size == (256, 128)


# ------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize(
    ("name", "guidance", "version", "expected"),
    [
        ("stable-diffusion-3.5-large", "auto", "3.5", ("cfg", 28, 4.5)),
        ("stable-diffusion-3-medium-diffusers", "auto", "3", ("cfg", 28, 7.0)),
        ("stable-diffusion-3.5-large-turbo", "auto", "3.5", ("none", 4, 1.0)),
        ("stable-diffusion-3.5-large-turbo", "cfg", "3.5", ("cfg", 28, 4.5)),
        ("my-model", "none", "3.5", ("none", 4, 1.0)),
    ],
)
def test_turbo_has_no_guidance(tmp_path, name, guidance, version, expected):
    make_sd3(version).save_pretrained(tmp_path / name)
    config = ModelConfig(id=str(tmp_path / name), device="cpu", guidance=guidance)
    sampling = load_models(config).base.sampling
    assert (sampling.kind, sampling.steps, sampling.guidance_scale) == expected
    said = planned(configured(tmp_path / "data", tmp_path / name, model={"guidance": guidance}))
    if expected[0] == "cfg":
        assert said == ""
    else:
        assert "guidance_scale: 3 has no effect on " in said
        assert "set low_res.steps: 4 and low_res.guidance_scale: 1" in said


# ------------------------------------------------------------------------------------------------------- folders


def test_a_folder_goes_through_all_stages(folder, tmp_path):
    config = configured(tmp_path / "one", folder)
    assert (geometry_of(config.model).native_px, geometry_of(config.model).step_px) == (64, 8)
    check(config)
    first = built(config)
    assert [(receipt.samples_ok, receipt.samples_failed) for receipt in first] == [(2, 0)] * 4
    assert stored(built(configured(tmp_path / "two", folder))) == stored(first)
    other = stored(built(configured(tmp_path / "three", folder, upscale=UPSCALE | {"time_shift": 6.0})))
    assert (other["low_res"], other["high_res"] == stored(first)["high_res"]) == (stored(first)["low_res"], False)


def test_a_loaded_folder_draws_as_the_pipeline_does(folder, models):
    loaded = load_models(ModelConfig(id=str(folder), device="cpu"))
    noise = start(models, 64, 64)
    ours = engine(loaded, noise, PROMPTS[:1], steps=2, guidance_scale=5.0)
    assert torch.equal(ours, engine(models, noise, PROMPTS[:1], steps=2, guidance_scale=5.0))


def test_pipelines_of_the_same_weights_are_taken(models):
    other = StableDiffusion3Img2ImgPipeline(**models.base.pipe.components)
    assert Models.from_pipeline(other).base.family.name == "Stable Diffusion 3"


# ------------------------------------------------------------------------------------------------------ refusals

REFUSED = [
    ("transformer/config.json", {"in_channels": 32}, "reads 32 channels, and its VAE makes 16"),
    ("transformer/config.json", {"_class_name": "SD3ControlNetModel"}, "its transformer is a SD3ControlNetModel"),
    ("vae/config.json", {"_class_name": "AutoencoderDC"}, "its VAE is 'AutoencoderDC', not an AutoencoderKL"),
    ("scheduler/scheduler_config.json", {"invert_sigmas": True}, "invert_sigmas is not supported"),
    (
        "model_index.json",
        {"scheduler": ["diffusers", "DDIMScheduler"]},
        "DDIMScheduler: is not the scheduler of a flow",
    ),
]


@pytest.mark.parametrize(("file", "values", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_variants_are_refused_at_planning(folder, tmp_path, file, values, message):
    ((key, value),) = values.items()
    with spoiled(folder, file, key, value):
        assert message in planned(configured(tmp_path, folder))


def test_variants_are_refused_in_the_same_words_when_loaded(models, folder, tmp_path):
    instruct = make_sd3(in_channels=32)
    with pytest.raises(ConfigError, match="reads 32 channels, and its VAE makes 16; it is an inpainting") as loaded:
        Models.from_pipeline(instruct)
    with spoiled(folder, "transformer/config.json", "in_channels", 32):
        assert planned(configured(tmp_path, folder)).endswith(str(loaded.value).split(": ", 1)[1])


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_3", "tokenizer", "tokenizer_3"])
def test_missing_parts_are_refused_at_planning(folder, tmp_path, part):
    model = copied(folder, tmp_path)
    shutil.rmtree(model / part)
    (line,) = planned(configured(tmp_path / "data", model)).splitlines()
    assert line.startswith("model.id: ")
    assert part in line
    assert "download the model again" in line or "give the top folder of a model" in line


DAMAGES = [
    (file, key)
    for file, keys in {
        "model_index.json": ("_class_name", "scheduler", "transformer", "text_encoder", "text_encoder_3", "tokenizer"),
        "transformer/config.json": ("in_channels", "pos_embed_max_size", "patch_size", "qk_norm"),
        "vae/config.json": ("latent_channels", "block_out_channels", "sample_size", "scaling_factor", "shift_factor"),
        "scheduler/scheduler_config.json": ("shift", "use_dynamic_shifting", "num_train_timesteps", "max_shift"),
    }.items()
    for key in keys
]


@pytest.mark.parametrize(("file", "key"), DAMAGES, ids=lambda value: value.rpartition("/")[2])
def test_a_damage_is_told_in_lines_or_has_no_effect(folder, tmp_path, file, key):
    """At planning, when the model is loaded, or when it draws."""
    for value in (..., *VALUES):
        with spoiled(folder, file, key, value):
            lines = refusals(configured(tmp_path, folder))
            assert all(": " in line and "\n" not in line for line in lines)
            assert len(lines) <= 3
