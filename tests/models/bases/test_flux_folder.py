"""Folders of FLUX.1 and Chroma: planning, loading, all stages, all methods, and what is refused before loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import Method, with_method
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.diffusion.cost import counting
from resmaster_stages.errors import ConfigError
from resmaster_stages.library.opened import OpenedDataset
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models import places
from resmaster_stages.models.bases import family_of
from resmaster_stages.models.geometry import geometry_of
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from resmaster_stages.models.schedule import Timing
from resmaster_stages.planning.checks import check
from resmaster_stages.planning.workload import denoising_of, high_res_work
from resmaster_stages.prompts import ingest
from resmaster_stages.runner.run import run_stage
from tests.methods.common import some_image
from tests.tiny_flux import make_chroma
from tests.tiny_transformers import make_flux

MAKERS = {"dev": make_flux, "schnell": lambda: make_flux(guidance_embeds=False), "chroma": make_chroma}
SCALE = {"dev": 3.5, "schnell": 1.0, "chroma": 4.0}
OFF = {"image_prompt": {"enabled": False}}
METHODS: dict[str, dict[str, Any]] = {
    "direct": {},
    "multidiffusion": {},
    "resmaster": OFF,
    "demofusion": {},
    "c_upscale": {"share": 0},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("models")
    for name, make in MAKERS.items():
        make().save_pretrained(top / name)
    return {name: top / name for name in MAKERS}


@pytest.fixture(params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def nothing_known() -> Any:
    yield
    load_models.cache_clear()
    places._read_json.cache_clear()


def configured(root: Path, folder: Path, scale: float, **values: Any) -> DatasetConfig:
    root.mkdir(exist_ok=True)
    (root / "prompts.txt").write_text("a red house\na boat on a lake\n")
    sampling = {"steps": 3, "guidance_scale": scale}
    base: dict[str, Any] = {
        "name": "demo",
        "root": str(root / "out"),
        "prompts": str(root / "prompts.txt"),
        "image_format": "png",
        "model": {"id": str(folder), "device": "cpu"},
        "low_res": {**sampling, "height": 48, "width": 64},
        "captions": {"source": "model", "model": "picturebook", "grid": "views", "max_new_tokens": 8},
        "upscale": {"method": "resmaster", "preset": "exact", "scale": 2, **OFF, **sampling},
        "quality": {"clip": None},
    }
    return parse_config({**base, **values})


def built(config: DatasetConfig) -> Dataset:
    """The dataset, all stages run over its only shard."""
    dataset = ingest(config)
    for stage in dataset.hashes:
        receipt = run_stage(dataset, stage, 0)
        assert (receipt.samples_ok, receipt.samples_failed) == (2, 0)
    return dataset


def test_all_stages_of_a_folder_twice_with_the_same_bytes(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    images = []
    for run in ("first", "second"):
        dataset = built(configured(tmp_path / run, folders[name], SCALE[name]))
        large = [sample.high_res for sample in OpenedDataset(dataset) if sample.high_res]
        assert [image.open().size for image in large] == [(128, 96)] * 2
        images.append([image.data for image in large])
        load_models.cache_clear()
    assert images[0] == images[1]
    assert images[0][0] != images[0][1]


def test_what_is_known_before_loading_is_what_is_loaded(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    config = configured(tmp_path, folders[name], SCALE[name])
    found = check(config)
    assert (found.unchecked, found.notes) == ((), ())
    geometry = geometry_of(config.model)
    assert (geometry.native_px, geometry.latent_factor, geometry.step_px) == (64, 4, 8)
    models, own = load_models(config.model), Models.from_pipeline(MAKERS[name]())
    assert models.geometry == own.geometry == geometry
    assert models.base.sampling == family_of(config.model).sampling(config.model) == own.base.sampling
    count = family_of(config.model).token_counter(config.model)
    assert models.base.count(["a cat", "ab"]) == [count("a cat") + 1, count("ab") + 1] == [6, 3]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("width", "height", "scale"), [(56, 40, 1.0), (37, 61, 2.3), (64, 64, 2.0)])
def test_methods_draw_any_size_with_the_rows_that_were_forecast(
    name: str, method: str, width: int, height: int, scale: float, folders: dict[str, Path]
) -> None:
    values = {"steps": 3, "scale": scale, "guidance_scale": SCALE[name], "view_batch": 1}
    config = Method.model_validate({**with_method(values, method), **METHODS[method]})
    model = ModelConfig(id=str(folders[name]), device="cpu")
    images = []
    for prompt in ("a red house", "a boat on a lake"):
        with counting() as counted:
            images.append(upscale_image(load_models(model), some_image(width, height), prompt, config=config))
        work = high_res_work(config, denoising_of(model), height, width)
        assert sum(each.rows for each in work) == counted.rows > 0
        assert sum(each.rows * each.area for each in work) == pytest.approx(counted.native_rows)
    assert images[0].size == (round(width * scale), round(height * scale))
    assert np.asarray(images[0]).std() > 1
    assert np.asarray(images[0]).tobytes() != np.asarray(images[1]).tobytes()


def mistakes(config: DatasetConfig) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        check(config)
    return caught.value.mistakes


@pytest.mark.parametrize(
    ("method", "layers"),
    [
        ("scalecrafter", "convolutions"),
        ("fouriscale", "convolutions"),
        ("freescale", "convolutions"),
        ("scalediff", "attention"),
    ],
)
def test_methods_that_change_layers_are_refused_in_one_line(
    name: str, method: str, layers: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    upscale = {"method": method, "scale": 2, "steps": 3, "guidance_scale": SCALE[name]}
    (line,) = mistakes(configured(tmp_path, folders[name], SCALE[name], upscale=upscale))
    assert f"method {method}: needs {layers}, which model" in line


def test_guidance_that_has_no_effect_is_refused_with_the_recommended_pair(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    config = configured(tmp_path, folders["schnell"], 7.5)
    assert mistakes(config)[0].endswith(
        "set low_res.steps: 4 and low_res.guidance_scale: 1, which are recommended for it"
    )
    unwritten = {"low_res": {"steps": 3, "height": 48, "width": 64}}
    (line,) = mistakes(configured(tmp_path, folders["dev"], 3.5, **unwritten))
    assert line.startswith("low_res.guidance_scale: 5 was chosen for SDXL")
    assert "set low_res.steps: 28 and low_res.guidance_scale: 3.5" in line
    guided = {"model": {"id": str(folders["dev"]), "device": "cpu", "guidance": "cfg"}}
    assert check(configured(tmp_path, folders["dev"], 3.5, **guided)).notes == ()
    told = {"low_res": {"steps": 3, "guidance_scale": 3.5, "height": 48, "width": 64, "negative_prompt": "ugly"}}
    (note,) = check(configured(tmp_path, folders["dev"], 3.5, **told)).notes
    assert note.startswith("low_res.negative_prompt: not read")


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


VARIANTS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("transformer", {"in_channels": 384}, "inpainting, editing or control variant; give a plain base model"),  # Fill
    ("transformer", {"in_channels": 128}, "inpainting, editing or control variant; give a plain base model"),  # Control
    ("transformer", {"axes_dims_rope": [4, 4]}, "axes_dims_rope are not three numbers"),
    ("vae", {"scaling_factor": "x"}, "scaling_factor is 'x', not a number"),
    ("vae", {"shift_factor": float("inf")}, "shift_factor is inf, not a number"),
)


@pytest.mark.parametrize(("part", "changes", "words"), VARIANTS)
def test_variants_are_refused_at_planning_in_the_words_of_loading(
    name: str, part: str, changes: dict[str, Any], words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders[name], tmp_path / "model")
    edit(folder / part / "config.json", **changes)
    (line,) = mistakes(configured(tmp_path, folder, SCALE[name]))
    pipe = MAKERS[name]()
    getattr(pipe, part).register_to_config(**changes)
    with pytest.raises(ConfigError) as caught:
        Models.from_pipeline(pipe)
    assert str(caught.value).removeprefix("model pipeline: ") == line.removeprefix("model.id: ")
    assert words in line


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
def test_a_pipeline_without_a_text_encoder_is_refused(
    name: str, part: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    pipe = MAKERS[name]()
    if not hasattr(pipe, part):
        return
    setattr(pipe, part, None)
    with pytest.raises(ConfigError, match=f"model pipeline: it has no {part}, which its text needs; give a whole"):
        Models.from_pipeline(pipe)
    folder = shutil.copytree(folders[name], tmp_path / "model")
    edit(folder / "model_index.json", **{part: [None, None]})
    assert any(f"it has no {part}" in line for line in mistakes(configured(tmp_path, folder, SCALE[name])))


ODD: list[Any] = [None, "x", -1, 0, 0.5, 10**15, float("nan"), float("inf"), [], {}, [1, 2], True, "../../x"]
FILES = ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")


@pytest.mark.parametrize("file", FILES)
def test_damaged_settings_are_one_line_or_survive_planning(
    name: str, file: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders[name], tmp_path / "model")
    whole = (folder / file).read_text()
    told = 0
    for key in json.loads(whole):
        for value in ODD:
            edit(folder / file, **{key: value})
            told += refusal(folder, SCALE[name], tmp_path)
            (folder / file).write_text(whole)
        (folder / file).write_text(json.dumps({k: v for k, v in json.loads(whole).items() if k != key}))
        told += refusal(folder, SCALE[name], tmp_path)
        (folder / file).write_text(whole)
    for text in ("", "[1]", "{", "\0"):
        (folder / file).write_text(text)
        assert refusal(folder, SCALE[name], tmp_path) == 1
    assert told > 0


def refusal(folder: Path, scale: float, tmp_path: Path) -> int:
    """1 if planning refuses the folder, in lines that a user can read; 0 if it does not."""
    places._read_json.cache_clear()
    config = configured(tmp_path, folder, scale)
    try:
        check(config)
        denoising_of(config.model)
        high_res_work(config.upscale, denoising_of(config.model), 48, 64)
    except ConfigError as error:
        for line in error.mistakes:
            assert "\n" not in line
            assert len(line) < 800
            assert "; " in line
        return 1
    return 0


def test_a_missing_file_is_named(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    for number, file in enumerate(
        ("transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", *FILES[1:])
    ):
        folder = shutil.copytree(folders[name], tmp_path / f"{number}")
        (folder / file).unlink()
        assert any(Path(file).name in line for line in mistakes(configured(tmp_path, folder, SCALE[name]))), file


def test_a_half_precision_transformer_computes_in_half_precision(name: str, folders: dict[str, Path]) -> None:
    model = ModelConfig(id=str(folders[name]), device="cpu", dtype="bfloat16")
    models = load_models(model)
    assert {p.dtype for p in models.base.denoiser.parameters()} == {torch.bfloat16}
    assert next(models.base.vae.parameters()).dtype == torch.float32
    config = Method.model_validate(
        with_method({"preset": "exact", "steps": 2, "scale": 1, "guidance_scale": SCALE[name], **OFF}, "resmaster")
    )
    seen = []
    hook = models.base.denoiser.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            (kwargs["hidden_states"].dtype, kwargs["encoder_hidden_states"].dtype, float(kwargs["timestep"][0] * 1000))
        ),
        with_kwargs=True,
    )
    image = upscale_image(models, some_image(64, 64), "a cat", config=config)
    hook.remove()
    assert np.asarray(image).std() > 1
    assert {each[:2] for each in seen} == {(torch.bfloat16, torch.bfloat16)}
    path = models.base.path(2, Timing(16 * 16))
    assert {each[2] for each in seen} == {float((torch.tensor(step.t).bfloat16() / 1000) * 1000) for step in path}
