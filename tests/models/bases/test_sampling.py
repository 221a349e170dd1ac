"""What a model without classifier-free guidance is asked for is refused, recommended or noted."""

import logging

import pytest
import torch

import resmaster_stages as rm
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.diffusion.text import encode_prompts, truncated
from resmaster_stages.diffusion.views import view_grid
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.generate import generate
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases import family_of, offload_of
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.models.captioner import content_tokens
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from resmaster_stages.models.places import resolve_dtype
from resmaster_stages.models.schedule import Timing
from resmaster_stages.planning.preview import preview
from tests.methods.common import difference, settings, some_image
from tests.tiny_models import counted
from tests.tiny_transformers import make_flux
from tests.tiny_z_image import make_z_image

WITHOUT_PROMPTS = {"image_prompt": {"enabled": False}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("flux")
    for name, embeds in (("dev", True), ("schnell", False)):
        make_flux(embeds).save_pretrained(root / name)
    return root


def plan(folders, tmp_path, model, low_res, upscale, prompts="prompt\na cat\n"):
    (tmp_path / "prompts.csv").write_text(prompts)
    return preview(
        parse_config(
            {
                "name": "d",
                "root": str(tmp_path / "out"),
                "prompts": str(tmp_path / "prompts.csv"),
                "model": {"id": str(folders / model), "device": "cpu"},
                "captions": {"source": "prompt"},
                "quality": {"clip": None},
                "low_res": low_res,
                "upscale": {"scale": 2, **upscale},
            }
        )
    )


GOOD = {
    "dev": {"steps": 28, "guidance_scale": 3.5},
    "schnell": {"steps": 4, "guidance_scale": 1},
}


@pytest.mark.parametrize("model", GOOD)
def test_defaults_are_refused_with_the_recommended_pair_and_the_pair_is_taken(folders, tmp_path, model):
    with pytest.raises(ConfigError) as found:
        plan(folders, tmp_path, model, {}, WITHOUT_PROMPTS)
    for part in ("low_res", "upscale"):
        pair = " and ".join(f"{part}.{name}: {value}" for name, value in GOOD[model].items())
        assert sum(f"set {pair}" in line for line in found.value.mistakes) == 1, found.value
    assert plan(folders, tmp_path, model, GOOD[model], {**WITHOUT_PROMPTS, **GOOD[model]}).notes == ()


def test_what_a_user_writes_is_taken_if_it_has_an_effect(folders, tmp_path):
    written = {"steps": 50, "guidance_scale": 7.5}
    assert plan(folders, tmp_path, "dev", written, {**WITHOUT_PROMPTS, **written}).samples == 1
    few = {"steps": 17, "guidance_scale": 1}
    with pytest.raises(ConfigError, match=r"low_res\.steps: 17 are too many for .*schnell, which is made for few; set"):
        plan(folders, tmp_path, "schnell", few, {**WITHOUT_PROMPTS, **GOOD["schnell"]})
    with pytest.raises(ConfigError, match=r"upscale\.guidance_scale: 2 has no effect on .*schnell"):
        plan(folders, tmp_path, "schnell", GOOD["schnell"], {**WITHOUT_PROMPTS, "steps": 4, "guidance_scale": 2})


def test_negative_prompts_that_are_not_read_are_said(folders, tmp_path):
    low_res, upscale = {**GOOD["dev"], "negative_prompt": "ugly"}, {**WITHOUT_PROMPTS, **GOOD["dev"]}
    rows = "prompt,negative_prompt\na cat,blurry\na dog,\n"
    notes = plan(folders, tmp_path, "dev", low_res, upscale, rows).notes
    assert len(notes) == 2
    assert notes[0].startswith("low_res.negative_prompt: not read, because ")
    assert notes[1].startswith("negative prompts of 1 samples: not read, because ")
    assert plan(folders, tmp_path, "dev", low_res, {"method": "lanczos"}, rows).notes == notes
    (tmp_path / "prompts.csv").unlink()


def test_a_loaded_model_refuses_in_the_same_words():
    schnell, dev = Models.from_pipeline(make_flux(False)), Models.from_pipeline(make_flux(True))
    with pytest.raises(ConfigError, match=r"upscale\.guidance_scale: 7\.5 has no effect"):
        upscale_image(schnell, some_image(), "a cat", config=settings("direct"))
    with pytest.raises(ConfigError, match=r"upscale\.guidance_scale: 7\.5 was chosen for SDXL"):
        upscale_image(dev, some_image(), "a cat", config=settings("direct"))
    with pytest.raises(ConfigError, match=r"low_res\.guidance_scale: 5 has no effect"):
        next(generate(schnell, ["a cat"], [""], [1], 64, 64, 4, 5.0, 1))


def test_the_library_asks_for_what_is_recommended():
    pipe = make_flux(False)
    with counted(pipe.transformer) as calls:
        (made,) = rm.generate("a cat", model=pipe)
    assert len(calls) == 4
    assert made.size == (64, 64)
    assert rm.upscale(made, "a cat", model=pipe, scale=2).size == (128, 128)


def test_one_branch_and_no_negative_prompt(folders):
    models = load_models(parse_config({"name": "d", "model": {"id": str(folders / "dev"), "device": "cpu"}}).model)
    load_models.cache_clear()
    with counted(models.base.denoiser.network) as calls:
        images = [
            upscale_image(
                models,
                some_image(),
                "a cat",
                config=settings("multidiffusion", guidance_scale=scale, negative_prompt=text),
                seed=3,
            )
            for scale, text in ((3.5, ""), (3.5, "ugly"), (9.0, ""))
        ]
    assert {shape[0] for shape in calls} == {9}, "nine views, one row each"
    assert images[0].tobytes() == images[1].tobytes()
    assert difference(images[0], images[2]) > 0, "the scale is read as a number"


def test_guidance_can_be_said_of_a_checkpoint_that_unlearned_it(folders):
    model = {"id": str(folders / "schnell"), "device": "cpu", "guidance": "cfg"}
    config = parse_config({"name": "d", "model": model}).model
    models = load_models(config)
    load_models.cache_clear()
    assert models.base.sampling.kind == "cfg"
    with counted(models.base.denoiser.network) as calls:
        upscale_image(models, some_image(), "a cat", config=settings("direct", guidance_scale=4))
    assert {shape[0] for shape in calls} == {2}
    assert "guidance" in config.identity()


def test_the_native_size_can_be_said(folders):
    model = {"id": str(folders / "dev"), "device": "cpu", "native_px": 32}
    models = load_models(parse_config({"name": "d", "model": model}).model)
    load_models.cache_clear()
    assert models.geometry == Geometry(32, 4, 2)
    with pytest.raises(ConfigError, match=r"model\.native_px: 36 is no multiple of 8; set it to 32 or 40"):
        load_models(parse_config({"name": "d", "model": {**model, "native_px": 36}}).model)


def test_the_time_shift_is_that_of_a_view():
    base = Models.from_pipeline(make_flux()).base
    grid = view_grid(Geometry(1024, 8, 2), 4096, 4096, 0.5)

    def timing_of(time_shift):
        return settings("multidiffusion", time_shift=time_shift).timing(grid)

    view = timing_of("view")
    assert view == Timing(128 * 128)
    assert timing_of("sqrt") == Timing(128 * 128, growth=4.0)
    assert timing_of(6.0) == Timing(128 * 128, shift=6.0)

    def shift(timing):
        first, second = base.path(2, timing)
        assert first.sigma == 1
        return second.sigma / (1 - second.sigma)  # of the level 0.5

    assert settings("direct").timing(grid) == Timing(128 * 128), "a large canvas has the shift of the native size"
    assert settings("direct").timing(view_grid(Geometry(1024, 8, 2), 512, 1024, 0.5)) == Timing(64 * 128)
    assert shift(view) == pytest.approx(2.71828**1.15, rel=1e-4), "as for 1024 px, not as for 4096"
    assert shift(timing_of("sqrt")) == pytest.approx(4 * 2.71828**1.15, rel=1e-4)
    assert shift(timing_of(6.0)) == pytest.approx(6.0, rel=1e-5)


def test_captions_may_be_as_long_as_the_text_encoder_reads(folders):
    dev, schnell = (parse_config({"name": "d", "model": {"id": str(folders / name)}}).model for name in GOOD)
    assert content_tokens(dev) == 47, "the tokenizer's 48, less the end mark"
    path = folders / "schnell" / "tokenizer_2" / "tokenizer_config.json"
    kept = path.read_text()
    path.write_text(kept.replace('"model_max_length": 48', '"model_max_length": 1000'))
    assert content_tokens(schnell) == 255
    path.write_text(kept)
    assert content_tokens(parse_config({"name": "d"}).model) == 75
    models = load_models(dev)
    load_models.cache_clear()
    assert truncated(models, ["a" * 47, "a" * 48]) == [False, True]


def test_half_precision_and_the_place_of_text_encoders_on_a_gpu_follow_from_the_family(folders):
    cuda = torch.device("cuda")
    transformer, unet = ModelConfig(id=str(folders / "dev")), ModelConfig()
    assert [family_of(each).half for each in (transformer, unet)] == ["bfloat16", "float16"]
    assert resolve_dtype("auto", cuda, "bfloat16") is torch.bfloat16
    assert resolve_dtype("auto", torch.device("cpu"), "bfloat16") is torch.float32
    assert resolve_dtype("float16", cuda, "bfloat16") is torch.float16
    assert [offload_of(each) for each in (transformer, unet)] == ["text", "none"]
    assert offload_of(ModelConfig(id=transformer.id, offload="model")) == "model"
    assert load_models(ModelConfig(id=transformer.id, device="cpu")).offload == "none"
    load_models.cache_clear()


def test_libraries_are_quiet_only_while_texts_are_encoded():
    models = Models.from_pipeline(make_flux())
    of_transformers = logging.getLogger("transformers")
    before, seen = (of_transformers.level, logging.getLogger("diffusers").level), []
    encode = models.base.pipe.encode_prompt

    def heard(*args, **kwargs):
        seen.append((of_transformers.level, logging.getLogger("diffusers").level))
        return encode(*args, **kwargs)

    models.base.pipe.encode_prompt = heard
    encode_prompts(models, ["a long prompt " * 20])
    assert seen == [(logging.ERROR, logging.ERROR)]
    assert (of_transformers.level, logging.getLogger("diffusers").level) == before


def test_image_prompts_are_refused_with_the_ways_out(folders, tmp_path):
    with pytest.raises(ConfigError) as found:
        plan(folders, tmp_path, "dev", GOOD["dev"], {**GOOD["dev"], "image_prompt": {"enabled": True}})
    assert "set model.ip_adapter, or upscale.image_prompt.enabled: false" in str(found.value)
    with pytest.raises(ConfigError, match=r"set it to false, which leaves structural guidance and captions .*SDXL"):
        upscale_image(Models.from_pipeline(make_z_image()), some_image(), "a cat", config=settings("resmaster"))
