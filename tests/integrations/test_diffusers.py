"""The methods as community pipelines of diffusers, loaded from their files as a user would."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionXLPipeline
from PIL import Image

import resmaster_stages as rm
from resmaster_stages.config.method import methods
from resmaster_stages.errors import ConfigError
from resmaster_stages.library.pipelines import Upscaling, UpscalingOutput
from resmaster_stages.methods.settings import Diffusion
from tests.checkout import ROOT
from tests.tiny_transformers import make_flux

FILES = ROOT / "integrations" / "diffusers"
PACK = ROOT / "resmaster_stages" / "picturebook" / "pack"
PROMPT = "a red house on a green meadow"
QUICK: dict[str, Any] = {"scale": 2, "num_inference_steps": 3}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """diffusers copies the files into a cache of modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def load(method: str) -> Any:
    pipe = DiffusionPipeline.from_pretrained(
        PACK, custom_pipeline=str(FILES / f"{method}.py"), trust_remote_code=True, dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(own_cache: Any) -> Any:
    return load("resmaster")


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return rm.generate(PROMPT, steps=4)[0]


def test_every_method_with_a_base_model_has_a_file() -> None:
    expected = {name for name, method in methods().items() if issubclass(method, Diffusion)} - {"direct"}
    assert {path.stem for path in FILES.glob("*.py")} == expected


@pytest.mark.parametrize("path", sorted(FILES.glob("*.py")), ids=lambda path: path.stem)
def test_a_file_is_loaded_by_diffusers_and_upscales(path: Path, image: Image.Image) -> None:
    pipe = load(path.stem)
    assert type(pipe).method == path.stem
    assert isinstance(pipe, StableDiffusionXLPipeline)
    guidance_scale = 1.0 if path.stem == "pixelrush" else 2.0  # it is made for few-step weights
    result = pipe(PROMPT, image, scale=2, guidance_scale=guidance_scale)
    assert result.images[0].size == (256, 256)
    assert (
        result.images[0].tobytes()
        == rm.upscale(
            image, PROMPT, model=pipe, captions="prompt", method=path.stem, scale=2, guidance_scale=guidance_scale
        ).tobytes()
    )


def test_an_image_is_made_from_the_prompt_first_by_the_base_pipeline(pipe: Any) -> None:
    low_res = {"num_inference_steps": 4}
    result = pipe(PROMPT, generator=torch.Generator().manual_seed(5), low_res=low_res, **QUICK)
    plain = StableDiffusionXLPipeline(**pipe.components)
    plain.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    small = plain(PROMPT, generator=generator, **low_res).images[0]
    assert result.low_res[0].tobytes() == small.tobytes()
    again = pipe(PROMPT, small, generator=generator, **QUICK).images[0]  # goes on from where the base pipeline ended
    assert result.images[0].tobytes() == again.tobytes()


def test_a_callback_gets_the_pipeline_and_may_interrupt(pipe: Any, image: Image.Image) -> None:
    seen: list[tuple[int, torch.Size]] = []

    def after(given: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        assert given is pipe
        seen.append((step, values["latents"].shape))
        given._interrupt = step == 1
        return values

    result = pipe(PROMPT, image, scale=2, num_inference_steps=10, callback_on_step_end=after)
    assert [step for step, _ in seen] == [0, 1]
    assert result.images[0].size == (256, 256)
    seen.clear()
    pipe(PROMPT, image, scale=2, num_inference_steps=2, callback_on_step_end=lambda *a: seen.append((a[1], None)) or {})
    assert seen  # an earlier interruption does not stop the next call


def test_lists_forms_and_tuples(pipe: Any, image: Image.Image) -> None:
    two = pipe([PROMPT, "a cat"], [image, np.asarray(image)], output_type="np", **QUICK)
    assert isinstance(two, UpscalingOutput)
    assert [each.shape for each in two.images] == [(256, 256, 3)] * 2
    images, low_res = pipe(PROMPT, image, return_dict=False, **QUICK)
    assert images[0].size == (256, 256)
    assert low_res is image


def test_a_mistake_is_one_line(pipe: Any, image: Image.Image) -> None:
    with pytest.raises(ConfigError, match="did you mean"):
        pipe(PROMPT, image, stepz=3)
    with pytest.raises(ConfigError, match="captions: 2 given"):
        pipe(PROMPT, image, captions=["a", "b"], **QUICK)


def test_a_pipeline_of_another_family_takes_the_same_class(image: Image.Image) -> None:
    class FluxResMasterPipeline(Upscaling, FluxPipeline):
        method = "resmaster"

    tiny = make_flux()
    pipe = FluxResMasterPipeline(**tiny.components)
    result = pipe("a house", image.resize((64, 64)), scale=2, num_inference_steps=2)
    assert result.images[0].size == (128, 128)


def test_the_examples_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: Image.Image) -> None:
    """In order, in a folder with an image and links to what a checkout has."""
    for name in ("resmaster_stages", "integrations"):
        (tmp_path / name).symlink_to(ROOT / name)
    image.save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 3
    space: dict[str, Any] = {}
    for block in blocks:
        exec(block, space)
    assert Image.open(tmp_path / "house-256px.png").size == space["image"].size == (256, 256)
    assert issubclass(space["FluxResMasterPipeline"], FluxPipeline)
