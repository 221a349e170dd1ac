"""What can be known before the first commit is known before it: one list of checks, all mistakes at once."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from resmaster_stages.captions import load_writer
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.metrics.clip_score import load_clip
from resmaster_stages.models.identity import pack_folder
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from resmaster_stages.models.schedule import Timing
from resmaster_stages.planning.checks import Around, check, check_stages
from resmaster_stages.planning.preview import preview
from resmaster_stages.prompts import ingest
from tests.tiny_models import make_pipeline, make_stable_diffusion, save
from tests.tiny_transformers import make_flux


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A tiny model that a test may spoil."""
    return shutil.copytree(saved, tmp_path / "tiny")


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    yield
    load_models.cache_clear()


def configured(tmp_path: Path, **values: Any) -> DatasetConfig:
    (tmp_path / "prompts.txt").write_text("a red house\n")
    base = {"name": "demo", "root": str(tmp_path / "out"), "prompts": str(tmp_path / "prompts.txt")}
    return parse_config({**base, **values})


def mistakes(tmp_path: Path, around: Around | None = None, **values: Any) -> tuple[str, ...]:
    """What `plan` says, which `run` says too, before anything is written."""
    config = configured(tmp_path, **values)
    said = []
    for look in (preview, ingest):
        with pytest.raises(ConfigError) as caught:
            look(config, around or Around())
        said.append(caught.value.mistakes)
    assert said[0] == said[1]
    assert not (tmp_path / "out").exists()
    return said[0]


def adapted(model: Path, **changes: Any) -> dict[str, Any]:
    adapter = {"id": str(model), "subfolder": "ip_adapter", "weight_name": "ip-adapter.safetensors"}
    return {"id": str(model), "ip_adapter": {**adapter, **changes.pop("ip_adapter", {})}, **changes}


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


SERVER = {"source": "server", "model": "m"}
FILE = str(pack_folder() / "clip" / "model.safetensors")


@pytest.mark.parametrize(
    ("values", "setting", "reason"),
    [
        ({"model": {"device": "nope"}}, "model.device", "is no device"),
        ({"model": {"device": "meta"}}, "model.device", "is no device"),
        ({"model": {"device": "cuda:99"}}, "model.device", "cuda:99 is not there"),
        ({"quality": {"device": "cuda:99"}}, "quality.device", "cuda:99 is not there"),
        ({"quality": {"device": "tpu9"}}, "quality.device", "is no device"),
        ({"model": {"quantise": "fp8", "device": "cpu"}}, "model.quantise", "needs a CUDA device"),
        ({"model": {"vae": "/etc"}}, "model.vae", "has no file config.json"),
        ({"model": {"vae": "not a name"}}, "model.vae", "neither a folder nor a hub id"),
        ({"quality": {"clip": "/etc"}}, "quality.clip", "has no file config.json"),
        ({"quality": {"clip": "/"}}, "quality.clip", "has no file config.json"),
        ({"quality": {"clip": "a/b/c"}}, "quality.clip", "no such folder"),
        ({"quality": {"clip": "owner/none"}}, "quality.clip", "HF_HUB_OFFLINE"),
        ({"captions": {"check": {"clip": "/etc"}}}, "captions.check.clip", "has no file config.json"),
        ({"captions": {"model": "/etc"}}, "captions.model", "has no file config.json"),
        ({"captions": {"model": "owner/none"}}, "captions.model", "HF_HUB_OFFLINE"),
        ({"captions": {"style": "very " * 50}}, "captions.style", "shorten it to at most 40"),
        ({"captions": SERVER}, "captions.base_url", "is missing"),
        ({"captions": {**SERVER, "base_url": "file:///etc/passwd"}}, "captions.base_url", "not an http:// or https://"),
        ({"captions": {**SERVER, "base_url": "http://"}}, "captions.base_url", "names no host"),
        ({"captions": {**SERVER, "base_url": "http://a b/v1"}}, "captions.base_url", "names no host"),
        ({"captions": {**SERVER, "base_url": "http://host:0/v1"}}, "captions.base_url", "names no host"),
        ({"captions": {**SERVER, "base_url": "http://host:99999/v1"}}, "captions.base_url", "is no address"),
        ({"captions": {**SERVER, "base_url": "http://[::1/v1"}}, "captions.base_url", "is no address"),
        ({"captions": {**SERVER, "base_url": f"http://{'a' * 64}.org/v1"}}, "captions.base_url", "is no address"),
        ({"captions": {**SERVER, "base_url": "http://a..b/v1"}}, "captions.base_url", "is no address"),
        ({"captions": {**SERVER, "base_url": "http://a/v1?version=1"}}, "captions.base_url", "leave out what follows"),
        ({"captions": {**SERVER, "base_url": "http://a/v1#x"}}, "captions.base_url", "leave out what follows"),
        ({"captions": {**SERVER, "base_url": "http://a/v1?"}}, "captions.base_url", "leave out what follows"),
        ({"model": {"vae": FILE}}, "model.vae", "is a file; give the folder of a whole model"),
        ({"model": {"vae": str(pack_folder() / "clip")}}, "model.vae", "has no file diffusion_pytorch_model"),
        ({"captions": {"model": FILE}}, "captions.model", "is a file; give the folder of a whole model"),
        ({"quality": {"clip": FILE}}, "quality.clip", "is a file; give the folder of a whole model"),
        ({"model": {"id": FILE}}, "model.id", "is a file; give the folder of a whole model"),
        ({"model": {"id": "https://huggingface.co/owner/name"}}, "model.id", "is a URL; give a hub id"),
        ({"quality": {"clip": "s3://bucket/clip"}}, "quality.clip", "is a URL; give a hub id"),
        ({"low_res": {"height": 100}}, "low_res.height", "no multiple of 8"),
        ({"low_res": {"height": 2048, "width": 1024}, "upscale": {"scale": 1}}, "low_res", "more than 64 times"),
        (
            {"upscale": {"method": "super_resolution", "model": "/none.safetensors"}},
            "upscale.model",
            "is no file; give",
        ),
    ],
    ids=str,
)
def test_each_mistake_is_one_line_with_its_setting(
    values: dict[str, Any], setting: str, reason: str, tmp_path: Path
) -> None:
    (line,) = mistakes(tmp_path, **values)
    assert setting in line.partition(": ")[0] + line.partition(" ")[0] or "captions.base_url" in line
    assert reason in line
    assert "\n" not in line
    assert len(line) < 600


def test_words_by_attention_need_a_model_with_cross_attention(tmp_path: Path) -> None:
    make_flux().save_pretrained(tmp_path / "flux")
    values = {
        "model": {"id": str(tmp_path / "flux")},
        "low_res": {"guidance_scale": 3.5},
        "upscale": {"guidance_scale": 3.5, "image_prompt": {"enabled": False}, "scale": 3.5},
    }
    (line,) = mistakes(tmp_path, captions={"source": "attention"}, **values)
    assert line.startswith("captions.source: attention: needs attention, which model ")
    assert "set it to model, server or prompt, or a base model of: SDXL" in line
    assert check(configured(tmp_path, captions={"source": "attention"})).unchecked == ()


@pytest.mark.parametrize("method", ["scalecrafter", "fouriscale", "freescale"])
def test_freeu_on_a_model_that_it_was_not_chosen_for_is_noted(method: str, saved: Path, tmp_path: Path) -> None:
    faithful = {"method": method, "preset": "faithful"}
    for model in ("picturebook", str(saved)):
        (note,) = preview(configured(tmp_path, model={"id": model}, upscale=faithful)).notes
        assert note == (
            f"upscale.freeu: the strengths of FreeU were chosen for SDXL, and {model} is another model, whose images "
            "it may darken and discolour; set freeu: false"
        )
    assert not preview(configured(tmp_path, upscale={**faithful, "freeu": False})).notes
    assert not preview(configured(tmp_path, upscale={"method": method})).notes
    sdxl = {"id": str(saved), "native_px": 1024}
    assert not preview(configured(tmp_path, model=sdxl, upscale={**faithful, "scale": 1})).notes


def test_all_mistakes_are_told_at_once_with_those_of_the_server(tmp_path: Path) -> None:
    found = mistakes(
        tmp_path,
        Around(
            mistakes=("http://here/api: has no deployment process-shards/resmaster-shards; make it with: make deploy",)
        ),
        model={"vae": "/etc", "device": "nope"},
        captions={"model": "/etc", "check": {"clip": "/etc"}},
        quality={"clip": "/etc"},
    )
    named = [line.partition(": ")[0] for line in found]
    assert named == [
        "http://here/api",
        "model.vae",
        "captions.model",
        "captions.check.clip",
        "quality.clip",
        "model.device",
    ]


def test_a_whole_model_of_ones_own_passes(model: Path, tmp_path: Path) -> None:
    vae = str(model / "vae")
    config = configured(tmp_path, model=adapted(model, vae=vae), upscale={"scale": 2})
    assert check(config).unchecked == ()
    assert preview(config).samples == 1
    make_stable_diffusion().save_pretrained(tmp_path / "sd")
    bare = {"model": {"id": str(tmp_path / "sd")}, "upscale": {"image_prompt": {"enabled": False}}}
    assert check(configured(tmp_path, **bare)).unchecked == ()
    image_prompts_of_no_weight = {**bare, "upscale": {"image_prompt": {"scale": 0}}}
    assert check(configured(tmp_path, **image_prompts_of_no_weight)).unchecked == ()


# what the engine refuses when the model is loaded, and in which words
SPOILT = {
    "no adapter": (lambda model: {"id": str(model)}, "image prompts need an IP-Adapter"),
    "adapter gone": (
        lambda model: adapted(model, ip_adapter={"weight_name": "none.safetensors"}),
        "has no file ip_adapter/none.safetensors",
    ),
    "adapter pickled": (
        lambda model: adapted(model, ip_adapter={"weight_name": "ip-adapter.bin"}),
        "is not a .safetensors file",
    ),
    "other tensors": (
        lambda model: adapted(
            model, ip_adapter={"subfolder": "unet", "weight_name": "diffusion_pytorch_model.safetensors"}
        ),
        "holds no IP-Adapter",
    ),
    "no such variant": (lambda model: adapted(model, variant="fp16"), "model.variant: no weights in"),
    "a UNet as VAE": (lambda model: adapted(model, vae=str(model / "unet")), "not an AutoencoderKL"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_wrong_part_of_the_model_is_found(name: str, model: Path, tmp_path: Path) -> None:
    make, reason = SPOILT[name]
    (line,) = mistakes(tmp_path, model=make(model), upscale={"scale": 2})
    assert reason in line
    assert line.startswith("model.") or "model.ip_adapter" in line


@pytest.mark.parametrize(
    "part",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "image_encoder/model.safetensors",
        "ip_adapter/ip-adapter.safetensors",
    ],
)
def test_weights_that_are_cut_off_or_gone_are_found(part: str, model: Path, tmp_path: Path) -> None:
    for spoil, reason in ((cut, "cannot be read as safetensors"), (Path.unlink, Path(part).name)):
        spoil(model / part)
        (line,) = mistakes(tmp_path, model=adapted(model), upscale={"scale": 2})
        assert reason in line
        assert line.startswith(("model.id: ", "model.ip_adapter: "))


def test_a_shard_of_weights_that_its_index_lists_and_the_folder_lacks(model: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "diffusion_pytorch_model-00002-of-00002.safetensors"}}
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (line,) = mistakes(tmp_path, model=adapted(model), upscale={"scale": 2})
    assert "lacks files that diffusion_pytorch_model.safetensors.index.json lists" in line


def test_variants_of_models_are_refused_in_the_words_of_loading(model: Path, tmp_path: Path) -> None:
    def said(**of_unet: Any) -> str:
        edit(model / "unet" / "config.json", **of_unet)
        (line,) = mistakes(tmp_path, model=adapted(model), upscale={"scale": 2})
        return line.removeprefix("model.id: ")

    for changes in ({"addition_embed_type": "image"}, {"addition_embed_type": "text_time", "in_channels": 9}):
        line = said(**changes)
        pipe = make_pipeline()
        for name, value in changes.items():
            pipe.unet.register_to_config(**{name: value})
        with pytest.raises(ConfigError) as caught:
            Models.from_pipeline(pipe)
        assert str(caught.value) == f"model pipeline: {line}"


def test_more_steps_than_the_model_was_trained_with(model: Path, tmp_path: Path) -> None:
    edit(model / "scheduler" / "scheduler_config.json", num_train_timesteps=20)
    values = {"model": adapted(model), "low_res": {"steps": 21}, "upscale": {"scale": 2, "steps": 22}}
    assert [line.partition(",")[0] for line in mistakes(tmp_path, **values)] == [
        "low_res.steps: steps: 21 is more than the 20 steps that the model was trained with; use fewer",
        "upscale.steps: steps: 22 is more than the 20 steps that the model was trained with; use fewer",
    ]
    edit(model / "scheduler" / "scheduler_config.json", num_train_timesteps=1000, prediction_type="sample")
    assert len(mistakes(tmp_path, **values)) == 2
    with pytest.raises(ConfigError, match="'sample' is not supported"):
        load_models(ModelConfig(id=str(model), device="cpu")).base.path(4, Timing(256))


def test_another_kind_of_model_as_clip_or_captioner(tmp_path: Path) -> None:
    captioner, clip = pack_folder() / "captioner", pack_folder() / "clip"
    found = mistakes(tmp_path, captions={"model": str(clip)}, quality={"clip": str(captioner)})
    assert "captions.model: " in found[0]
    assert "is 'clip', no image-text-to-text model" in found[0]
    assert {line.partition(": ")[0] for line in found[1:]} == {"quality.clip"}
    assert "is 'git', no CLIP model" in found[1]
    whole = configured(tmp_path, captions={"model": str(captioner)}, quality={"clip": str(clip)})
    assert check(whole).unchecked == ()
    assert load_writer(whole).captioner is not None
    assert load_clip(str(clip)).input_px > 0


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_clip_model_that_is_not_whole(name: str, tmp_path: Path) -> None:
    clip = shutil.copytree(pack_folder() / "clip", tmp_path / "clip")
    (clip / name).unlink()
    (line,) = mistakes(tmp_path, quality={"clip": str(clip)})
    assert line.startswith("quality.clip: ")
    assert name in line


def test_a_network_that_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    shutil.copy(pack_folder() / "super_resolution" / "model.safetensors", path)
    upscale = {"method": "super_resolution", "model": str(path)}
    assert check(configured(tmp_path, upscale=upscale)).unchecked == ()
    cut(path)
    (line,) = mistakes(tmp_path, upscale=upscale)
    assert "cannot be read as safetensors" in line
    save_file({"a.weight": torch.zeros(3)}, path)
    assert "not an RRDBNet's weights" in mistakes(tmp_path, upscale=upscale)[0]
    first = {"conv_first.weight": torch.zeros(8, 3, 3, 3), "RRDB_trunk.0.RDB1.conv1.weight": torch.zeros(4, 8, 3, 3)}
    save_file(first, path)
    assert "not a whole RRDBNet" in mistakes(tmp_path, upscale=upscale)[0]


def test_what_is_still_at_the_hub_is_no_mistake_but_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **kwargs: pytest.fail("downloaded"))
    config = configured(tmp_path, captions={"model": "owner/none"}, quality={"clip": "owner/clip"})
    assert preview(config).unchecked == (
        "captions.model: owner/none, which is not on this machine yet",
        "quality.clip: owner/clip, which is not on this machine yet",
    )
    assert "neither a folder nor a hub id" in mistakes(tmp_path, quality={"clip": "owner/a b"})[0]


def test_devices_belong_to_the_machine_that_computes(tmp_path: Path) -> None:
    config = configured(tmp_path, model={"device": "cuda:99"})
    assert check(config, Around(here=False)).dataset is None
    check_stages(config, ["low_res"], here=False)
    with pytest.raises(ConfigError, match="cuda:99 is not there"):
        check_stages(config, ["low_res"], here=True)
    with pytest.raises(ConfigError, match="is no device"):
        check(configured(tmp_path, model={"device": "nope"}), Around(here=False))


def test_only_what_the_stages_need_is_checked(tmp_path: Path) -> None:
    broken = {"captions": {"model": "/etc"}, "quality": {"clip": "/etc"}}
    config = configured(tmp_path, **broken)
    check_stages(config, ["low_res"], here=True)
    with pytest.raises(ConfigError) as caught:
        check_stages(config, ["captions"], here=True)
    assert [line.partition(": ")[0] for line in caught.value.mistakes] == ["captions.model", "quality.clip"]
    plain = {**broken, "quality": {"clip": None}, "upscale": {"method": "lanczos"}}
    assert check(configured(tmp_path, **plain)).dataset is None


def test_a_model_that_no_stage_reads_but_that_names_the_dataset(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, upscale={"method": "lanczos"}, captions={"model": "/none"})
    assert line == "weights: model /none: no such folder; check the path, or give a hub id such as owner/name"


def test_a_root_that_cannot_be_written_is_found_before_anything_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)
    (said,) = mistakes(tmp_path)
    assert said == f"root: {tmp_path / 'out'}: cannot be written ({tmp_path} does not allow it); choose another root"


def test_the_key_of_the_caption_server_is_that_of_the_machine_that_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "no\nkey")
    values = {"captions": {"source": "server", "base_url": "http://127.0.0.1:8000/v1"}}
    (said,) = mistakes(tmp_path, **values)
    assert said.startswith("captions.base_url: OPENAI_API_KEY holds characters that no key has")
    assert preview(configured(tmp_path, **values), Around(here=False)).new_samples == 1


def test_an_image_that_its_format_cannot_hold_is_found_before_anything_is_planned(tmp_path: Path) -> None:
    values = {"low_res": {"height": 64, "width": 512}, "upscale": {"method": "lanczos", "scale": 40}}
    (said,) = mistakes(tmp_path, **values)
    assert said.startswith("low_res and upscale.scale: its high-res image: ")
    assert "20480" in said.replace(",", "")
    assert preview(configured(tmp_path, image_format="png", **values)).new_samples == 1


def test_a_scale_that_the_message_itself_proposes_is_taken_though_it_is_rounded(tmp_path: Path) -> None:
    scale = 120 / 88
    assert 88 * scale != 120
    values = {"low_res": {"height": 88, "width": 88}, "upscale": {"method": "lanczos", "scale": scale}}
    assert preview(configured(tmp_path, **values)).new_samples == 1
