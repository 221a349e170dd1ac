"""Image prompts of Stable Diffusion 3.5, beside diffusers' own pipeline."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from resmaster_stages.config.model import IpAdapterConfig, ModelConfig
from resmaster_stages.diffusion.image_prompts import embed_crops
from resmaster_stages.diffusion.loop import CanvasNoise, always, denoise
from resmaster_stages.diffusion.reference import to_tensor
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.direct import Direct
from resmaster_stages.methods.request import Request
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases.base import Rows
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from resmaster_stages.planning.checks import check
from tests.methods.common import difference, settings, some_image
from tests.models.bases.common import relative, start
from tests.models.bases.folders import built, configured, copied, fresh
from tests.tiny_sd3 import adapter_state, make_sd3, quiet, save_adapter, siglip_vision

SCALE = 0.7


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapters") / "InstantX")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "stable-diffusion-3.5-large"
    make_sd3().save_pretrained(made)
    return made


def with_adapter(adapter: Path) -> Any:
    """A pipeline with the adapter, loaded as its users load it."""
    pipe = make_sd3()
    pipe.register_modules(image_encoder=siglip_vision())
    pipe.load_ip_adapter(str(adapter), weight_name="ip-adapter.safetensors", image_encoder_folder=None)
    return quiet(pipe)


def place(adapter: Path, **values: Any) -> dict[str, Any]:
    """The adapter in a configuration."""
    return {"id": str(adapter), "weight_name": "ip-adapter.safetensors", **values}


def drawn(models: Models, noise: Tensor, image: tuple[Tensor, Tensor] | None, scale: float, guidance: float) -> Tensor:
    """The latents that the engine draws of one view with an image prompt."""
    config = Direct(stepper="ddim_keep", steps=5, guidance_scale=guidance)
    height, width = (side * 4 for side in noise.shape[-2:])
    request = Request(models, config, height, width, ("a cat",) * len(noise), ("ugly",) * len(noise))
    (stage,) = config.passes(request)
    canvas = CanvasNoise([0], noise.shape[1], *noise.shape[-2:], models.device)
    _, composition = stage.begin(None, canvas, request.path[0])
    (group,) = composition.groups
    if image is not None:
        views, conditions = group.at(request.path[0])
        group = replace(group, at=always(views, replace(conditions, image=image[0], negative_image=image[1])))
    composition = replace(composition, groups=(group,), image_scale=scale)
    return denoise(models, composition, request.path, noise, canvas, view_batch=4)


def theirs(pipe: Any, noise: Tensor, guidance: float, **values: Any) -> Tensor:
    """What the pipeline draws from the same noise."""
    height, width = (side * 4 for side in noise.shape[-2:])
    sizes = {"height": height, "width": width, "num_inference_steps": 5, "output_type": "latent"}
    texts = {"prompt": ["a cat"] * len(noise), "negative_prompt": ["ugly"] * len(noise), "max_sequence_length": 48}
    return pipe(latents=noise, guidance_scale=guidance, **sizes, **texts, **values).images


def embedded(models: Models, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The states of an image of SigLIP's size, and of nothing."""
    return embed_crops(models, to_tensor(some_image(32, 32, seed)), [(0, 0, 32, 32)])


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_an_image_prompt_draws_what_the_pipeline_draws(adapter: Path, guidance: float) -> None:
    pipe = with_adapter(adapter)
    models = Models.from_pipeline(pipe)
    noise = start(models, 48, 64)
    image, nothing = embedded(models)
    assert image.shape == (1, 1, 16, 16)
    assert not nothing.any()
    ours = drawn(models, noise, (image, nothing), SCALE, guidance)
    pipe.set_ip_adapter_scale(SCALE)
    states = image[:, 0] if guidance == 1 else torch.cat([nothing[:, 0], image[:, 0]])
    assert relative(ours, theirs(pipe, noise, guidance, ip_adapter_image_embeds=states)) < 1e-5
    assert relative(ours, drawn(models, noise, None, 0.0, guidance)) > 1e-3
    assert relative(ours, drawn(models, noise, embedded(models, 1), SCALE, guidance)) > 1e-4


def test_the_states_are_those_of_the_pipelines_own_encoder(adapter: Path) -> None:
    pipe = with_adapter(adapter)
    models = Models.from_pipeline(pipe)
    pixels = (to_tensor(some_image(32, 32)) / 2 + 0.5 - 0.5) / 0.5
    expected = pipe.encode_image(pixels, torch.device("cpu"))
    assert relative(embedded(models)[0][:, 0], expected) < 1e-6


def test_without_image_prompts_an_adapter_changes_nothing(adapter: Path) -> None:
    pipe, plain = with_adapter(adapter), Models.from_pipeline(make_sd3())
    models = Models.from_pipeline(pipe)
    noise = start(models, 48, 64)
    expected = drawn(plain, noise, None, 0.0, 5.0)
    assert torch.equal(drawn(models, noise, None, 0.0, 5.0), expected)
    assert torch.equal(drawn(models, noise, embedded(models), 0.0, 5.0), expected)
    assert plain.base.image_adapter() is None


def test_scales_are_restored_also_after_an_exception(adapter: Path) -> None:
    base = Models.from_pipeline(with_adapter(adapter)).base
    processors = [each for each in base.denoiser.network.attn_processors.values() if hasattr(each, "to_k_ip")]

    def scales() -> list[float]:
        return [each.scale for each in processors]

    def fail() -> None:
        with base.image_scale(0.9):
            assert scales() == [0.9] * 3
            raise RuntimeError("boom")

    assert scales() == [0.5] * 3
    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert scales() == [0.5] * 3


def test_permuted_image_prompts_permute_the_rows(adapter: Path) -> None:
    models = Models.from_pipeline(with_adapter(adapter))
    base, order = models.base, [2, 0, 1]
    image = torch.cat([embedded(models, seed)[0] for seed in range(3)])
    text = base.encode(["a cat", "a dog", "b"], False, torch.device("cpu"))
    views = torch.randn(3, 16, 12, 16, generator=torch.Generator().manual_seed(3))

    def rows(places: list[int]) -> Tensor:
        told = Rows(text.states[places], None, text.pooled[places], 1.0, torch.zeros(3, 6), image=image[places])
        with torch.inference_mode(), base.image_scale(SCALE):
            return base.denoiser(views[places], torch.tensor(700.0), return_dict=False, **base.arguments(told))[0]

    plain = rows([0, 1, 2])
    assert relative(rows(order), plain[order]) < 1e-6
    others = image[[1, 2, 0]]
    image.copy_(others)
    assert relative(rows([0, 1, 2]), plain) > 1e-4


def test_a_folder_with_an_adapter_goes_through_all_stages(folder: Path, adapter: Path, tmp_path: Path) -> None:
    upscale = {"method": "resmaster", "steps": 2, "scale": 2}
    values = {"model": {"ip_adapter": place(adapter)}, "upscale": upscale}
    config = configured(tmp_path / "one", folder, **values)
    check(config)
    first = built(config)
    assert [(each.samples_ok, each.samples_failed) for each in first if each.stage != "captions"] == [(2, 0)] * 3
    again = built(configured(tmp_path / "two", folder, **values))
    assert [each.objects[0].sha256 for each in again] == [each.objects[0].sha256 for each in first]
    with fresh():
        models = load_models(config.model)
        on, off = (
            upscale_image(
                models, some_image(), "a cat", config=settings("resmaster", image_prompt={"enabled": enabled})
            )
            for enabled in (True, False)
        )
        assert difference(on, off) > 0


def test_image_prompts_without_an_adapter_are_refused(folder: Path, tmp_path: Path) -> None:
    config = configured(tmp_path, folder, upscale={"method": "resmaster", "steps": 2, "scale": 2})
    with fresh(), pytest.raises(ConfigError, match=r"image prompts need an IP-Adapter; set model.ip_adapter, or"):
        check(config)
    with pytest.raises(ConfigError, match=r"image prompts need an IP-Adapter; set model.ip_adapter, or"):
        upscale_image(Models.from_pipeline(make_sd3()), some_image(), "a cat", config=settings("resmaster"))


REFUSED = {
    "another kind": "is no IP-Adapter that Stable Diffusion 3.5 can use; choose one in diffusers' format",
    "another base model": "is for 2 layers of width 32, and the transformer has 3 of width 32; choose the adapter of",
    "another encoder": "reads 16 numbers of a part of an image, and the image encoder of .* makes 24; set model.ip",
    "no encoder": "has no file image_encoder/config.json",
    "no weights": "has no file ip-adapter.safetensors",
    "pickled": "ip-adapter.bin is not a .safetensors file",
}


@pytest.mark.parametrize("what", REFUSED)
def test_adapters_that_do_not_fit_are_refused(what: str, folder: Path, adapter: Path, tmp_path: Path) -> None:
    """At planning and when the model is loaded."""
    spoiled, more = copied(adapter, tmp_path), {}
    if what == "another kind":
        save_file({"image_proj.proj.weight": torch.zeros(4, 4)}, spoiled / "ip-adapter.safetensors")
    elif what == "another base model":
        save_file(adapter_state(layers=2), spoiled / "ip-adapter.safetensors")
    elif what == "another encoder":
        siglip_vision(24).save_pretrained(spoiled / "image_encoder")
    elif what == "no encoder":
        shutil.rmtree(spoiled / "image_encoder")
    elif what == "no weights":
        (spoiled / "ip-adapter.safetensors").unlink()
    else:
        more = {"weight_name": "ip-adapter.bin"}
    values = place(spoiled, **more)
    config = configured(tmp_path / "data", folder, model={"ip_adapter": values, "device": "cpu"})
    with fresh(), pytest.raises(ConfigError, match=REFUSED[what]) as found:
        check(config)
    assert len(found.value.mistakes) == 1
    if what in ("no encoder", "no weights"):  # said by the loader in other words
        return
    loaded = ModelConfig(id=str(folder), device="cpu", ip_adapter=IpAdapterConfig(**values))
    with fresh(), pytest.raises(ConfigError, match=REFUSED[what]):
        load_models(loaded)
