import json
import shutil
import subprocess
import sys

import pytest
import torch

from resmaster_stages.config.model import IpAdapterConfig, ModelConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.models import identity, places
from resmaster_stages.models.identity import model_identity
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from tests.checkout import ROOT
from tests.tiny_models import make_pipeline, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "tiny")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield
    load_models.cache_clear()


def adapter(folder) -> IpAdapterConfig:
    return IpAdapterConfig(id=str(folder), subfolder="ip_adapter", weight_name="ip-adapter.safetensors")


def test_a_folder_loads_with_its_sizes_and_without_an_adapter(saved):
    models = load_models(ModelConfig(id=str(saved), device="cpu"))
    assert (models.geometry.native_px, models.geometry.latent_factor, models.base.latent_channels) == (64, 4, 4)
    assert models.dtype == torch.float32
    assert models.base.image_adapter() is None
    assert models.base.scheduler_config["_class_name"] == "EulerDiscreteScheduler"
    assert models.identity == model_identity(ModelConfig(id=str(saved)))
    assert load_models(ModelConfig(id=str(saved), device="cpu")) is models


def test_adapter_other_vae_and_precision(saved):
    config = ModelConfig(
        id=str(saved),
        ip_adapter=adapter(saved),
        vae=str(saved / "vae"),
        dtype="bfloat16",
        device="cpu",
        offload="model",
    )
    models = load_models(config)
    assert models.base.image_adapter() is not None
    assert {
        models.base.denoiser.dtype,
        models.base.image_encoder.dtype,
        *(each.dtype for each in models.base.text_encoders),
    } == {torch.bfloat16}
    assert models.base.vae.dtype == torch.float32
    assert "vae=vae@" in models.identity
    assert "ip_adapter=tiny@" in models.identity


def test_an_adapter_brings_its_own_image_encoder(copy, saved):
    index = json.loads((copy / "model_index.json").read_text())
    index["image_encoder"] = [None, None]
    (copy / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(copy / "image_encoder")
    assert (
        load_models(ModelConfig(id=str(copy), ip_adapter=adapter(saved), device="cpu")).base.image_adapter() is not None
    )
    weights = copy / "ip_adapter"
    elsewhere = IpAdapterConfig(
        id=str(weights), weight_name="ip-adapter.safetensors", image_encoder=str(saved / "image_encoder")
    )
    models = load_models(ModelConfig(id=str(copy), ip_adapter=elsewhere, device="cpu"))
    assert models.base.image_adapter() is not None
    assert "image_encoder=image_encoder@" in models.identity
    missing = elsewhere.model_copy(update={"image_encoder": "/nowhere/at/all"})
    assert "no such folder" in refused(ModelConfig(id=str(copy), ip_adapter=missing, device="cpu"))


def test_picturebook_is_the_pack_with_its_adapter(saved, monkeypatch):
    for module in (identity, places):
        monkeypatch.setattr(module, "pack_folder", lambda: saved)
    models = load_models(ModelConfig(device="cpu"))
    assert models.base.image_adapter() is not None
    assert models.identity.startswith("picturebook@")
    assert len(models.identity) == len("picturebook@") + 16


def refused(config: ModelConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        load_models(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_cannot_be_loaded_is_named_in_one_line(copy, tmp_path):
    assert "no such folder" in refused(ModelConfig(id="/nowhere/at/all"))
    assert "owner/none" in refused(ModelConfig(id="owner/none"))
    assert "HF_HOME" in refused(ModelConfig(id="owner/none"))
    assert "not an id" in refused(ModelConfig(id="not an id"))
    (tmp_path / "empty").mkdir()
    assert "model_index.json" in refused(ModelConfig(id=str(tmp_path / "empty")))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text("{")
    assert "cannot read model_index.json" in refused(ModelConfig(id=str(broken)))
    (broken / "model_index.json").write_text('{"_class_name": "AuraFlowPipeline"}')
    for name in ("AuraFlowPipeline", "SDXL", "Stable Diffusion 1.x and 2.x"):
        assert name in refused(ModelConfig(id=str(broken)))
    assert "no device" in refused(ModelConfig(id=str(copy), device="tpu9"))
    assert "cuda:99" in refused(ModelConfig(id=str(copy), device="cuda:99"))
    assert "the VAE" in refused(ModelConfig(id=str(copy), vae="owner/none"))
    pickled = IpAdapterConfig(id=str(copy), weight_name="ip-adapter.bin")
    assert "safetensors" in refused(ModelConfig(id=str(copy), ip_adapter=pickled))
    missing = IpAdapterConfig(id=str(copy), weight_name="none.safetensors")
    assert "the IP-Adapter" in refused(ModelConfig(id=str(copy), ip_adapter=missing))
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot load it" in refused(ModelConfig(id=str(copy)))


def test_pickled_weights_are_not_read(copy):
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    assert "cannot load it" in refused(ModelConfig(id=str(copy)))


def test_pipelines_that_are_not_sdxl_base_are_refused():
    pipe = make_pipeline()
    pipe.text_encoder = None
    with pytest.raises(ConfigError, match="refiner"):
        Models.from_pipeline(pipe)
    with pytest.raises(
        ConfigError, match="is a object, and the known families of base models are SDXL, Stable Diffusion"
    ):
        Models.from_pipeline(object())


def test_offloading_brings_parts_to_the_device_and_back_even_after_exceptions():
    models = Models.from_pipeline(make_pipeline(), offload="model")
    seen = []

    class Part:
        def to(self, device):
            seen.append(str(device))

    with pytest.raises(RuntimeError, match="boom"), models.using(Part()):
        raise RuntimeError("boom")
    assert seen == [str(models.device), "cpu"]


def test_identity_follows_the_content(copy):
    config = ModelConfig(id=str(copy))
    before = model_identity(config)
    assert before.startswith("tiny@")
    assert before == model_identity(config)
    scheduler = copy / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.012", "0.013"))
    assert model_identity(config) != before
    assert model_identity(ModelConfig(id="owner/name")) == "owner/name@main"
    assert model_identity(ModelConfig(id="owner/name", revision="abc")) == "owner/name@abc"


def test_a_missing_pack_is_said_plainly(monkeypatch, tmp_path):
    monkeypatch.setattr(identity, "__file__", str(tmp_path / "models" / "identity.py"))
    with pytest.raises(ConfigError, match="not installed"):
        model_identity(ModelConfig())


def test_light_modules_import_no_torch():
    code = (
        "import sys, resmaster_stages.models.identity, resmaster_stages.diffusion.views, resmaster_stages.high_res, "
        "resmaster_stages.low_res; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
