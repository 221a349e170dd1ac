import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from resmaster_stages import high_res, low_res
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import Method, methods, with_method
from resmaster_stages.dataset.sample import EncodedImage, Output, Sample
from resmaster_stages.diffusion.views import view_grid
from resmaster_stages.errors import ConfigError, GpuLost, OutOfMemory, SampleError
from resmaster_stages.high_res import captions_for_views
from resmaster_stages.keys import image_key
from resmaster_stages.methods.generate import generate
from resmaster_stages.methods.settings import NEGATIVE_PROMPT
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models import load
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.models.busy import timing
from resmaster_stages.models.parts import Models
from tests.tiny_models import SCHEDULER, counted, make_adapted_pipeline, make_pipeline, tiny, tiny_adapted


def adapted() -> Models:
    return Models.from_pipeline(tiny_adapted())


def some_image(width=64, height=64, seed=0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def made(outputs: Iterator[Output]) -> list[Output]:
    """The stage's outputs, with their files."""
    return [output.finished() for output in outputs]


def settings(method="resmaster", **values) -> Method:
    return Method.model_validate({**with_method({"steps": 2, "scale": 2}, method), **values})


OFF = {
    "preset": "exact",
    "structure": {"enabled": False},
    "image_prompt": {"enabled": False},
    "text_prompt": {"enabled": False},
}


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("negative", ["", "ugly"])
def test_direct_at_native_size_is_the_diffusers_pipeline(guidance, negative):
    pipe = tiny()
    expected = pipe(
        ["a cat", "a big house"],
        negative_prompt=[negative] * 2 if negative else None,
        num_inference_steps=6,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        height=64,
        width=64,
    ).images
    ours = list(
        generate(Models.from_pipeline(pipe), ["a cat", "a big house"], [negative] * 2, [5, 6], 64, 64, 6, guidance, 2)
    )
    for mine, theirs in zip(ours, expected):
        assert difference(mine, theirs) <= 1
    assert difference(ours[0], ours[1]) > 10


def test_direct_follows_the_pipelines_own_scheduler():
    pipe = make_pipeline()
    pipe.scheduler = DDIMScheduler(
        **{**SCHEDULER, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}, clip_sample=False
    )
    expected = pipe(
        ["a cat"],
        num_inference_steps=5,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(3),
        height=64,
        width=48,
    ).images[0]
    ours = next(generate(Models.from_pipeline(pipe), ["a cat"], [""], [3], 64, 48, 5, 5.0, 1))
    assert difference(ours, expected) <= 1
    assert pipe.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("method", "width", "height", "view_batch", "calls", "shape"),
    [
        ("direct", 64, 64, 4, 2, (2, 4, 32, 32)),
        ("multidiffusion", 64, 64, 4, 6, (6, 4, 16, 16)),  # 9 views as 3 + 3 + 3, twice, two branches each
        ("multidiffusion", 32, 64, 16, 2, (6, 4, 16, 16)),  # 3 views
        ("resmaster", 64, 64, 16, 2, (18, 4, 16, 16)),
        ("resmaster", 74, 36, 4, 4, (8, 4, 16, 16)),  # 148 x 72 px = 37 x 18 latents: 4 x 2 views
        ("resmaster", 20, 60, 16, 2, (6, 4, 16, 10)),  # narrower than a window: 3 views of 10 latents
    ],
)
def test_unet_calls_are_few_predictable_and_of_one_shape(method, width, height, view_batch, calls, shape):
    ours = adapted()
    with counted(ours.base.denoiser) as shapes, timing() as device:
        result = upscale_image(
            ours, some_image(width, height), "a cat", config=settings(method=method, view_batch=view_batch)
        )
    assert device.seconds > 0
    assert result.size == (2 * width, 2 * height)
    assert shapes == [shape] * calls


def test_guidance_scale_one_has_no_unconditional_branch():
    ours = adapted()
    with counted(ours.base.denoiser) as shapes:
        upscale_image(ours, some_image(), "a cat", config=settings(guidance_scale=1))
    assert shapes == [(9, 4, 16, 16)] * 2


@pytest.mark.parametrize(("width", "height", "scale"), [(37, 61, 2.3), (5, 90, 1.7), (64, 64, 1.0), (131, 9, 1.0)])
@pytest.mark.parametrize("method", methods())
def test_any_size_is_served_exactly(width, height, scale, method):
    config = Method.model_validate(with_method({"scale": scale, "steps": 1}, method))
    result = upscale_image(adapted(), some_image(width, height), "a cat", config=config)
    assert result.size == (round(width * scale), round(height * scale))
    assert result.mode == "RGB"


def test_one_view_makes_multidiffusion_direct():
    results = [
        upscale_image(adapted(), some_image(), "a cat", config=settings(scale=1, steps=3, method=method), seed=4)
        for method in ("direct", "multidiffusion")
    ]
    assert results[0].tobytes() == results[1].tobytes()


def test_resmaster_without_its_three_parts_is_multidiffusion():
    base = upscale_image(adapted(), some_image(), "a cat", config=settings(method="multidiffusion"), seed=1)
    bare = upscale_image(adapted(), some_image(), "a cat", config=settings(**OFF), captions=["a dog"] * 9, seed=1)
    assert bare.tobytes() == base.tobytes()
    plain = upscale_image(Models.from_pipeline(tiny()), some_image(), "a cat", config=settings(**OFF), seed=1)
    assert difference(plain, base) <= 1


@pytest.mark.parametrize("part", sorted(OFF.keys() - {"preset"}))
def test_each_part_of_resmaster_changes_the_image(part):
    rest = {name: value for name, value in OFF.items() if name != part}
    captions = ["a dog", "tree", "sky"] * 3
    bare = upscale_image(adapted(), some_image(), "a cat", config=settings(**OFF), captions=captions)
    with_part = upscale_image(adapted(), some_image(), "a cat", config=settings(**rest), captions=captions)
    assert difference(bare, with_part) > 0


def test_structural_guidance_keeps_the_reference_s_low_frequencies():
    """With G = 1 at every step, the result is the autoencoder's image of the enlarged reference."""
    from resmaster_stages.diffusion import autoencoder
    from resmaster_stages.diffusion.reference import to_image, upsample

    ours = adapted()
    structure = {"cutoff": 1e4, "cutoff_units": "hr_nyquist", "stop": 1.0}
    result = upscale_image(ours, some_image(), "a cat", config=settings(**{**OFF, "structure": structure}, steps=4))
    expected = to_image(autoencoder.decode(ours, autoencoder.encode(ours, upsample(some_image(), 128, 128)))[0])
    assert difference(result, expected) <= 2


def test_a_caption_reaches_its_view_and_no_other():
    ours = adapted()
    config = settings(**{**OFF, "text_prompt": {"enabled": True}}, steps=1, stride=1.0)  # 2 x 2 views, no overlap
    captions = ["a cat"] * 4
    base = np.asarray(upscale_image(ours, some_image(), "a cat", config=config)).astype(int)
    captions[3] = "mountains"
    changed = np.asarray(upscale_image(ours, some_image(), "a cat", config=config, captions=captions)).astype(int)
    delta = np.abs(changed - base).sum(axis=2)
    assert delta[64:, 64:].max() > 0
    # Elsewhere only the VAE's tiles, which overlap the view, can carry anything over.
    assert delta[:64, :64].mean() < 0.5 * delta[64:, 64:].mean()


def test_a_wrong_number_of_captions_is_refused():
    with pytest.raises(ConfigError, match="3 given for 9 views"):
        upscale_image(adapted(), some_image(), "a cat", config=settings(steps=1), captions=["a"] * 3)


@pytest.mark.parametrize("stepper", ["ddim_implied", "ddim_keep", "posterior"])
@pytest.mark.parametrize("init", ["noise", "noised_lr"])
def test_a_seed_decides_the_image_whatever_the_batch(stepper, init):
    def make(seed, view_batch):
        config = settings(stepper=stepper, init=init, view_batch=view_batch)
        return upscale_image(adapted(), some_image(), "a cat", config=config, seed=seed)

    assert make(1, 4).tobytes() == make(1, 4).tobytes()
    assert difference(make(1, 4), make(1, 1)) <= 1
    assert difference(make(1, 16), make(1, 1)) <= 1
    assert difference(make(1, 4), make(2, 4)) > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_nearly_the_same_image(dtype):
    pipe = make_adapted_pipeline()
    whole = upscale_image(Models.from_pipeline(pipe), some_image(), "a cat", config=settings(steps=4))
    pipe.to(dtype)
    half = upscale_image(Models.from_pipeline(pipe), some_image(), "a cat", config=settings(steps=4))
    assert 0 < np.abs(np.asarray(half).astype(int) - np.asarray(whole).astype(int)).mean() < 4


@pytest.mark.parametrize(
    ("offload", "moved"),
    [
        ("model", {"unet", "vae", "text_encoder", "text_encoder_2", "image_encoder"}),
        ("text", {"text_encoder", "text_encoder_2"}),
        ("none", set()),
    ],
)
def test_offloaded_parts_are_on_the_device_only_while_they_work(offload, moved):
    pipe = make_adapted_pipeline()
    ours = Models.from_pipeline(pipe, offload=offload)
    places = {}

    def watch(name, module):
        move = module.to

        def to(*args, **kwargs):
            if args and isinstance(args[0], str | torch.device):
                places.setdefault(name, []).append(args[0])
            return move(*args, **kwargs)

        module.to = to

    for name in ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder"):
        watch(name, getattr(pipe, name))
    upscale_image(ours, some_image(), "a cat", config=settings(steps=1))
    assert set(places) == moved
    for moves in places.values():
        assert moves[::2] == [ours.device] * (len(moves) // 2)
        assert moves[1::2] == ["cpu"] * (len(moves) // 2)


@pytest.mark.parametrize("change", [{"fuse": "gaussian"}, {"micro_conditioning": "native"}, {"init": "noised_lr"}])
def test_options_have_an_effect(change):
    base = upscale_image(adapted(), some_image(), "a cat", config=settings(**OFF))
    assert difference(base, upscale_image(adapted(), some_image(), "a cat", config=settings(**OFF, **change))) > 0


def test_a_users_pipeline_is_left_as_it_was_even_by_failures():
    pipe = make_adapted_pipeline()
    pipe.set_ip_adapter_scale(0.4)
    ours = Models.from_pipeline(pipe)
    projection, scheduler = pipe.unet.encoder_hid_proj, dict(pipe.scheduler.config)
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upscale_image(ours, some_image(), "a cat", config=settings(), progress=interrupt)
    upscale_image(ours, some_image(), "a cat", config=settings(method="direct"))
    assert pipe.unet.encoder_hid_proj is projection
    assert all(p.scale == [0.4] for p in pipe.unet.attn_processors.values() if hasattr(p, "to_k_ip"))
    assert dict(pipe.scheduler.config) == scheduler
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == cudnn


def test_progress_counts_the_steps():
    heard = []
    upscale_image(adapted(), some_image(), "a", config=settings(steps=3), progress=lambda *each: heard.append(each))
    assert heard == [(1, 3), (2, 3), (3, 3)]


def test_image_prompts_need_an_adapter():
    with pytest.raises(ConfigError, match=r"set model\.ip_adapter"):
        upscale_image(Models.from_pipeline(tiny()), some_image(), "a cat", config=settings())


@pytest.mark.parametrize(
    ("message", "kind"), [("CUDA error: an illegal memory access", GpuLost), ("plain", RuntimeError)]
)
def test_a_lost_device_is_told_from_a_plain_error(message, kind):
    ours = Models.from_pipeline(make_adapted_pipeline())

    def fail(*args, **kwargs):
        raise RuntimeError(message)

    ours.base.denoiser.forward = fail
    with pytest.raises(kind):
        upscale_image(ours, some_image(), "a cat", config=settings())


def test_too_little_memory_names_what_to_lower():
    ours = Models.from_pipeline(make_adapted_pipeline())

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    ours.base.denoiser.forward = fail
    with pytest.raises(OutOfMemory, match="view_batch"):
        upscale_image(ours, some_image(), "a cat", config=settings())


# The stages


def dataset(**values):
    return parse_config(
        {
            "name": "tiny",
            "model": {"id": "tiny"},
            "low_res": {"height": 64, "width": 64, "steps": 2, "batch_size": 4},
            "upscale": {"steps": 2, "scale": 2},
            **values,
        }
    )


def sample(number, **values) -> Sample:
    return Sample(
        **{
            "key": f"{number:024x}",
            "index": number,
            "prompt": f"a cat {'abcdef'[number]}",
            "negative_prompt": "",
            "height": 64,
            "width": 64,
            "replica": 0,
            **values,
        }
    )


def encoded(image, extension="webp", **meta) -> EncodedImage:
    buffer = io.BytesIO()
    image.save(buffer, extension, lossless=True)
    return EncodedImage(buffer.getvalue(), extension, meta)


@pytest.fixture
def loaded(monkeypatch):
    """Models of their own, which the stages load whatever the configuration says."""
    models = Models.from_pipeline(make_adapted_pipeline(), identity="tiny@1")
    monkeypatch.setattr(load, "load_models", lambda config: models)
    return models


def rows(grid, **changes):
    return tuple(
        {
            "row": i // len(grid.cols),
            "col": i % len(grid.cols),
            "caption": f"patch {'abcdefghi'[i]}",
            "status": "ok",
            **dict(zip(("y0", "x0", "y1", "x1"), box)),
            **changes,
        }
        for i, box in enumerate(grid.pixel_boxes)
    )


def test_captions_go_to_their_views_or_to_the_nearest():
    grid = view_grid(Geometry(64, 4), 128, 128, 0.5)
    assert captions_for_views(grid, rows(grid)[::-1], "p") == [f"patch {letter}" for letter in "abcdefghi"]
    tiles = rows(view_grid(Geometry(64, 4), 128, 128, 1.0))
    assert captions_for_views(grid, tiles, "p")[0] == "patch a"
    assert captions_for_views(grid, tiles, "p")[8] == "patch d"
    assert set(captions_for_views(grid, rows(grid, status="fallback"), "p")) == {"p"}
    assert set(captions_for_views(grid, rows(grid, status="empty"), "p")) == {"p"}
    replaced = rows(grid, status="replaced")
    assert captions_for_views(grid, replaced, "p") == [row["caption"] for row in replaced], "a neighbour's tells of it"
    with pytest.raises(SampleError, match="captions stage"):
        captions_for_views(grid, (), "p")


def test_captions_of_tiles_go_to_the_nearest_view_across_the_border():
    wraps = (False, True)
    grid = view_grid(Geometry(64, 4), 64, 192, 0.5, wraps)
    tiles = rows(view_grid(Geometry(64, 4), 64, 192, 1.0, wraps))
    assert [(row["x0"], row["x1"]) for row in tiles] == [(0, 64), (64, 128), (128, 192)]
    assert grid.cols == (0, 8, 16, 24, 32, 40)
    # the last view, 160 to 224 px, is as near to the first tile as to the last: the first of equals
    assert captions_for_views(grid, tiles, "p") == [f"patch {letter}" for letter in "aabbca"]
    assert captions_for_views(replace(grid, shift=(0, 1)), tiles, "p")[0] == "patch a"  # 188 to 252 px


def test_high_res_stage_makes_one_output_per_sample_and_a_failure_costs_one(loaded):
    grid = view_grid(Geometry(64, 4), 128, 128, 0.5)
    good = {"low_res": encoded(some_image()), "captions": rows(grid)}
    samples = [
        sample(0, **good),
        sample(1, captions=rows(grid), low_res=EncodedImage(b"no image", "webp", {})),
        sample(2),
        sample(3, low_res=good["low_res"]),
        sample(4, **good, negative_prompt="ugly"),
    ]
    outputs = made(high_res.process(dataset(), samples))
    assert [output.key for output in outputs] == [each.key for each in samples]
    assert [type(output.error) for output in outputs] == [type(None), SampleError, SampleError, SampleError, type(None)]
    assert list(outputs[0].files) == ["webp", "json", "txt"]
    assert Image.open(io.BytesIO(outputs[0].files["webp"])).size == (128, 128)
    assert outputs[0].files["txt"] == b"a cat a"
    facts = json.loads(outputs[0].files["json"])
    assert facts["model"] == "tiny@1"
    assert facts["method"] == "resmaster"
    assert facts["low_res"] == {
        "width": 64,
        "height": 64,
        "sha256": hashlib.sha256(samples[0].low_res.data).hexdigest(),
    }
    assert facts["negative_prompt"] == NEGATIVE_PROMPT
    assert json.loads(outputs[4].files["json"])["negative_prompt"] == "ugly"
    (again,) = made(high_res.process(dataset(), samples[:1]))
    assert again.files == outputs[0].files
    (alone,) = made(high_res.process(dataset(), samples[4:]))
    assert alone.files == outputs[4].files


@pytest.mark.parametrize("stage", [low_res, high_res], ids=["low_res", "high_res"])
def test_images_are_encoded_when_the_driver_asks_for_it(stage, loaded, monkeypatch):
    """Which it does in another thread: the stage goes on to the next sample without."""
    encoded_already = []
    real = stage.encode_image
    monkeypatch.setattr(stage, "encode_image", lambda *a: encoded_already.append(1) or real(*a))
    config = dataset(upscale={"steps": 1, "scale": 2, "method": "multidiffusion"})
    outputs = list(stage.process(config, [sample(i, low_res=encoded(some_image())) for i in range(2)]))
    assert encoded_already == []
    assert [output.files for output in outputs] == [{}, {}]
    assert all("webp" in output.files for output in made(outputs))
    assert encoded_already == [1, 1]


def test_high_res_as_png_without_captions(loaded):
    config = dataset(image_format="png", upscale={"steps": 1, "scale": 2, "method": "multidiffusion"})
    (output,) = made(high_res.process(config, [sample(0, low_res=encoded(some_image()))]))
    assert output.files["png"].startswith(b"\x89PNG")


def test_low_res_stage_is_reproducible_and_a_poisoned_sample_costs_one(loaded):
    samples = [sample(i) for i in range(6)]
    outputs = made(low_res.process(dataset(), samples))
    assert [output.key for output in outputs] == [each.key for each in samples]
    assert all(output.error is None for output in outputs)
    assert len({output.files["webp"] for output in outputs}) == 6
    image = Image.open(io.BytesIO(outputs[0].files["webp"])).convert("RGB")
    facts = json.loads(outputs[0].files["json"])
    direct = list(generate(loaded, [s.prompt for s in samples[:4]], [""] * 4, [facts["seed"]] * 4, 64, 64, 2, 5.0, 4))
    assert image.tobytes() == direct[0].tobytes()  # stored without loss

    original = loaded.base.denoiser.forward

    def poisoned(x, *args, **kwargs):
        result = original(x, *args, **kwargs)
        if len(x) == 8:
            result[0][5] = float("nan")  # the second sample of the first slot
        return result

    loaded.base.denoiser.forward = poisoned
    with_poison = made(low_res.process(dataset(), samples))
    assert isinstance(with_poison[1].error, SampleError)
    assert "NaN" in str(with_poison[1].error)
    assert [o.files for i, o in enumerate(with_poison) if i != 1] == [o.files for i, o in enumerate(outputs) if i != 1]


def test_low_res_sizes_and_bad_prompts(loaded):
    with pytest.raises(ConfigError, match=r"low_res\.height: 66 is no multiple of 4; use 64 or 68"):
        list(low_res.process(dataset(), [sample(0, height=66)]))
    samples = [sample(0), sample(1, prompt="\ud800"), sample(2, width=96)]
    outputs = made(low_res.process(dataset(), samples))
    assert [type(output.error) for output in outputs] == [type(None), SampleError, type(None)]
    assert Image.open(io.BytesIO(outputs[2].files["webp"])).size == (96, 64)


def test_low_res_takes_a_users_images_upright_and_survives_corrupt_ones(tmp_path, loaded):
    noisy = some_image(70, 50)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    noisy.save(tmp_path / "turned.png", exif=exif)
    (tmp_path / "broken.png").write_bytes((tmp_path / "turned.png").read_bytes()[:200])
    names = ["turned.png", "broken.png", "missing.png"]
    (tmp_path / "edited.png").write_bytes((tmp_path / "turned.png").read_bytes())
    names.append("edited.png")
    samples = [sample(i, source=str(tmp_path / name)) for i, name in enumerate(names)]
    for i in (0, 1):
        data = (tmp_path / names[i]).read_bytes()
        samples[i] = replace(samples[i], key=image_key(data, samples[i].prompt))
    outputs = made(low_res.process(dataset(images=str(tmp_path)), samples))
    image = Image.open(io.BytesIO(outputs[0].files["webp"])).convert("RGB")
    assert image.tobytes() == noisy.transpose(Image.Transpose.ROTATE_270).tobytes()
    assert [type(output.error) for output in outputs] == [type(None), SampleError, SampleError, SampleError]
    assert "changed since it was planned" in str(outputs[3].error)
    (moved := tmp_path / "elsewhere").mkdir()
    (tmp_path / "turned.png").rename(moved / "turned.png")
    same = replace(samples[0], source=str(moved / "turned.png"))
    assert made(low_res.process(dataset(images=str(moved)), [same]))[0].files == outputs[0].files
