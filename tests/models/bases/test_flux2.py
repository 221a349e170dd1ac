"""FLUX.2 through the engine, beside diffusers' own pipelines: dev, klein and klein-base."""

import json
import re
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinInpaintPipeline

from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import methods
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.diffusion import autoencoder
from resmaster_stages.diffusion.cost import counting
from resmaster_stages.diffusion.loop import CanvasNoise
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.generate import generate
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models import places
from resmaster_stages.models.bases.base import Rows
from resmaster_stages.models.bases.transformer import packed
from resmaster_stages.models.geometry import geometry_of
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from resmaster_stages.models.schedule import Timing
from resmaster_stages.planning.checks import check
from resmaster_stages.planning.workload import denoising_of, high_res_work
from resmaster_stages.prompts import ingest
from resmaster_stages.runner.run import run_stage
from tests.methods.common import settings, some_image
from tests.models.bases.common import engine, relative, start
from tests.tiny_flux2 import CHANNELS, MAKERS, make_dev
from tests.tiny_transformers import vae as tiny_vae

PROMPTS = ("a cat", "a big house, red")
SCALES = {"dev": 4.0, "klein": 1.0, "klein-base": 4.0}
STRUCTURE_ALONE = {"image_prompt": {"enabled": False}}


@cache
def made(name):
    return MAKERS[name]()


@cache
def models_of(name):
    return Models.from_pipeline(made(name))


def patches(latents):
    """Latents [B, C, h, w] as the pipelines take them: [B, 4 C, h / 2, w / 2]."""
    count, channels, height, width = latents.shape
    return packed(latents).transpose(1, 2).reshape(count, 4 * channels, height // 2, width // 2)


def theirs(name, noise, steps, scale, output_type, prompts=PROMPTS):
    """What the pipeline draws from `noise`, as numbers from 0 to 1 or as the input of its decoder."""
    pipe, (height, width) = made(name), (4 * side for side in noise.shape[-2:])
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        decode = pipe.vae.decode
        patch.setattr(pipe.vae, "decode", lambda z, **values: seen.append(z) or decode(z, **values))
        images = pipe(
            prompt=list(prompts),
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=scale,
            latents=patches(noise),
            max_sequence_length=models_of(name).base.tokens,
            output_type="np",
        ).images
    return images if output_type == "np" else seen[0]


# ---------------------------------------------------------------------------------------- beside the pipeline


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(("height", "width", "steps"), [(64, 64, 6), (48, 64, 4), (40, 56, 7)])
def test_one_view_is_what_the_pipeline_draws(name, height, width, steps):
    """What goes into the decoder is the same, and so is the canvas."""
    models, noise = models_of(name), start(models_of(name), height, width, batch=2)
    expected = theirs(name, noise, steps, SCALES[name], "latent")
    ours = engine(models, noise, PROMPTS, steps=steps, guidance_scale=SCALES[name])
    assert relative(models.base.from_canvas(ours), expected) < 1e-5
    assert relative(ours, models.base.to_canvas(expected)) < 1e-5


@pytest.mark.parametrize("name", MAKERS)
def test_generated_images_are_the_pipelines(name):
    models = models_of(name)
    noise = CanvasNoise([5, 6], CHANNELS, 16, 16, torch.device("cpu"))()
    expected = np.round(255 * theirs(name, noise, 4, SCALES[name], "np"))
    ours = generate(models, list(PROMPTS), ["", ""], [5, 6], 64, 64, 4, SCALES[name], 2)
    for image, other in zip(ours, expected, strict=True):
        assert np.abs(np.asarray(image) - other).max() <= 1


@pytest.mark.parametrize("name", MAKERS)
def test_what_the_prompt_says_is_read(name):
    models, noise = models_of(name), start(models_of(name), 64, 64)
    one, other = (engine(models, noise, (text,), steps=2, guidance_scale=SCALES[name]) for text in PROMPTS)
    assert relative(one, other) > 1e-3


def test_guidance_is_read_where_there_is_any():
    noise = start(models_of("dev"), 64, 64)

    def drawn(name, scale, negative=""):
        return engine(models_of(name), noise, PROMPTS[:1], (negative,), steps=2, guidance_scale=scale)

    assert relative(drawn("dev", 4.0), drawn("dev", 2.0)) > 1e-4
    assert torch.equal(drawn("dev", 4.0), drawn("dev", 4.0, "ugly"))
    assert relative(drawn("klein-base", 4.0), drawn("klein-base", 4.0, "ugly")) > 1e-4
    assert torch.equal(drawn("klein", 1.0), drawn("klein", 4.0))


@pytest.mark.parametrize("steps", [4, 28, 50])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (1024, 1024), (2048, 1536)])
def test_levels_are_the_pipelines(steps, height, width):
    """The latter two are below and above the number of tokens from which the number of steps does not count."""
    pipe = made("klein")
    noise = torch.zeros(1, 4 * CHANNELS, height // 16, width // 16)
    stop = {"callback_on_step_end": lambda pipe, *_: setattr(pipe, "_interrupt", True) or {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe, "vae_scale_factor", 8)
        patch.setattr(pipe.transformer, "forward", lambda hidden_states, **_: (hidden_states,))
        sizes = {"height": height, "width": width, "num_inference_steps": steps}
        pipe(prompt="a cat", latents=noise, output_type="latent", max_sequence_length=96, **sizes, **stop)
    path = models_of("klein").base.path(steps, Timing(cells=height * width // 64))
    assert [step.sigma for step in path] == pytest.approx(pipe.scheduler.sigmas[:-1].tolist(), abs=1e-6)
    assert [step.t for step in path] == pytest.approx(pipe.scheduler.timesteps.tolist(), abs=1e-3)
    assert path[-1].sigma_next == 0


def test_the_canvas_is_normalised_as_the_pipeline_does():
    pipe, base = made("dev"), models_of("dev").base
    pixels = torch.rand(2, 3, 48, 64) * 2 - 1
    latents = pipe.vae.encode(pixels).latent_dist.mode()
    expected = pipe._encode_vae_image(pixels, generator=None)
    assert torch.equal(patches(base.to_canvas(latents)), expected)
    assert relative(base.from_canvas(base.to_canvas(latents)), latents) < 1e-6
    assert torch.equal(autoencoder.encode(models_of("dev"), pixels[..., :32, :32]).isfinite().all(), torch.tensor(True))


# ---------------------------------------------------------------------------------------------------- rows


def rows_of(name, prompts):
    texts = models_of(name).base.encode(list(prompts), negative=False, device=torch.device("cpu"))
    assert texts.mask is None
    return Rows(texts.states, None, texts.pooled, 4.0, torch.zeros(len(prompts), 6))


@pytest.mark.parametrize("name", MAKERS)
def test_views_do_not_see_each_other(name):
    """Another order of the views gives the same predictions in that order; neighbours and their texts count nothing."""
    base = models_of(name).base
    sample, prompts, order = start(models_of(name), 40, 56, batch=3), (*PROMPTS, "a dog" * 12), [2, 0, 1]
    time = torch.tensor(600.0)

    def predict(sample, rows):
        return base.denoiser(sample, time, return_dict=False, **base.arguments(rows))[0]

    whole = predict(sample, rows_of(name, prompts))
    moved = predict(sample[order], rows_of(name, [prompts[place] for place in order]))
    assert torch.equal(moved, whole[order])
    alone = predict(sample[:1], rows_of(name, prompts[:1]))
    assert relative(alone, whole[:1]) < 1e-6
    other = predict(sample[:2], rows_of(name, (PROMPTS[0], "a much longer caption, of another view")))
    assert relative(other[:1], whole[:1]) < 1e-6


@pytest.mark.parametrize("name", MAKERS)
def test_tokens_are_counted_in_the_chat_template(name):
    """As the pipeline fills its states: what it counts is what is not padding."""
    pipe, base, seen = made(name), models_of(name).base, []
    with pytest.MonkeyPatch.context() as patch:
        forward = pipe.text_encoder.forward
        patch.setattr(
            pipe.text_encoder, "forward", lambda **values: seen.append(values["attention_mask"]) or forward(**values)
        )
        base.encode(list(PROMPTS), negative=False, device=torch.device("cpu"))
    assert base.count(PROMPTS) == seen[0].sum(dim=1).tolist()
    assert base.count(["a" * base.tokens])[0] > base.tokens


@dataclass
class Processor:
    """As much of Transformers' PixtralProcessor, which needs torchvision, as is used for texts."""

    tokenizer: Any

    @property
    def apply_chat_template(self):
        return self.tokenizer.apply_chat_template


def test_a_users_own_pipeline_may_have_a_processor():
    """The tokenizer of FLUX.2 dev lies in a processor of texts and images."""
    pipe = make_dev()
    tokenizer, count = pipe.tokenizer, Models.from_pipeline(pipe).base.count(PROMPTS)
    pipe.tokenizer = Processor(tokenizer)
    base = Models.from_pipeline(pipe).base
    assert base.tokens == tokenizer.model_max_length == 320
    assert base.count(PROMPTS) == count


@pytest.mark.parametrize("name", ["dev", "klein-base"])
def test_half_precision_computes_in_half_precision(name):
    """Transformer and texts in bfloat16, the VAE in float32, and the image close to that of float32."""
    pipe = MAKERS[name]()
    pipe.transformer.to(torch.bfloat16)
    pipe.text_encoder.to(torch.bfloat16)
    models, seen = Models.from_pipeline(pipe), []
    pipe.transformer.register_forward_pre_hook(lambda module, args, values: seen.append(values), with_kwargs=True)
    noise = start(models, 64, 64)
    half = engine(models, noise, PROMPTS[:1], steps=4, guidance_scale=4.0)
    assert models.dtype == torch.bfloat16
    assert half.dtype == torch.float32
    for values in seen:
        kinds = {values[part].dtype for part in ("hidden_states", "encoder_hidden_states", "timestep")}
        assert kinds == {torch.bfloat16}
    assert 0 < relative(half, engine(models_of(name), noise, PROMPTS[:1], steps=4, guidance_scale=4.0)) < 0.05


# ------------------------------------------------------------------------------------------------- methods

RUNNING = {
    "direct": {},
    "multidiffusion": {},
    "resmaster": STRUCTURE_ALONE,
    "demofusion": {},
    "cascade": {},
    "c_upscale": {"share": 0},
    "pixelrush": {"guidance_scale": 1},
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("method", RUNNING)
def test_methods_run_at_odd_sizes_with_the_rows_of_the_forecast(method, name, folders):
    """108 x 81 px is padded to 112 x 88, and cropped again."""
    config = settings(method, scale=3, view_batch=1, **{"guidance_scale": SCALES[name], **RUNNING[method]})
    image, models = some_image(36, 27), models_of(name)
    with counting() as counted:
        made, other = (upscale_image(models, image, text, config=config) for text in PROMPTS)
    assert made.size == (108, 81)
    assert made.tobytes() != other.tobytes()
    work = high_res_work(config, denoising_of(ModelConfig(id=str(folders[name]))), 27, 36)
    assert 2 * sum(each.rows for each in work) == counted.rows


@pytest.mark.parametrize("method", [name for name, each in methods().items() if each.base_model])
def test_methods_that_do_not_fit_are_refused_in_one_line(method, folders):
    whole = {"image_prompt": {"enabled": True}} if method == "resmaster" else {}
    said = refusal({"upscale": {"method": method, "steps": 4, "guidance_scale": 1, **whole}}, folders["klein"])
    if method in RUNNING and method != "c_upscale":
        whole = method == "resmaster"
        assert bool(said) == whole
        assert not whole or "upscale.image_prompt.enabled: needs image prompts" in said
    else:
        assert re.search(
            rf"(method {method}|upscale.share): needs (convolutions|attention), which model .* has not", said
        )


# ------------------------------------------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The models as folders; dev's tokenizer lies in a processor, as in the published model."""
    root = tmp_path_factory.mktemp("models")
    for name in MAKERS:
        made(name).save_pretrained(root / name)
    index = root / "dev" / "model_index.json"
    parts = json.loads(index.read_text())
    index.write_text(json.dumps({**parts, "tokenizer": ["transformers", "PixtralProcessor"]}))
    processor = {"processor_class": "PixtralProcessor", "patch_size": 14, "image_token": "[IMG]"}
    (root / "dev" / "tokenizer" / "processor_config.json").write_text(json.dumps(processor))
    return {name: root / name for name in MAKERS}


def configured(folder, **values):
    """A dataset's configuration for a model folder, small and without image prompts."""
    upscale = {"method": "resmaster", "scale": 1.5, "steps": 3, "guidance_scale": 1, **STRUCTURE_ALONE}
    base = {
        "name": "demo",
        "root": str(folder.parent / "out"),
        "prompts": "prompts.txt",
        "model": {"id": str(folder), "device": "cpu"},
        "low_res": {"steps": 3, "guidance_scale": 1},
        "captions": {"source": "prompt"},
        "upscale": upscale,
        "quality": {"clip": None},
    }
    return parse_config({**base, **values})


def refusal(values, folder):
    """What planning says against a configuration; "" if nothing."""
    places._read_json.cache_clear()
    try:
        check(configured(folder, **values))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", MAKERS)
def test_a_folder_is_loaded_as_the_pipeline_is(name, folders):
    config = ModelConfig(id=str(folders[name]), device="cpu")
    models, noise = load_models(config), start(models_of(name), 64, 64)
    assert geometry_of(config) == models.geometry == models_of(name).geometry
    assert models.base.sampling == models.base.family.sampling(config)
    drawn = [engine(each, noise, PROMPTS[:1], steps=2, guidance_scale=4.0) for each in (models, models_of(name))]
    assert torch.equal(*drawn)
    assert models.base.count(PROMPTS) == models_of(name).base.count(PROMPTS)
    assert models.base.family.token_counter(config)("red house") == len("red house")


@pytest.mark.parametrize("name", MAKERS)
def test_the_whole_pipeline_makes_the_same_bytes_again(name, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    sampling = {"steps": 3, "guidance_scale": SCALES[name]}
    digests = []
    for root in ("one", "two"):
        upscale = {"method": "resmaster", "scale": 1.5, **sampling, **STRUCTURE_ALONE}
        values = {"root": str(tmp_path / root), "low_res": sampling, "upscale": upscale}
        dataset = ingest(configured(folders[name], **values))
        receipts = [run_stage(dataset, stage, 0) for stage in dataset.hashes]
        assert [receipt.samples_ok for receipt in receipts] == [2] * len(dataset.hashes)
        digests.append([stored.sha256 for receipt in receipts for stored in receipt.objects])
    assert digests[0] == digests[1]


def test_a_tokenizer_counts_captions_before_weights_are_there(folders, tmp_path):
    shutil.copytree(folders["dev"], tmp_path / "dev", ignore=shutil.ignore_patterns("*.safetensors"))
    config = ModelConfig(id=str(tmp_path / "dev"))
    assert models_of("dev").base.family.token_counter(config)("a cat, red") == 10
    assert "has no file model.safetensors" in refusal({}, tmp_path / "dev")


# -------------------------------------------------------------------------------------- sampling and variants


@pytest.mark.parametrize(
    ("name", "guidance", "kind", "recommended"),
    [
        ("dev", "auto", "embedded", (50, 4.0)),
        ("dev", "cfg", "cfg", (50, 4.0)),
        ("dev", "none", "none", (4, 1.0)),
        ("klein", "auto", "none", (4, 1.0)),
        ("klein", "cfg", "cfg", (50, 4.0)),
        ("klein-base", "auto", "cfg", (50, 4.0)),
        ("klein-base", "none", "none", (4, 1.0)),
    ],
)
def test_what_guidance_does_is_in_the_files(name, guidance, kind, recommended, folders):
    config = ModelConfig(id=str(folders[name]), guidance=guidance)
    sampling = models_of(name).base.family.sampling(config)
    assert (sampling.kind, sampling.steps, sampling.guidance_scale) == (kind, *recommended)
    assert Models.from_pipeline(made(name), config=config).base.sampling == sampling


def test_sampling_that_klein_cannot_use_is_refused_with_what_is_recommended(folders):
    said = refusal({"low_res": {}}, folders["klein"])
    assert "low_res.guidance_scale: 5 has no effect" in said
    assert "set low_res.steps: 4 and low_res.guidance_scale: 1" in said
    said = refusal({"low_res": {"steps": 50, "guidance_scale": 1}}, folders["klein"])
    assert "low_res.steps: 50 are too many" in said
    assert refusal({"low_res": {"steps": 50, "guidance_scale": 4}}, folders["klein-base"]) == ""
    assert "was chosen for SDXL" in refusal({"low_res": {"steps": 50}}, folders["dev"])


def edited(path, change):
    """`path` with a changed JSON object."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("distilled", [True, False])
def test_a_pipeline_that_inpaints_has_the_same_transformer(distilled):
    """A user's own pipeline is of the class that the user needs elsewhere. Its parts draw the same."""
    name = "klein" if distilled else "klein-base"
    pipe = Flux2KleinInpaintPipeline(**made(name).components, is_distilled=distilled)
    models, noise = Models.from_pipeline(pipe), start(models_of(name), 64, 64)
    drawn = [engine(each, noise, PROMPTS[:1], steps=2, guidance_scale=4.0) for each in (models, models_of(name))]
    assert models.base.sampling == models_of(name).base.sampling
    assert torch.equal(*drawn)


VARIANTS = {
    "other pipeline": ("model_index.json", {"_class_name": "Flux2KleinKVPipeline"}, "and the known families"),
    "other transformer": (
        "transformer/config.json",
        {"_class_name": "FluxTransformer2DModel"},
        "not a Flux2Transformer",
    ),
    "editing": ("transformer/config.json", {"in_channels": 64}, "an inpainting, editing or control variant"),
    "other VAE": ("vae/config.json", {"_class_name": "AutoencoderKL"}, "its VAE is 'AutoencoderKL'"),
    "other scheduler": ("model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}, "DDIMScheduler"),
    "inverted": ("scheduler/scheduler_config.json", {"invert_sigmas": True}, "invert_sigmas is not supported"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_refused_at_planning(variant, folders, tmp_path):
    file, change, words = VARIANTS[variant]
    shutil.copytree(folders["klein"], tmp_path / "m")
    edited(tmp_path / "m" / file, lambda values: values.update(change))
    said = refusal({}, tmp_path / "m")
    assert all(words in line for line in said.splitlines())
    assert said


@pytest.mark.parametrize("name", ["dev", "klein"])
def test_a_pipeline_is_refused_in_the_words_of_the_folder(name, folders, tmp_path):
    """An editing transformer, and another VAE."""
    shutil.copytree(folders[name], tmp_path / "m")
    edited(tmp_path / "m" / "transformer" / "config.json", lambda values: values.update(in_channels=64))
    said = refusal({}, tmp_path / "m")
    pipe = MAKERS[name]()
    pipe.transformer.register_to_config(in_channels=64)
    with pytest.raises(ConfigError) as caught:
        Models.from_pipeline(pipe)
    assert str(caught.value).removeprefix("model pipeline: ") in said
    pipe = MAKERS[name]()
    pipe.register_modules(vae=tiny_vae())
    with pytest.raises(ConfigError, match="its VAE is 'AutoencoderKL', not an AutoencoderKLFlux2"):
        Models.from_pipeline(pipe)


MUTATIONS = [
    (file, key, value)
    for file, keys in {
        "model_index.json": ("is_distilled", "scheduler", "tokenizer", "text_encoder", "vae", "transformer"),
        "transformer/config.json": ("in_channels", "guidance_embeds", "_class_name"),
        "vae/config.json": ("block_out_channels", "latent_channels", "sample_size", "batch_norm_eps", "_class_name"),
        "scheduler/scheduler_config.json": ("shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal"),
        "tokenizer/tokenizer_config.json": ("model_max_length", "tokenizer_class"),
    }.items()
    for key in keys
    for value in ("x", None, -1, 0, 10**12, [], {}, [None], float("nan"))
]


REFUSED = {
    *(
        (part, value)
        for part in ("scheduler", "tokenizer", "text_encoder", "vae", "transformer")
        for value in ("x", None)
    ),
    *((key, value) for key in ("batch_norm_eps", "model_max_length", "in_channels") for value in ("x", None, -1)),
    *(("latent_channels", value) for value in ("x", None, -1, 0, 10**12)),
    *(("_class_name", value) for value in ("x", None, -1)),
    ("model_max_length", 0),
}
"""Damages that would only be noticed while an image is drawn, if planning did not notice them."""


@pytest.mark.parametrize("name", ["dev", "klein"])
def test_damaged_settings_are_refused_in_words_or_do_no_harm(name, folders, tmp_path):
    shutil.copytree(folders[name], tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    for weights in folders[name].rglob("*.safetensors"):
        (tmp_path / "m" / weights.relative_to(folders[name])).symlink_to(weights)
    for file, key, value in MUTATIONS:
        path = tmp_path / "m" / file
        whole = path.read_text()
        edited(path, lambda values, key=key, value=value: values.update({key: value}))
        said = refusal({}, tmp_path / "m")
        value = tuple(value) if isinstance(value, list) else repr(value) if isinstance(value, dict) else value
        assert all(len(line) < 1500 for line in said.splitlines()), (file, key, value)
        assert said or (key, value) not in REFUSED, (file, key, value)
        path.write_text(whole)
    assert refusal({}, tmp_path / "m") == ""


@pytest.mark.parametrize(
    "file", ["model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize("content", [None, "", "[1]", "{", "3", "null"])
def test_files_that_are_missing_or_no_json_are_named(file, content, folders, tmp_path):
    shutil.copytree(folders["klein"], tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    path = tmp_path / "m" / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    said = refusal({}, tmp_path / "m")
    assert file in said
    assert "\n" not in said.partition("model.id: ")[0]
