"""Image prompts of FLUX.1 and Chroma: IP-Adapter and Redux, beside diffusers' own pipelines."""

from __future__ import annotations

import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPriorReduxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, SiglipImageProcessor

from resmaster_stages.config.method import Method, with_method
from resmaster_stages.config.model import IpAdapterConfig, ModelConfig
from resmaster_stages.diffusion.conditions import make_conditions
from resmaster_stages.diffusion.guidance import NEGATIVE, TEXT
from resmaster_stages.diffusion.image_prompts import embed_crops
from resmaster_stages.diffusion.loop import CanvasNoise, always, denoise
from resmaster_stages.diffusion.reference import to_tensor
from resmaster_stages.diffusion.views import view_grid
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.direct import Direct
from resmaster_stages.methods.request import Request
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models import places
from resmaster_stages.models.flux_adapters import ReduxEncoder
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from resmaster_stages.planning.checks import check
from tests.methods.common import some_image
from tests.models.bases.common import relative, start
from tests.models.bases.test_flux_folder import built, configured, mistakes
from tests.models.test_damaged_weights import DAMAGES
from tests.planning.test_any_configuration import refusal
from tests.tiny_flux import CLIP_VISION, clip_vision, make_chroma, redux, save_adapters, siglip_vision, with_adapter
from tests.tiny_models import adapter_state as unet_adapter_state
from tests.tiny_models import make_pipeline
from tests.tiny_transformers import make_flux, quiet

MAKERS: dict[str, Callable[[], Any]] = {"flux": make_flux, "chroma": make_chroma}
SCALE = 0.7
SIZE = CLIP_VISION["image_size"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapters(tmp_path_factory.mktemp("adapters") / "adapters", make_flux().transformer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "dev"
    make_flux().save_pretrained(made)
    return made


@pytest.fixture(params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def nothing_known() -> Any:
    yield
    load_models.cache_clear()
    places._read_json.cache_clear()


def with_redux(pipe: Any) -> Any:
    pipe.register_modules(image_encoder=ReduxEncoder(siglip_vision(), redux()))
    return quiet(pipe)


def embedded(models: Models, *images: Image.Image) -> tuple[Tensor, Tensor]:
    """The embeddings of whole images, and of nothing."""
    pixels = torch.cat([to_tensor(image) for image in images])
    return embed_crops(models, pixels, [(0, 0, images[0].height, images[0].width)])


def drawn(models: Models, noise: Tensor, image: tuple[Tensor, Tensor] | None, scale: float, **values: Any) -> Tensor:
    """The latents that the engine draws of one view with an image prompt."""
    config = Direct(stepper="ddim_keep", steps=5, **values)
    height, width = (side * 4 for side in noise.shape[-2:])
    request = Request(models, config, height, width, ("a cat",) * len(noise), ("ugly",) * len(noise))
    (stage,) = config.passes(request)
    canvas = CanvasNoise([0], noise.shape[1], *noise.shape[-2:], models.device)
    _, composition = stage.begin(None, canvas, request.path[0])
    (group,) = composition.groups
    if image is not None:
        views, conditions = group.at(request.path[0])
        prompted = replace(conditions, image=image[0], negative_image=image[1])
        group = replace(group, at=always(views, prompted))
    composition = replace(composition, groups=(group,), image_scale=scale)
    return denoise(models, composition, request.path, noise, canvas, view_batch=4)


def pipelines_latents(pipe: Any, noise: Tensor, **values: Any) -> Tensor:
    from resmaster_stages.models.bases.transformer import packed, unpacked

    height, width = (side * 4 for side in noise.shape[-2:])
    sizes = {"height": height, "width": width, "num_inference_steps": 5, "output_type": "latent"}
    return unpacked(pipe(latents=packed(noise), **sizes, **values).images, *noise.shape[-2:])


@pytest.mark.parametrize("guided", [False, True])
def test_an_image_prompt_draws_what_the_pipeline_draws(guided: bool, adapters: Path) -> None:
    pipe, image = with_adapter(make_flux(), adapters), some_image(SIZE, SIZE)
    models = Models.from_pipeline(pipe, config=ModelConfig(guidance="cfg" if guided else "auto"))
    noise = start(models, 48, 64)
    ours = drawn(models, noise, embedded(models, image), SCALE, guidance_scale=3.0)
    pipe.set_ip_adapter_scale(SCALE)
    more = {"true_cfg_scale": 3.0, "negative_prompt": "ugly"} if guided else {}
    texts = {"prompt": "a cat", "max_sequence_length": 48, "guidance_scale": 3.0}
    theirs = pipelines_latents(pipe, noise, ip_adapter_image=image, **texts, **more)
    assert relative(ours, theirs) < 1e-5
    assert relative(ours, drawn(models, noise, None, 0.0, guidance_scale=3.0)) > 0.02


def test_chroma_draws_what_the_pipeline_draws(adapters: Path) -> None:
    pipe, image = with_adapter(make_chroma(), adapters), some_image(SIZE, SIZE)
    models = Models.from_pipeline(pipe)
    noise = start(models, 48, 64)
    ours = drawn(models, noise, embedded(models, image), SCALE, guidance_scale=3.0)
    pipe.set_ip_adapter_scale(SCALE)
    states, _, mask, other, _, other_mask = pipe.encode_prompt(["a cat"], ["ugly"], max_sequence_length=48)
    texts = {
        "prompt_embeds": states,
        "prompt_attention_mask": mask.bool(),
        "negative_prompt_embeds": other,
        "negative_prompt_attention_mask": other_mask.bool(),
    }
    theirs = pipelines_latents(pipe, noise, ip_adapter_image=image, guidance_scale=3.0, **texts)
    assert relative(ours, theirs) < 1e-5


def test_embeddings_are_the_pipelines(name: str, adapters: Path) -> None:
    pipe, image = with_adapter(MAKERS[name](), adapters), some_image(SIZE, SIZE)
    mine, nothing = embedded(Models.from_pipeline(pipe), image, some_image(SIZE, SIZE, seed=3))
    assert mine.shape == nothing.shape == (2, 1, 12)
    assert relative(mine[0], pipe.encode_image(image, "cpu", 1)) < 1e-6
    black = pipe.encode_image(np.zeros((40, 64, 3), dtype=np.uint8), "cpu", 1)
    assert relative(nothing[1], black) < 1e-6
    assert relative(mine[0], mine[1]) > 0.01


def test_off_is_no_adapter_and_what_was_there_is_put_back(name: str, adapters: Path) -> None:
    plain = Models.from_pipeline(MAKERS[name]())
    pipe = with_adapter(MAKERS[name](), adapters)
    pipe.set_ip_adapter_scale(0.3)
    models = Models.from_pipeline(pipe)
    noise = start(models, 48, 64)
    expected = drawn(plain, noise, None, 0.0, guidance_scale=2.0)
    before = dict(pipe.transformer.attn_processors)
    assert torch.equal(drawn(models, noise, None, 0.0, guidance_scale=2.0), expected)
    assert torch.equal(
        drawn(models, noise, embedded(models, some_image(SIZE, SIZE)), 0.0, guidance_scale=2.0), expected
    )
    with pytest.raises(KeyError), models.base.image_scale(0.0):
        raise KeyError
    with pytest.raises(KeyError), models.base.image_scale(0.9):
        raise KeyError
    assert all(before[place] is processor for place, processor in pipe.transformer.attn_processors.items())
    assert pipe.transformer.transformer_blocks[0].attn.processor.scale == [0.3]


@pytest.mark.parametrize("kind", ["ip_adapter", "redux"])
def test_image_rows_permute_with_their_views(name: str, kind: str, adapters: Path) -> None:
    pipe = MAKERS[name]()
    models = Models.from_pipeline(with_redux(pipe) if kind == "redux" else with_adapter(pipe, adapters))
    image = embedded(models, *(some_image(SIZE, SIZE, seed=seed) for seed in range(3)))
    conditions = make_conditions(
        models, view_grid(models.geometry, 64, 64, 1.0), ("a", "b", "c"), (), guidance_scale=1.0, image=image
    )
    conditions = replace(conditions, negative=conditions.text)
    views = start(models, 64, 64, batch=3)

    def predicted(order: list[int]) -> Tensor:
        rows = conditions.rows(torch.tensor(order), (NEGATIVE, TEXT))
        sample = views[order].repeat(2, 1, 1, 1)
        with torch.inference_mode(), models.base.image_scale(SCALE):
            made = models.base.denoiser(sample, torch.tensor(500.0), return_dict=False, **models.base.arguments(rows))
        return made[0].unflatten(0, (2, 3))

    plain = predicted([0, 1, 2])
    assert torch.equal(predicted([2, 0, 1]), plain[:, [2, 0, 1]])
    assert relative(plain[0], plain[1]) > 0.005  # the image of the unconditional branch is black


# ------------------------------------------------------------------------------------------------------ Redux


def prior(pipe: Any) -> Any:
    """The pipeline of Redux, with the text encoders of `pipe`."""
    made = FluxPriorReduxPipeline(
        image_encoder=siglip_vision(),
        feature_extractor=SiglipImageProcessor(size={"height": SIZE, "width": SIZE}),
        image_embedder=redux(),
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        text_encoder_2=pipe.text_encoder_2,
        tokenizer_2=pipe.tokenizer_2,
    )
    return quiet(made)


def test_redux_makes_and_reads_the_tokens_of_its_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, image = with_redux(make_flux()), some_image(SIZE, SIZE)
    models, noise = Models.from_pipeline(pipe), None
    made, nothing = embedded(models, image, some_image(SIZE, SIZE, seed=5))
    own = prior(pipe)
    tokens = own.image_embedder(own.encode_image(image, "cpu", 1)).image_embeds
    assert made.shape == nothing.shape == (2, 1, 16, 32)
    assert relative(made[0], tokens) < 1e-5
    black = own.image_embedder(own.encode_image(Image.new("RGB", (SIZE, SIZE)), "cpu", 1)).image_embeds
    assert relative(nothing[0], black) < 1e-5

    noise = start(models, 48, 64)
    ours = drawn(models, noise, embedded(models, image), 1.0, guidance_scale=3.0)
    states, pooled, _ = pipe.encode_prompt("a cat", "a cat", max_sequence_length=48)
    texts = {"prompt_embeds": torch.cat([states, tokens], dim=1), "pooled_prompt_embeds": pooled}
    assert relative(ours, pipelines_latents(pipe, noise, guidance_scale=3.0, **texts)) < 1e-5
    half = {"prompt_embeds": torch.cat([states, 0.5 * tokens], dim=1), "pooled_prompt_embeds": pooled}
    ours = drawn(models, noise, embedded(models, image), 0.5, guidance_scale=3.0)
    assert relative(ours, pipelines_latents(pipe, noise, guidance_scale=3.0, **half)) < 1e-5
    assert pipe.image_encoder.scale == 1.0


def test_redux_off_is_no_redux(name: str) -> None:
    plain, models = Models.from_pipeline(MAKERS[name]()), Models.from_pipeline(with_redux(MAKERS[name]()))
    noise = start(models, 48, 64)
    expected = drawn(plain, noise, None, 0.0, guidance_scale=2.0)
    assert torch.equal(drawn(models, noise, None, 0.0, guidance_scale=2.0), expected)


# ------------------------------------------------------------------------------------------------------ folders

KINDS: dict[str, dict[str, Any]] = {
    "ip_adapter": {"weight_name": "ip_adapter.safetensors"},
    "redux": {
        "subfolder": "image_embedder",
        "weight_name": "diffusion_pytorch_model.safetensors",
        "image_encoder_folder": "siglip",
    },
}


def prompted(folder: Path, adapters: Path, **values: Any) -> dict[str, Any]:
    """The part `model` of a configuration with an adapter."""
    return {"id": str(folder), "device": "cpu", "ip_adapter": {"id": str(adapters), **values}}


def method(**values: Any) -> Method:
    return Method.model_validate(
        {**with_method({"steps": 3, "scale": 2, "guidance_scale": 3.5, "preset": "exact"}, "resmaster"), **values}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_all_stages_with_image_prompts(kind: str, folder: Path, adapters: Path, tmp_path: Path) -> None:
    upscale = {"method": "resmaster", "preset": "exact", "scale": 2, "steps": 2, "guidance_scale": 3.5}
    model = prompted(folder, adapters, **KINDS[kind])
    config = configured(tmp_path, folder, 3.5, model=model, upscale=upscale)
    assert check(config).unchecked == ()
    built(config)
    models = load_models(config.model)
    assert models.base.image_adapter() is not None
    assert "+ip_adapter=adapters@" in models.identity

    image = some_image(64, 64)
    on = np.asarray(upscale_image(models, image, "a cat", config=method()), dtype=int)
    off = np.asarray(upscale_image(models, image, "a cat", config=method(image_prompt={"enabled": False})), dtype=int)
    plain = Models.from_pipeline(make_flux())
    without = upscale_image(plain, image, "a cat", config=method(image_prompt={"enabled": False}))
    assert np.array_equal(off, np.asarray(without))
    assert np.abs(on - off).max() > 3


def test_half_precision(folder: Path, adapters: Path) -> None:
    for kind in KINDS.values():
        adapter = IpAdapterConfig(id=str(adapters), **kind)
        models = load_models(ModelConfig(id=str(folder), device="cpu", dtype="bfloat16", ip_adapter=adapter))
        parts = (models.base.denoiser, models.base.image_encoder)
        assert {p.dtype for part in parts for p in part.parameters()} == {torch.bfloat16}
        assert np.asarray(upscale_image(models, some_image(64, 64), "a cat", config=method())).std() > 1


def test_the_image_encoder_may_be_in_a_place_of_its_own(folder: Path, adapters: Path, tmp_path: Path) -> None:
    """A whole CLIP, as at the hub, of which only the image encoder is read."""
    whole = CLIPModel(
        CLIPConfig(
            vision_config={**CLIP_VISION, "projection_dim": 12}, text_config={"hidden_size": 16}, projection_dim=12
        )
    )
    whole.vision_model.load_state_dict(clip_vision().vision_model.state_dict())
    whole.visual_projection.load_state_dict(clip_vision().visual_projection.state_dict())
    whole.save_pretrained(tmp_path / "clip")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(adapters / "ip_adapter.safetensors", alone)
    model = prompted(folder, alone, **KINDS["ip_adapter"], image_encoder=str(tmp_path / "clip"))
    config = configured(tmp_path, folder, 3.5, model=model)
    check(config)
    models = load_models(config.model)
    assert "+image_encoder=clip@" in models.identity
    own = load_models(
        ModelConfig(id=str(folder), device="cpu", ip_adapter=IpAdapterConfig(id=str(adapters), **KINDS["ip_adapter"]))
    )
    image = some_image(SIZE, SIZE)
    assert relative(embedded(models, image)[0], embedded(own, image)[0]) < 1e-6
    assert "image_encoder" not in IpAdapterConfig(id="a", weight_name="b").identity()


def renamed(adapters: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = adapters / "ip_adapter.safetensors"
    save_file({key: value.clone() for key, value in change(load_file(file)).items()}, file)


def of_sdxl(state: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = unet_adapter_state(make_pipeline().unet)
    return {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "of another kind": (
        lambda state: {f"x.{key}": value for key, value in state.items()},
        "is no IP-Adapter that FLUX.1 can use",
    ),
    "of SDXL": (of_sdxl, "is for a transformer with 4 double blocks, and this one has 1"),
    "of more blocks": (
        lambda state: {**state, **{key.replace(".0.", ".1."): value for key, value in state.items()}},
        "is for a transformer with 2 double blocks, and this one has 1",
    ),
    "of another width": (
        lambda state: {key: value[:, :16] if "_k_proj.weight" in key else value for key, value in state.items()},
        "is for a transformer with 16 numbers per text token, and this one has 32",
    ),
    "of another encoder": (
        lambda state: {
            key: value[:, :8] if key.endswith("model.proj.weight") else value for key, value in state.items()
        },
        "reads 8 numbers of an image, and the image encoder of",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_adapters_that_do_not_fit_are_refused_in_the_same_words(
    wrong: str, folder: Path, adapters: Path, tmp_path: Path
) -> None:
    change, words = WRONG[wrong]
    spoilt = shutil.copytree(adapters, tmp_path / "spoilt")
    renamed(spoilt, change)
    config = configured(tmp_path, folder, 3.5, model=prompted(folder, spoilt, **KINDS["ip_adapter"]))
    said = mistakes(config)
    with pytest.raises(ConfigError) as caught:
        load_models(config.model)
    assert words in said[0]
    assert str(caught.value) in [line.removeprefix("model.ip_adapter: ") for line in said]


def test_pickles_and_missing_files_are_refused(folder: Path, adapters: Path, tmp_path: Path) -> None:
    spoilt = shutil.copytree(adapters, tmp_path / "spoilt")
    (spoilt / "ip_adapter.bin").write_bytes(pickle.dumps({}))
    for values, words in (
        ({"weight_name": "ip_adapter.bin"}, "is not a .safetensors file"),
        ({"weight_name": "none.safetensors"}, "has no file none.safetensors"),
        ({**KINDS["ip_adapter"], "image_encoder_folder": "nowhere"}, "has no file nowhere/config.json"),
        ({**KINDS["ip_adapter"], "image_encoder": "/nowhere/at/all"}, "no such folder"),
        ({**KINDS["redux"], "image_encoder_folder": "image_encoder"}, None),
    ):
        config = configured(tmp_path, folder, 3.5, model=prompted(folder, spoilt, **values))
        if words is None:
            check(config)
            continue
        (line,) = mistakes(config)
        assert words in line
        assert line.startswith("model.ip_adapter")
        with pytest.raises(ConfigError) as caught:
            load_models(config.model)
        assert "\n" not in str(caught.value)


def test_image_prompts_without_an_adapter_are_refused_with_the_ways_out(folder: Path, tmp_path: Path) -> None:
    upscale = {"method": "resmaster", "scale": 2, "steps": 2, "guidance_scale": 3.5}
    (line,) = mistakes(configured(tmp_path, folder, 3.5, upscale=upscale))
    assert "set model.ip_adapter, or upscale.image_prompt.enabled: false" in line


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_adapters_are_one_line(kind: str, folder: Path, adapters: Path, tmp_path: Path) -> None:
    """Files of an adapter and of its image encoder, damaged by a drawn rule: refused in words, or used."""
    values, draw, told = KINDS[kind], random.Random(kind), 0
    encoder = values.get("image_encoder_folder", "image_encoder")
    weights = Path(values.get("subfolder", "")) / values["weight_name"]
    for name in (weights, Path(encoder) / "config.json", Path(encoder) / "model.safetensors") * 6:
        spoilt = shutil.copytree(adapters, tmp_path / "spoilt")
        file = spoilt / name
        file.write_bytes(draw.choice(DAMAGES[file.suffix])(file.read_bytes(), draw))
        config = configured(tmp_path, folder, 3.5, model=prompted(folder, spoilt, **values))
        said = refusal(check, config) + refusal(load_models, config.model)
        told += len(said)
        assert all("\n" not in line and len(line) < 800 for line in said)
        load_models.cache_clear()
        shutil.rmtree(spoilt)
    assert told > 15
