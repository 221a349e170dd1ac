"""Qwen-Image through the engine, beside diffusers' own pipeline."""

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageImg2ImgPipeline, QwenImageInpaintPipeline

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.diffusion import autoencoder
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.generate import generate
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases.base import guide
from resmaster_stages.models.bases.transformer import packed, unpacked
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
from tests.tiny_qwen_image import make_qwen_image, video_vae

PROMPTS = ("a cat", "a big house, red, with many small windows and a garden of roses")
NEGATIVE = ("bad", "an ugly and blurry image with far too many words in it")
NATIVE = {"native_px": 64}
"""What the tiny model's files do not tell."""


def loaded(pipe):
    return Models.from_pipeline(pipe, config=ModelConfig(**NATIVE))


@pytest.fixture(scope="module")
def pipe():
    return make_qwen_image()


@pytest.fixture(scope="module")
def models(pipe):
    return loaded(pipe)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    place = tmp_path_factory.mktemp("qwen") / "Qwen-Image"
    pipe.save_pretrained(place)
    with fresh():
        yield place


def theirs(pipe, noise, steps, scale, **more):
    """The latents that the pipeline draws from the same noise, unpacked."""
    height, width = (side * 4 for side in noise.shape[-2:])
    values = {"height": height, "width": width, "num_inference_steps": steps, "true_cfg_scale": scale}
    values |= {"negative_prompt": list(NEGATIVE), "latents": packed(noise), "output_type": "latent"}
    return unpacked(pipe(list(PROMPTS), **values | more).images, *noise.shape[-2:])


@pytest.mark.parametrize(
    ("height", "width", "steps", "scale"), [(64, 64, 6, 4), (64, 64, 8, 1), (48, 64, 7, 2.5), (72, 40, 5, 1)]
)
def test_one_view_is_what_the_pipeline_draws(pipe, models, height, width, steps, scale):
    """Both branches go through the transformer in one masked batch, the pipeline's in two calls."""
    noise = start(models, height, width, batch=2)
    ours = engine(models, noise, PROMPTS, NEGATIVE, steps=steps, guidance_scale=scale)
    assert relative(ours, theirs(pipe, noise, steps, scale)) < 1e-5


@pytest.mark.parametrize("prompts", [("a cat", "a cat"), ("a cat", "a dog")])
def test_prompts_of_one_length_have_no_mask_in_the_pipeline(pipe, models, prompts):
    noise = start(models, 64, 64, batch=2)
    expected = pipe(
        list(prompts), height=64, width=64, num_inference_steps=3, latents=packed(noise), output_type="latent"
    ).images
    ours = engine(models, noise, prompts, steps=3, guidance_scale=1.0)
    assert relative(ours, unpacked(expected, 16, 16)) < 1e-5


def test_levels_are_the_pipelines(pipe, models):
    """The last step begins at the scheduler's `shift_terminal`."""
    theirs(pipe, start(models, 64, 64, batch=2), 8, 1.0)
    path = models.base.path(8, Timing(cells=256))
    assert [step.sigma for step in path] == pipe.scheduler.sigmas[:-1].tolist()
    assert [step.t for step in path] == pipe.scheduler.timesteps.tolist()
    assert (path[-1].sigma, path[-1].sigma_next) == (pytest.approx(0.02), 0)


def test_tokens_keep_the_norm_of_their_conditional_prediction(models):
    negative, text = torch.randn(2, 2, 16, 6, 8).unbind()
    ours = models.base.guide(negative, text, 4.0)
    norms = packed(ours).norm(dim=-1)
    assert torch.allclose(norms, packed(text).norm(dim=-1), rtol=1e-5)
    plain = packed(guide(negative, text, 4.0))
    assert torch.allclose(packed(ours) / norms[..., None], plain / plain.norm(dim=-1, keepdim=True), atol=1e-6)
    assert relative(ours, guide(negative, text, 4.0)) > 0.1


# ----------------------------------------------------------------------------------------------------------- VAE


def test_latents_go_to_the_canvas_and_back(models):
    latents = torch.randn(2, 16, 6, 10)
    assert relative(models.base.from_canvas(models.base.to_canvas(latents)), latents) < 1e-6


def test_images_are_encoded_and_decoded_with_one_frame(pipe, models):
    pixels = torch.rand(2, 3, 48, 64) * 2 - 1
    latents = autoencoder.encode(models, pixels)
    config = pipe.vae.config
    mean, spread = (torch.tensor(each).view(1, 16, 1, 1, 1) for each in (config.latents_mean, config.latents_std))
    expected = (pipe.vae.encode(pixels[:, :, None]).latent_dist.mode() - mean) / spread
    assert relative(latents, expected[:, :, 0]) < 1e-6
    assert latents.shape == (2, 16, 12, 16)
    image = pipe.vae.decode(expected * spread + mean, return_dict=False)[0][:, :, 0]
    assert relative(autoencoder.decode(models, latents), image) < 1e-5


def test_the_vae_is_one_object_that_moves_its_weights(models):
    """GPUs prefer a layout of four axes, which weights with a time axis cannot have."""
    assert models.base.vae is models.base.vae
    assert any(weight.ndim == 5 for weight in models.base.vae.parameters())
    assert models.base.vae.to(memory_format=torch.channels_last) is models.base.vae
    try:
        models.base.vae.to(torch.float64)
        assert models.base.vae.dtype == models.base.pipe.vae.dtype == torch.float64
    finally:
        models.base.vae.to(torch.float32)


@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_generated_images_are_the_pipelines(pipe, models, scale):
    (ours,) = generate(models, [PROMPTS[1]], [NEGATIVE[0]], [11], 48, 64, 3, scale, 1)
    noise = torch.randn(1, 16, 12, 16, generator=torch.Generator().manual_seed(11))
    (expected,) = pipe(
        PROMPTS[1],
        negative_prompt=NEGATIVE[0],
        height=48,
        width=64,
        num_inference_steps=3,
        true_cfg_scale=scale,
        latents=packed(noise),
    ).images
    assert is_visible(ours)
    assert difference(ours, expected) <= 1


# ---------------------------------------------------------------------------------------------------------- rows


def test_bfloat16_sees_the_pipelines_times(models):
    low = make_qwen_image().to(torch.bfloat16)
    low.vae.to(torch.float32)
    small = loaded(low)
    seen: list[dict] = []
    low.transformer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    noise = start(small, 64, 64, batch=2)
    ours = engine(small, noise, PROMPTS, NEGATIVE, steps=4, guidance_scale=4.0)
    mine, seen[:] = [float(each["timestep"][0]) for each in seen], []
    theirs(low, noise.to(torch.bfloat16), 4, 1.0)
    assert mine == [float(each["timestep"][0]) for each in seen]
    assert ours.dtype == torch.float32
    assert relative(ours, engine(models, noise, PROMPTS, NEGATIVE, steps=4, guidance_scale=4.0)) < 0.1


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
    assert relative(rows_of(models, views, ["a cat", PROMPTS[1], "a cat"], at_once=1), mixed) < 1e-6


def test_the_end_of_the_chat_template_is_counted_and_its_beginning_is_not(models):
    assert models.base.count(["", "a cat"]) == [5, 10]
    texts = models.base.encode(["", "a cat"], False, torch.device("cpu"))
    assert texts.mask.sum(dim=1).tolist() == [5, 10]
    assert texts.states.shape == (2, 10, 16)
    alone = models.base.encode(["a cat"], False, torch.device("cpu"))
    assert alone.mask.all()
    assert relative(alone.padded(12).states[:, :10], texts.states[1:]) < 1e-5
    long = models.base.encode(["a" * 600], False, torch.device("cpu"))
    assert long.states.shape[1] == models.base.tokens == 512


# ------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", METHODS)
def test_methods_draw_what_is_asked_for(models, folder, method):
    image = drawn(models, method, guidance_scale=4.0)
    assert image.size == (112, 80)
    assert is_visible(image)
    assert difference(image, drawn(models, method, "a big house, red and very old", guidance_scale=4.0)) > 0
    counted, forecast = counted_and_forecast(
        ModelConfig(id=str(folder), device="cpu", **NATIVE), method, guidance_scale=4.0
    )
    assert counted == forecast


@pytest.mark.parametrize("values", [{"start": 0}, {"cosine_scale_2": 0}, {"start": 0, "cosine_scale_2": 2, "steps": 5}])
def test_groups_of_views_without_weight_are_not_forecast(folder, values):
    """At the first step, which is pure noise, only dilated views count, and at the last one only local views."""
    model = ModelConfig(id=str(folder), device="cpu", **NATIVE)
    counted, forecast = counted_and_forecast(model, "demofusion", guidance_scale=4.0, **values)
    assert counted == forecast


def test_methods_of_unets_are_refused(models):
    for method in CONVOLUTIONS:
        with pytest.raises(ConfigError, match=rf"method {method}: needs convolutions.*\(Qwen-Image\)"):
            upscale_image(models, some_image(), "a cat", config=settings(method))
    with pytest.raises(ConfigError, match=r"image_prompt.enabled: needs image prompts.*\(Qwen-Image\)"):
        upscale_image(models, some_image(), "a cat", config=settings("resmaster"))


# ------------------------------------------------------------------------------------------------------- folders


def test_a_folder_goes_through_all_stages(folder, tmp_path):
    config = configured(tmp_path / "one", folder, model=NATIVE)
    assert (geometry_of(config.model).native_px, geometry_of(config.model).step_px) == (64, 8)
    assert geometry_of(ModelConfig(id=str(folder))).native_px == 1328
    assert check(config).notes == ()
    first, second = built(config), built(configured(tmp_path / "two", folder, model=NATIVE))
    assert [(each.samples_ok, each.samples_failed) for each in first] == [(2, 0)] * 4
    assert [each.objects[0].sha256 for each in first] == [each.objects[0].sha256 for each in second]


def test_a_loaded_folder_draws_as_the_pipeline_does(folder, models):
    other = load_models(ModelConfig(id=str(folder), device="cpu", **NATIVE))
    noise = start(models, 64, 64)
    ours = engine(other, noise, PROMPTS[:1], steps=2, guidance_scale=4.0)
    assert torch.equal(ours, engine(models, noise, PROMPTS[:1], steps=2, guidance_scale=4.0))
    assert np.isfinite(ours.numpy()).all()


@pytest.mark.parametrize(
    ("name", "guidance", "expected"),
    [
        ("Qwen-Image", "auto", ("cfg", 50, 4.0)),
        ("Qwen-Image-2512", "none", ("none", 8, 1.0)),
        ("Qwen-Image-Lightning", "auto", ("none", 8, 1.0)),
        ("Qwen-Image-Distill-Full", "cfg", ("cfg", 50, 4.0)),
    ],
)
def test_checkpoints_of_few_steps_have_no_guidance(folder, tmp_path, name, guidance, expected):
    (tmp_path / name).symlink_to(folder, target_is_directory=True)
    config = ModelConfig(id=str(tmp_path / name), device="cpu", guidance=guidance, **NATIVE)
    sampling = load_models(config).base.sampling
    assert (sampling.kind, sampling.steps, sampling.guidance_scale) == expected


# ------------------------------------------------------------------------------------------------------ refusals


def test_pipelines_of_the_same_weights_are_taken_and_others_refused(pipe):
    parts = {name: pipe.components[name] for name in ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")}
    assert Models.from_pipeline(QwenImageImg2ImgPipeline(**parts)).base.family.name == "Qwen-Image"
    edit = QwenImageEditPipeline(**parts, processor=None)
    for other in (edit, QwenImageInpaintPipeline(**parts)):
        with pytest.raises(ConfigError, match=rf"is a {type(other).__name__}, and the known .* give a base model"):
            Models.from_pipeline(other)


@pytest.mark.parametrize(
    "name",
    [
        "QwenImage21Pipeline",
        "QwenImageControlNetPipeline",
        "QwenImageEditInpaintPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageLayeredPipeline",
    ],
)
def test_pipelines_of_other_tasks_are_refused_at_planning(folder, tmp_path, name):
    with spoiled(folder, "model_index.json", "_class_name", name):
        assert refusals(configured(tmp_path, folder, model=NATIVE))[0].endswith("; give a base model of one of them")


def test_a_missing_file_is_named_at_planning(folder, tmp_path):
    for number, file in enumerate(
        ("transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "vae/config.json")
    ):
        place = copied(folder, tmp_path / f"{number}")
        (place / file).unlink()
        with fresh(), pytest.raises(ConfigError, match=file.rpartition("/")[2]):
            check(configured(tmp_path, place, model=NATIVE))


SWITCHES = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")


@pytest.mark.parametrize("switch", SWITCHES)
def test_transformers_of_other_tasks_are_refused_in_the_same_words(folder, tmp_path, switch):
    expected = rf"its transformer \({switch}\) .*; give a plain base model"
    with pytest.raises(ConfigError, match=expected):
        Models.from_pipeline(make_qwen_image(**{switch: True}))
    with spoiled(folder, "transformer/config.json", switch, True), pytest.raises(ConfigError, match=expected):
        check(configured(tmp_path, folder, model=NATIVE))


def test_another_vae_is_refused(folder, tmp_path):
    for key, value, message in (
        ("z_dim", 64, "reads 16 channels, and its VAE makes 64"),
        ("_class_name", "AutoencoderKLQwenImage21", "its VAE is 'AutoencoderKLQwenImage21'"),
        ("latents_std", [1.0] * 15, "latents_std is no list of 16 numbers"),
        ("latents_std", [1.0] * 15 + [0.0], "latents_std has numbers below or equal to 0"),
    ):
        with spoiled(folder, "vae/config.json", key, value), pytest.raises(ConfigError, match=message):
            check(configured(tmp_path, folder, model=NATIVE))
    pipe = make_qwen_image()
    pipe.register_modules(vae=video_vae(z_dim=8, latents_mean=[0.0] * 8, latents_std=[1.0] * 8))
    with pytest.raises(ConfigError, match="reads 16 channels, and its VAE makes 8"):
        loaded(pipe)


DAMAGES = [
    (file, name, value)
    for file, names in {
        "model_index.json": ("_class_name", "scheduler"),
        "transformer/config.json": ("in_channels", "num_layers", "axes_dims_rope", "out_channels", "patch_size"),
        "vae/config.json": ("z_dim", "temperal_downsample", "latents_mean", "latents_std", "dim_mult", "base_dim"),
        "scheduler/scheduler_config.json": ("shift_terminal", "max_shift", "max_image_seq_len"),
    }.items()
    for name in names
    for value in (..., None, "x", -3, 10**9, ["a"])
]


@pytest.mark.parametrize(("file", "name", "value"), DAMAGES, ids=lambda value: str(value).rpartition("/")[2])
def test_a_damaged_number_is_one_line(folder, tmp_path, file, name, value):
    """A damage is refused in one line, at planning or when the model is loaded, or the model still draws."""
    with spoiled(folder, file, name, value):
        for line in refusals(configured(tmp_path, folder, model=NATIVE)):
            assert "\n" not in line
            assert "; " in line
