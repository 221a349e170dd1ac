"""Model folders made to harm: pickled weights and code beside the weights are refused, and none of it runs."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from resmaster_stages.config.dataset import CaptionsConfig
from resmaster_stages.config.model import IpAdapterConfig, ModelConfig
from resmaster_stages.errors import ConfigError, UserError
from resmaster_stages.metrics.clip_score import load_clip
from resmaster_stages.models.captioner import load_captioner
from resmaster_stages.models.identity import pack_folder
from resmaster_stages.models.load import load_pipeline
from tests.tiny_models import save


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.mark,)


def arm(folder: Path, mark: Path) -> None:
    """Replace every safetensors file in `folder` by pickles of the names that loaders look for."""
    weights = list(folder.glob("*.safetensors"))
    assert weights
    for path in weights:
        path.unlink()
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt", "pytorch_model.pkl", "ip-adapter.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb(mark)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "tiny")


def test_the_bomb_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2", "image_encoder"])
def test_pickled_parts_of_a_model_are_refused(copy: Path, tmp_path: Path, part: str) -> None:
    arm(copy / part, tmp_path / "mark")
    with pytest.raises(ConfigError, match="give a folder with safetensors"):
        load_pipeline(ModelConfig(id=str(copy), device="cpu"))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["ip-adapter.bin", "model.pt", "none.safetensors"])
def test_a_pickled_adapter_is_refused(copy: Path, tmp_path: Path, name: str) -> None:
    arm(copy / "ip_adapter", tmp_path / "mark")
    adapter = IpAdapterConfig(id=str(copy), subfolder="ip_adapter", weight_name=name)
    with pytest.raises(ConfigError, match="safetensors"):
        load_pipeline(ModelConfig(id=str(copy), device="cpu", ip_adapter=adapter))
    assert not (tmp_path / "mark").exists()


def test_a_pickled_vae_beside_a_model_is_refused(copy: Path, saved: Path, tmp_path: Path) -> None:
    arm(copy / "vae", tmp_path / "mark")
    with pytest.raises(ConfigError, match="the VAE"):
        load_pipeline(ModelConfig(id=str(saved), device="cpu", vae=str(copy / "vae")))
    assert not (tmp_path / "mark").exists()


LOADERS: dict[str, Callable[[str], object]] = {
    "captioner": lambda folder: load_captioner(CaptionsConfig(model=folder), "cpu"),
    "clip": lambda folder: load_clip(folder, None, "cpu"),
}


@pytest.mark.parametrize("part", LOADERS)
def test_pickled_captioners_and_metrics_are_refused(tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(pack_folder() / part, tmp_path / part)
    arm(folder, tmp_path / "mark")
    with pytest.raises(UserError, match="safetensors"):
        LOADERS[part](str(folder))
    assert not (tmp_path / "mark").exists()


def test_code_beside_a_models_weights_does_not_run(copy: Path, tmp_path: Path) -> None:
    (copy / "unet" / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Evil: pass\n")
    (copy / "pipeline.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "unet": ["evil", "Evil"]}))
    with pytest.raises(ConfigError, match="cannot load it"):
        load_pipeline(ModelConfig(id=str(copy), device="cpu"))
    assert not (tmp_path / "mark").exists()


def test_code_beside_a_captioners_weights_does_not_run(tmp_path: Path) -> None:
    folder = shutil.copytree(pack_folder() / "captioner", tmp_path / "captioner")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Evil: pass\n")
    for name in ("config.json", "processor_config.json"):
        values = json.loads((folder / name).read_text())
        classes = dict.fromkeys(("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor"), "evil.Evil")
        (folder / name).write_text(json.dumps({**values, "model_type": "evil", "auto_map": classes}))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_captioner(CaptionsConfig(model=str(folder)), "cpu")
    assert not (tmp_path / "mark").exists()
