"""What `plan` says of a base model: its licence if that is non-commercial, and the memory of its weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from resmaster_flows.cli.main import main
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.load import load_pipeline
from resmaster_stages.planning.checks import notes_of
from resmaster_stages.planning.memory import memory_of
from tests.tiny_models import make_control_net, save, tiny
from tests.tiny_transformers import make_flux, vae

FLUX_PARTS = {"transformer", "vae", "text_encoder", "text_encoder_2"}


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "flux"
    make_flux().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-non-commercial\n---\n")
    return folder


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "sdxl")


def configured(model: Path | str, **values: Any) -> DatasetConfig:
    return parse_config({"name": "demo", "model": {"id": str(model)}, "captions": {"source": "prompt"}, **values})


def test_a_non_commercial_licence_is_said(flux: Path, sdxl: Path) -> None:
    said = f"licence of the base model {flux}: tiny-non-commercial, which does not allow commercial use of the model"
    assert list(notes_of(configured(flux))) == [said]
    assert list(notes_of(configured(flux, upscale={"method": "lanczos"}))) == [said], "it draws the low-res images"
    assert list(notes_of(configured(flux, upscale={"method": "lanczos"}, images="my-images"))) == []
    assert list(notes_of(configured(sdxl))) == list(notes_of(configured("picturebook"))) == []


def held(pipe: Any) -> dict[str, int]:
    """Part -> bytes of the weights of a loaded pipeline."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {name: sum(p.numel() * p.element_size() for p in part.parameters()) for name, part in parts.items()}


@pytest.mark.parametrize(
    ("model", "dtype"),
    [("flux", "float32"), ("flux", "bfloat16"), ("sdxl", "float32"), ("sdxl", "bfloat16"), ("sdxl", "float16")],
)
def test_the_weights_are_those_that_are_loaded(model: str, dtype: Any, request: pytest.FixtureRequest) -> None:
    """Transformers keeps some weights of T5 in float32 beside float16, so that FLUX.1 takes a little more there."""
    config = ModelConfig(id=str(request.getfixturevalue(model)), dtype=dtype, device="cpu")
    memory = memory_of(config)
    assert memory is not None
    assert memory.parts == held(load_pipeline(config))


@pytest.mark.parametrize("subfolder", ["", "tile"])
def test_a_control_net_is_one_of_the_parts(sdxl: Path, tmp_path: Path, subfolder: str) -> None:
    net = make_control_net(tiny().unet)
    net.half().save_pretrained(tmp_path / subfolder, variant="fp16")
    own = {"id": str(tmp_path), "subfolder": subfolder, "variant": "fp16"}
    plain, both = (ModelConfig(id=str(sdxl), dtype="float32", offload="model", controlnet=each) for each in (None, own))
    before, after = memory_of(plain), memory_of(both)
    assert before is not None
    assert after is not None
    size = sum(p.numel() * 4 for p in net.parameters())
    assert after.parts == {**before.parts, "controlnet": size}
    assert before.drawing == max(size for part, size in before.parts.items() if "text" not in part)
    assert after.drawing == max(before.drawing, before.parts["unet"] + size)
    assert after.encoding == before.encoding
    assert next(load_pipeline(both).controlnet.parameters()).element_size() == 4


def test_offloading_decides_what_is_on_the_gpu(flux: Path, sdxl: Path) -> None:
    by_itself = memory_of(ModelConfig(id=str(flux)))
    assert by_itself is not None
    assert (by_itself.offload, by_itself.number_format) == ("text", "bfloat16"), "what `auto` means for transformers"
    parts = by_itself.parts
    texts = parts["text_encoder"] + parts["text_encoder_2"]
    assert parts.keys() == FLUX_PARTS
    assert by_itself.encoding == sum(parts.values())
    assert by_itself.drawing == parts["transformer"] + parts["vae"]
    none, alone = (memory_of(ModelConfig(id=str(flux), offload=each)) for each in ("none", "model"))
    assert none is not None
    assert alone is not None
    assert none.encoding == none.drawing == sum(parts.values())
    assert (alone.encoding, alone.drawing) == (texts, max(parts["transformer"], parts["vae"]))
    unet = memory_of(ModelConfig(id=str(sdxl)))
    assert unet is not None
    assert (unet.offload, unet.number_format) == ("none", "float16")


def test_a_vae_from_elsewhere_takes_the_place_of_the_models(flux: Path, tmp_path: Path) -> None:
    other = vae(16, act_fn="silu")
    other.save_pretrained(tmp_path / "vae")
    memory = memory_of(ModelConfig(id=str(flux), vae=str(tmp_path / "vae")))
    assert memory is not None
    assert memory.parts.keys() == FLUX_PARTS
    assert memory.parts["vae"] == sum(p.numel() * 4 for p in other.parameters())


def test_quantised_weights_keep_their_size(flux: Path, tmp_path: Path) -> None:
    folder = copied(flux, tmp_path)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    before = memory_of(ModelConfig(id=str(folder)))
    save_file({**load_file(file), "packed": torch.zeros(1000, dtype=torch.uint8)}, file)
    after = memory_of(ModelConfig(id=str(folder)))
    assert before is not None
    assert after is not None
    assert after.parts["transformer"] - before.parts["transformer"] == 1000


def test_damaged_weights_are_one_line(flux: Path, tmp_path: Path) -> None:
    folder = copied(flux, tmp_path)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"vae/diffusion_pytorch_model\.safetensors cannot be read"):
        memory_of(ModelConfig(id=str(folder)))


def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def test_weights_that_are_still_to_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache has the model's index and no weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    place = tmp_path / "models--owner--name"
    (place / "snapshots" / ("a" * 40)).mkdir(parents=True)
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (place / "snapshots" / ("a" * 40) / "model_index.json").write_text(json.dumps(index))
    assert memory_of(ModelConfig(id="owner/name", revision="a" * 40)) is None


def test_plan_prints_notes_and_memory(flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a red house\n")
    values = {
        "name": "demo",
        "root": str(tmp_path / "out"),
        "prompts": "prompts.txt",
        "model": {"id": str(flux)},
        "low_res": {"steps": 2, "guidance_scale": 3.5},
        "captions": {"source": "prompt"},
        "upscale": {"scale": 2, "steps": 2, "guidance_scale": 3.5, "image_prompt": {"enabled": False}},
        "quality": {"clip": None},
    }
    (tmp_path / "demo.yaml").write_text(json.dumps(values))
    assert main(["plan", str(tmp_path / "demo.yaml"), "--estimate"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "note: licence of the base model" in out
    assert "while texts are encoded" in out
    assert "model.offload: text; bfloat16: " in out
    assert "low_res, captions, high_res, quality: time: not known; build a few shards first" in out
