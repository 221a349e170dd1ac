"""PixArt-alpha and PixArt-Sigma through the engine, beside diffusers' own pipelines."""

import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.diffusion.composer import Composer, attention_map
from resmaster_stages.diffusion.guidance import TEXT, DenoiserCall
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.generate import generate
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases.base import Texts
from resmaster_stages.models.captioner import content_tokens, token_counter
from resmaster_stages.models.geometry import geometry_of
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from resmaster_stages.models.schedule import Timing
from resmaster_stages.planning.checks import check
from tests.methods.common import difference, forwards, settings, some_image
from tests.models.bases.common import engine, relative, start
from tests.models.bases.folders import VALUES, built, configured, copied, fresh, planned, spoiled, stored
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
from tests.tiny_pixart import BETAS, make_pixart

PROMPTS = ("a cat", "a big house, red, of old stones and wood")
NEGATIVE = ("blurry", "")
WHOLE = {**METHODS, "c_upscale": {}}


def ddim():
    return DDIMScheduler(**BETAS, timestep_spacing="leading", steps_offset=1, clip_sample=False)


@pytest.fixture(params=["sigma", "alpha", "alpha at 1024 px"])
def pipe(request):
    alpha = request.param != "sigma"
    return make_pixart(alpha, sample_size=128 if request.param.endswith("px") else 16)


@pytest.fixture(scope="module")
def models():
    return Models.from_pipeline(make_pixart())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pixart") / "PixArt-Sigma"
    make_pixart().save_pretrained(place)
    return place


def theirs(pipe, noise, steps, scale, **more):
    """What the pipeline draws from the same noise."""
    height, width = (side * 4 for side in noise.shape[-2:])
    values = {"height": height, "width": width, "num_inference_steps": steps, "guidance_scale": scale}
    values |= {"negative_prompt": list(NEGATIVE), "latents": noise, "output_type": "latent", "clean_caption": False}
    return pipe(list(PROMPTS), use_resolution_binning=False, max_sequence_length=48, **values | more).images


@pytest.mark.parametrize(("height", "width", "steps", "scale"), [(64, 64, 10, 4.5), (48, 80, 8, 1), (64, 40, 5, 3)])
def test_one_view_is_what_the_pipeline_draws_with_ddim(pipe, height, width, steps, scale):
    """In numbers of steps that divide 1000, because diffusers' DDIM steps 1000 // n on, not to the next timestep."""
    pipe.scheduler = ddim()
    models = Models.from_pipeline(pipe)
    noise = start(models, height, width, batch=2)
    ours = engine(models, noise, PROMPTS, NEGATIVE, steps=steps, guidance_scale=scale)
    assert relative(ours, theirs(pipe, noise, steps, scale)) < 1e-5


@pytest.mark.parametrize(("height", "width", "steps", "scale"), [(64, 64, 20, 4.5), (48, 80, 14, 1), (64, 40, 7, 3)])
def test_one_view_is_what_the_pipeline_draws_with_its_own_solver(pipe, height, width, steps, scale):
    """Their DPM-Solver++ of second order, whose last step is of first order, in its own timesteps."""
    models = Models.from_pipeline(pipe)
    noise = start(models, height, width, batch=2)
    expected = theirs(pipe, noise, steps, scale)
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    assert [step.t for step in models.base.path(steps, Timing(256))] == pipe.scheduler.timesteps.tolist()
    values = {"steps": steps, "guidance_scale": scale}
    assert relative(engine(models, noise, PROMPTS, NEGATIVE, stepper="dpmpp_2m", **values), expected) < 1e-5
    assert relative(engine(models, noise, PROMPTS, NEGATIVE, **values), expected) > 1e-3, "of first order"


def test_latents_go_to_the_canvas_and_back(models):
    latents = torch.randn(2, 4, 6, 10)
    assert relative(models.base.from_canvas(models.base.to_canvas(latents)), latents) < 1e-6


@pytest.mark.parametrize("scale", [4.5, 1.0])
def test_generated_images_are_the_pipelines(pipe, scale):
    pipe.scheduler = ddim()
    (ours,) = generate(Models.from_pipeline(pipe), [PROMPTS[1]], [NEGATIVE[0]], [11], 48, 64, 4, scale, 1)
    (expected,) = pipe(
        PROMPTS[1],
        negative_prompt=NEGATIVE[0],
        height=48,
        width=64,
        num_inference_steps=4,
        guidance_scale=scale,
        latents=torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(11)),
        use_resolution_binning=False,
        clean_caption=False,
        max_sequence_length=48,
    ).images
    assert is_visible(ours)
    assert difference(ours, expected) <= 1


def test_bfloat16_computes_as_the_pipeline_does():
    """One step, because the pipeline rounds its latents at every step."""
    low = make_pixart(scheduler=ddim()).to(torch.bfloat16)
    low.vae.to(torch.float32)
    small = Models.from_pipeline(low)
    noise = start(small, 64, 64, batch=2).to(torch.bfloat16).float()
    assert small.dtype == torch.bfloat16
    ours = engine(small, noise, PROMPTS, NEGATIVE, steps=1, guidance_scale=1.0)
    assert ours.dtype == torch.float32
    assert relative(ours, theirs(low, noise.to(torch.bfloat16), 1, 1.0).float()) < 1e-2


# ---------------------------------------------------------------------------------------------------------- texts


def test_padding_of_texts_is_not_read(models):
    texts = models.base.encode(list(PROMPTS), False, torch.device("cpu"))
    assert texts.mask.sum(dim=1).tolist() == [6, 41] == models.base.count(PROMPTS)
    assert texts.states.shape == (2, 48, 32)
    views = some_views(models, 1)
    plain = rows_of(models, views, PROMPTS[:1])
    encode = type(models.base).encode

    def noisy(base, prompts, negative, device):
        texts = encode(base, prompts, negative, device)
        return Texts(texts.states + 9 * ~texts.mask[..., None], texts.pooled, texts.mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(models.base), "encode", noisy)
        assert relative(rows_of(models, views, PROMPTS[:1]), plain) < 1e-6


@pytest.mark.parametrize(("alpha", "tokens"), [(True, 120), (False, 300)])
def test_tokens_that_are_read(tmp_path, alpha, tokens):
    pipe = make_pixart(alpha)
    pipe.tokenizer.model_max_length = 512
    base = Models.from_pipeline(pipe).base
    pipe.save_pretrained(tmp_path / "model")
    config = ModelConfig(id=str(tmp_path / "model"))
    assert base.tokens == tokens
    assert base.encode(["a" * 600], False, torch.device("cpu")).states.shape[1] == tokens
    assert content_tokens(config) == tokens - 1
    assert token_counter(config)("a cat") == 5
    assert load_models(ModelConfig(id=config.id, device="cpu")).base.tokens == tokens


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


def test_only_alpha_at_1024_px_is_told_sizes():
    """`upscale.micro_conditioning` says which. Two views of 512 px of a canvas of 520 x 512 px."""

    def draw(told, **values):
        models = Models.from_pipeline(make_pixart(True, sample_size=128, told=told))
        config = settings("multidiffusion", scale=2, steps=1, stride=1.0, **values)
        heard, network = [], models.base.denoiser.network
        plain = network.forward
        network.forward = lambda *args, **kwargs: heard.append(kwargs["added_cond_kwargs"]) or plain(*args, **kwargs)
        upscale_image(models, some_image(260, 256), "a cat", config=config)
        return [(each["resolution"], each["aspect_ratio"]) for each in heard]

    assert draw(False) == [(None, None)]
    for micro, size in (("canvas", [512.0, 520.0]), ("native", [512.0, 512.0])):
        ((resolution, aspect),) = draw(None, micro_conditioning=micro)
        assert resolution.tolist() == [size] * 4  # two views, each with two branches
        assert torch.equal(aspect, torch.full((4, 1), size[0] / size[1]))


# ------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", METHODS)
def test_methods_draw_what_is_asked_for(models, folder, method):
    image = drawn(models, method, guidance_scale=5.0)
    assert image.size == (112, 80)
    assert is_visible(image)
    assert difference(image, drawn(models, method, PROMPTS[1], guidance_scale=5.0)) > 0
    counted, forecast = counted_and_forecast(ModelConfig(id=str(folder), device="cpu"), method, guidance_scale=5.0)
    assert counted == forecast


def test_c_upscale_is_whole(models, folder, monkeypatch):
    monkeypatch.setitem(METHODS, "c_upscale", {"share": 0.5})
    image = drawn(models, "c_upscale", guidance_scale=5.0, steps=4)
    assert is_visible(image)
    assert forwards(models.base.denoiser.network) == {}
    counted, forecast = counted_and_forecast(
        ModelConfig(id=str(folder), device="cpu"), "c_upscale", guidance_scale=5.0, steps=4
    )
    assert counted == forecast
    monkeypatch.setitem(METHODS, "c_upscale", {"share": 0.0})
    assert difference(image, drawn(models, "c_upscale", guidance_scale=5.0, steps=4)) > 0


def test_scalediff_is_whole(models, folder, monkeypatch):
    monkeypatch.setitem(METHODS, "scalediff", {})
    image = drawn(models, "scalediff", guidance_scale=5.0, steps=5)
    assert is_visible(image)
    assert forwards(models.base.denoiser.network) == {}
    config = ModelConfig(id=str(folder), device="cpu")
    counted, forecast = counted_and_forecast(config, "scalediff", guidance_scale=5.0, steps=5)
    assert counted == forecast
    assert difference(image, drawn(models, "scalediff", guidance_scale=5.0, steps=5, jitter=False)) > 0


def test_the_composer_gives_padding_no_weight(models):
    """The map of the whole image is that of its words alone, and its views hear only these."""
    network, text = models.base.denoiser.network, models.base.encode(["a cat"], False, torch.device("cpu"))
    views = Composer(Grid(32, 32, 16, 8, multiple=2), (16, 16), 0.5, torch.device("cpu"))
    small = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    layer = network.transformer_blocks[1].attn2

    def look(states):
        with views.patch(network, DenoiserCall(branches=(TEXT,))), views.capturing():
            network(
                small,
                encoder_hidden_states=states,
                encoder_attention_mask=text.mask,
                timestep=torch.tensor([500]),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            )
        return {name: maps[0] for name, maps in views.maps.items()}

    with torch.inference_mode():
        maps = look(text.states)
        assert list(maps) == ["transformer_blocks.0.attn2", "transformer_blocks.1.attn2"]
        for each in maps.values():
            assert each.shape == (1, 48, 8, 8)  # words, and tokens of 2 x 2 latents
            assert not each[:, 6:].any()
            torch.testing.assert_close(each.sum(dim=1), torch.ones(1, 8, 8))
        torch.testing.assert_close(look(text.states + 9 * ~text.mask[..., None]), maps)
        query, key = torch.randn(1, 64, 48), torch.randn(1, 48, 48)
        bias = (1 - text.mask.float())[:, None] * -10000.0
        words = attention_map(query, key[:, :6], layer.heads)
        torch.testing.assert_close(attention_map(query, key, layer.heads, bias)[..., :6], words)


def test_methods_of_unets_are_refused(models):
    for method in CONVOLUTIONS:
        with pytest.raises(ConfigError, match=rf"method {method}: needs convolutions.*\(PixArt-Sigma\)"):
            upscale_image(models, some_image(), "a cat", config=settings(method))
    with pytest.raises(ConfigError, match=r"image_prompt.enabled: needs image prompts.*\(PixArt-Sigma\)"):
        upscale_image(models, some_image(), "a cat", config=settings("resmaster"))


# ------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize(
    ("name", "guidance", "expected"),
    [
        ("PixArt-Sigma-XL-2-1024-MS", "auto", ("cfg", 20, 4.5)),
        ("PixArt-LCM-XL-2-1024-MS", "auto", ("none", 4, 1.0)),
        ("PixArt-LCM-XL-2-1024-MS", "cfg", ("cfg", 20, 4.5)),
        ("my-model", "none", ("none", 4, 1.0)),
    ],
)
def test_lcm_has_no_guidance(folder, tmp_path, name, guidance, expected):
    (tmp_path / name).symlink_to(folder, target_is_directory=True)
    sampling = load_models(ModelConfig(id=str(tmp_path / name), device="cpu", guidance=guidance)).base.sampling
    assert (sampling.kind, sampling.steps, sampling.guidance_scale) == expected
    said = planned(configured(tmp_path / "data", tmp_path / name, model={"guidance": guidance}))
    if expected[0] == "cfg":
        assert said == ""
    else:
        assert "set low_res.steps: 4 and low_res.guidance_scale: 1" in said


# ------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("upscale", [{"method": "c_upscale"}, {"method": "multidiffusion", "stepper": "dpmpp_2m"}])
def test_a_folder_goes_through_all_stages(folder, tmp_path, upscale):
    upscale = {"steps": 4, "scale": 2, **upscale}
    config = configured(tmp_path / "one", folder, upscale=upscale)
    assert (geometry_of(config.model).native_px, geometry_of(config.model).step_px) == (64, 8)
    check(config)
    first = built(config)
    assert [(receipt.samples_ok, receipt.samples_failed) for receipt in first if receipt.stage != "captions"] == [
        (2, 0)
    ] * 3
    assert stored(built(configured(tmp_path / "two", folder, upscale=upscale))) == stored(first)
    other = stored(built(configured(tmp_path / "three", folder, upscale=upscale | {"guidance_scale": 3.0})))
    assert other["low_res"] == stored(first)["low_res"]
    assert other["high_res"] != stored(first)["high_res"]


@pytest.mark.parametrize("alpha", [False, True])
def test_a_folder_is_loaded_as_its_own_pipeline(tmp_path, alpha):
    """Older folders name the transformer as diffusers did before it had a class of its own."""
    pipe = make_pixart(alpha)
    pipe.save_pretrained(tmp_path / "model")
    for older in (False, True):
        name = "Transformer2DModel" if older else "PixArtTransformer2DModel"
        with spoiled(tmp_path / "model", "transformer/config.json", "_class_name", name):
            assert planned(configured(tmp_path / "data", tmp_path / "model")) == ""
            loaded = load_models(ModelConfig(id=str(tmp_path / "model"), device="cpu"))
        assert loaded.base.family.name == ("PixArt-alpha" if alpha else "PixArt-Sigma")
        noise, models = start(loaded, 64, 64), Models.from_pipeline(pipe)
        values = {"steps": 2, "guidance_scale": 4.5}
        assert torch.equal(engine(loaded, noise, PROMPTS[:1], **values), engine(models, noise, PROMPTS[:1], **values))


# ------------------------------------------------------------------------------------------------------ refusals


def test_a_time_shift_is_refused(models, folder, tmp_path):
    upscale = {"method": "multidiffusion", "scale": 2, "steps": 2, "time_shift": 3.0}
    (line,) = planned(configured(tmp_path, folder, upscale=upscale)).splitlines()
    assert line == f"upscale.time_shift: only flow-matching models have one, and {folder} is none; leave it out"
    for shift in (3.0, "sqrt"):
        with pytest.raises(ConfigError, match=r"time_shift: only flow-matching models have one, and PixArt-Sigma is"):
            upscale_image(models, some_image(), "a cat", config=settings("multidiffusion", time_shift=shift))


@pytest.fixture
def with_spiece(folder, tmp_path):
    """A model whose tokenizer is a `spiece.model`, as PixArt was published."""
    model = copied(folder, tmp_path)
    shutil.rmtree(model / "tokenizer")
    (model / "tokenizer").mkdir()
    (model / "tokenizer" / "spiece.model").write_bytes(b"\x0a\x0e")
    (model / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    return model


@pytest.mark.parametrize("missing", [("sentencepiece", "protobuf"), ("protobuf",), ()])
def test_a_tokenizer_that_cannot_be_read_names_what_is_missing(with_spiece, tmp_path, monkeypatch, missing):
    for package in ("sentencepiece", "protobuf"):
        monkeypatch.setattr(
            f"transformers.utils.is_{package}_available", lambda package=package: package not in missing
        )
    said = planned(configured(tmp_path / "data", with_spiece))
    if not missing:
        assert said == "", "nothing is known of the file itself"
        return
    line = (
        f"its tokenizer is a spiece.model, and reading that needs {' and '.join(missing)}; pip install "
        "'resmaster-pipeline[t5]'"
    )
    assert said == f"model.id: {line}"
    config = ModelConfig(id=str(with_spiece), device="cpu")
    for use in (load_models, token_counter):
        with fresh(), pytest.raises(ConfigError) as found:
            use(config)
        assert str(found.value) == f"model {with_spiece}: {line}"


def test_a_model_without_tokenizer_files_is_refused(with_spiece, tmp_path):
    """Transformers would make a tokenizer of special marks alone."""
    (with_spiece / "tokenizer" / "spiece.model").unlink()
    said = planned(configured(tmp_path / "data", with_spiece))
    assert "has no tokenizer.json, vocab.json or spiece.model; download the model again" in said


REFUSED = [
    ("transformer/config.json", "in_channels", 8, "reads 8 channels, and its VAE makes 4"),
    ("transformer/config.json", "_class_name", "PixArtControlNet", "its transformer is a PixArtControlNet, not a Pix"),
    ("vae/config.json", "_class_name", "AutoencoderDC", "its VAE is 'AutoencoderDC', not an AutoencoderKL"),
    ("scheduler/scheduler_config.json", "prediction_type", "sample", "prediction_type 'sample' is not supported"),
    ("scheduler/scheduler_config.json", "timestep_spacing", "x", "unknown timestep_spacing 'x'"),
]


@pytest.mark.parametrize(("file", "key", "value", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_variants_are_refused_at_planning(folder, tmp_path, file, key, value, message):
    with spoiled(folder, file, key, value):
        assert message in planned(configured(tmp_path, folder))


def test_a_flow_scheduler_is_refused():
    models = Models.from_pipeline(make_pixart(scheduler=FlowMatchEulerDiscreteScheduler()))
    with pytest.raises(ConfigError, match=r"FlowMatchEulerDiscreteScheduler: not a variance-preserving scheduler"):
        models.base.path(4, Timing(256))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer"])
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
        "model_index.json": ("_class_name", "scheduler", "transformer", "text_encoder", "tokenizer"),
        "transformer/config.json": ("in_channels", "out_channels", "sample_size", "patch_size", "interpolation_scale"),
        "vae/config.json": ("latent_channels", "block_out_channels", "scaling_factor", "shift_factor"),
        "scheduler/scheduler_config.json": (
            *("beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps", "steps_offset"),
            *("timestep_spacing", "prediction_type", "rescale_betas_zero_snr"),
        ),
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
