"""ControlNets in files: what is refused before loading, what is loaded, and what depends on them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel

from resmaster_stages.config.load import parse_config
from resmaster_stages.config.model import ControlNetConfig, ModelConfig
from resmaster_stages.dataset.stages import stage_hashes
from resmaster_stages.diffusion import memory
from resmaster_stages.diffusion.memory import view_limit, weights_bytes
from resmaster_stages.errors import ConfigError
from resmaster_stages.inspection.explain import explain
from resmaster_stages.library.opened import OpenedDataset
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models import places
from resmaster_stages.models.bases.unet import feature_bytes, row_bytes
from resmaster_stages.models.identity import control_identity, model_identity
from resmaster_stages.models.licences import licences_of
from resmaster_stages.models.load import load_models, load_pipeline
from resmaster_stages.models.parts import Models
from resmaster_stages.planning.checks import check
from resmaster_stages.prompts import ingest
from resmaster_stages.runner.run import run_stage
from tests.methods.common import difference, plain, settings, some_image
from tests.models.test_damaged_weights import DAMAGES, refusal
from tests.tiny_models import make_control_net, make_pipeline, make_stable_diffusion, save, tiny, with_base
from tests.tiny_transformers import make_flux

ON = {"enabled": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL, and ControlNets: for it, of the union kind, and for Stable Diffusion."""
    top = tmp_path_factory.mktemp("models")
    save(top / "tiny")
    make_control_net(tiny().unet).save_pretrained(top / "net")
    make_control_net(tiny().unet, union=True).save_pretrained(top / "union")
    make_control_net(make_stable_diffusion().unet).save_pretrained(top / "sd")
    return top


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    places._read_json.cache_clear()
    yield
    load_models.cache_clear()


@pytest.fixture
def net(folders: Path, tmp_path: Path) -> Path:
    """A ControlNet that a test may spoil."""
    return shutil.copytree(folders / "net", tmp_path / "net")


def model(folders: Path, net: Path | None, **values: Any) -> dict[str, Any]:
    own = {"id": str(folders / "tiny"), "device": "cpu"}
    return own if net is None else {**own, "controlnet": {"id": str(net), **values}}


def mistakes(tmp_path: Path, model: dict[str, Any], method: str = "multidiffusion", **control: Any) -> tuple[str, ...]:
    """What planning says of a dataset with a ControlNet."""
    (tmp_path / "prompts.txt").write_text("a red house\n")
    config = parse_config(
        {
            "name": "demo",
            "root": str(tmp_path / "out"),
            "prompts": str(tmp_path / "prompts.txt"),
            "model": model,
            "upscale": {"method": method, "scale": 2, "control": {**ON, **control}},
            "captions": {"source": "prompt"},
            "quality": {"clip": None},
        }
    )
    try:
        check(config)
    except ConfigError as error:
        return error.mistakes
    return ()


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ------------------------------------------------------------------------------------------- refused before loading


def test_nets_that_fit_are_taken(folders: Path, tmp_path: Path) -> None:
    assert mistakes(tmp_path, model(folders, folders / "net")) == ()
    assert mistakes(tmp_path, model(folders, folders, subfolder="net")) == ()
    assert mistakes(tmp_path, model(folders, folders / "net"), method="c_upscale", image="canny") == ()
    for image in ("tile", "canny"):
        assert mistakes(tmp_path, model(folders, folders / "union"), image=image) == ()


def test_a_missing_net_is_one_line_that_says_what_to_do(folders: Path, tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, model(folders, None))
    assert "upscale.control needs a ControlNet; set model.controlnet, or upscale.control.enabled: false" in line
    assert mistakes(tmp_path, model(folders, None), enabled=False) == ()
    assert mistakes(tmp_path, model(folders, None), scale=0) == ()
    (line,) = mistakes(tmp_path, model(folders, tmp_path / "nowhere"))
    assert line.startswith("model.controlnet: ")
    assert "no such folder" in line
    (line,) = mistakes(tmp_path, model(folders, folders / "tiny"))
    assert "has no file config.json" in line


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"cross_attention_dim": 768}, "made for another base model (its cross_attention_dim is 768, the UNet's 32)"),
    ({"block_out_channels": [16, 16]}, "another base model (its block_out_channels is [16, 16]"),
    ({"layers_per_block": 2}, "layers_per_block is 2"),
    ({"in_channels": 9}, "in_channels is 9"),
    ({"conditioning_channels": 4}, "control image has 4 channels, as for inpainting"),
    ({"_class_name": "FluxControlNetModel"}, "it is 'FluxControlNetModel', not a ControlNetModel"),
    ({"_class_name": None}, "it is None, not a ControlNetModel"),
    ({"addition_embed_type": "text_image"}, "it reads 'text_image', which the base model does not have"),
    ({"conditioning_embedding_out_channels": [16, 32, 96, 256]}, "one cell of 8 x 8 pixels"),
    ({"conditioning_embedding_out_channels": 5}, "one cell of None x None pixels"),
    ({"controlnet_conditioning_channel_order": "bgr"}, "as BGR"),
    ({"global_pool_conditions": True}, "only its mean"),
]


@pytest.mark.parametrize(("changed", "said"), WRONG, ids=str)
def test_a_net_for_another_model_is_refused_at_planning_and_at_loading(
    folders: Path, net: Path, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    edit(net / "config.json", **changed)
    (line,) = mistakes(tmp_path, model(folders, net))
    assert line.startswith("model.controlnet: ")
    assert said in line
    assert "; give " in line


def test_a_net_of_stable_diffusion_is_refused_for_sdxl(folders: Path, tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, model(folders, folders / "sd"))
    assert "it was made for another base model" in line


def test_a_union_net_without_the_kind_of_image_is_refused(folders: Path, tmp_path: Path) -> None:
    union = shutil.copytree(folders / "union", tmp_path / "union")
    edit(union / "config.json", num_control_type=6)
    (line,) = mistakes(tmp_path, model(folders, union))
    assert "it has 6 kinds of control images, and tile is number 6; give the ProMax version" in line
    assert mistakes(tmp_path, model(folders, union), image="canny") == ()
    edit(union / "config.json", num_control_type="many")
    assert "'many' kinds" in mistakes(tmp_path, model(folders, union))[0]


def test_a_transformer_takes_none(folders: Path, tmp_path: Path) -> None:
    make_flux().save_pretrained(tmp_path / "flux")
    flux = {"id": str(tmp_path / "flux"), "controlnet": {"id": str(folders / "net")}}
    lines = mistakes(tmp_path, flux)
    assert any(line.startswith("upscale.control.enabled: needs control, which model") for line in lines)
    assert any(line.startswith("model.controlnet: needs control") and "set it to null" in line for line in lines)
    with pytest.raises(ConfigError, match=r"model\.controlnet: needs control.*set it to null"):
        load_pipeline(ModelConfig(**flux))


@pytest.mark.parametrize("damage", ["cut", "gone", "no json", "a list", "too deep", "no variant"])
def test_damaged_files_are_one_line(folders: Path, net: Path, tmp_path: Path, damage: str) -> None:
    weights, config = net / "diffusion_pytorch_model.safetensors", net / "config.json"
    more: dict[str, Any] = {}
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "gone":
        weights.unlink()
    elif damage == "no variant":
        more = {"variant": "fp16"}
    else:
        config.write_text({"no json": "{", "a list": "[1]", "too deep": '{"a":' * 100_000}[damage])
    (line,) = mistakes(tmp_path, model(folders, net, **more))
    assert str(net) in line
    assert "; download" in line


def test_whatever_is_damaged_loading_tells_of_it_in_one_line(folders: Path, tmp_path: Path) -> None:
    def load(folder: Path) -> None:
        places._read_json.cache_clear()
        load_pipeline(ModelConfig(**model(folders, folder)))

    load(folders / "net")
    draw, told = random.Random(5), 0
    for _ in range(25):
        folder = shutil.copytree(folders / "net", tmp_path / "work")
        file = folder / draw.choice(["config.json", "diffusion_pytorch_model.safetensors"])
        file.write_bytes(draw.choice(DAMAGES[file.suffix])(file.read_bytes(), draw))
        if line := refusal(load, folder):
            told += 1
            assert str(folder) in line
        shutil.rmtree(folder)
    assert told > 10


# ------------------------------------------------------------------------------------------- loaded


@pytest.mark.parametrize(("name", "kind"), [("net", ControlNetModel), ("union", ControlNetUnionModel)])
def test_a_net_is_loaded_with_its_model_and_used(folders: Path, name: str, kind: type) -> None:
    models = load_models(ModelConfig(**model(folders, folders / name), dtype="bfloat16", offload="model"))
    assert type(models.control_net) is kind
    assert models.control_net.dtype == torch.bfloat16
    assert any(part is models.control_net for part in models.parts)
    load_models.cache_clear()
    models = load_models(ModelConfig(**model(folders, folders / name)))
    config = settings("multidiffusion", control=ON)
    image = upscale_image(models, some_image(), "a cat", config=config)
    assert difference(image, upscale_image(models, some_image(), "a cat", config=settings("multidiffusion"))) > 1


def test_the_union_kind_is_recognised_by_what_it_counts(folders: Path, tmp_path: Path) -> None:
    for name in ("ControlNetModel_Union", "ControlNetModel"):
        union = shutil.copytree(folders / "union", tmp_path / name)
        edit(union / "config.json", _class_name=name)
        assert type(load_pipeline(ModelConfig(**model(folders, union))).controlnet) is ControlNetUnionModel


def test_a_variant_is_loaded(folders: Path, tmp_path: Path) -> None:
    make_control_net(tiny().unet).half().save_pretrained(tmp_path / "half", variant="fp16")
    config = model(folders, tmp_path / "half", variant="fp16")
    assert mistakes(tmp_path, config) == ()
    assert load_pipeline(ModelConfig(**config)).controlnet.dtype == torch.float32  # as the model


@pytest.mark.parametrize("offload", ["model", "text", "none"])
def test_an_offloaded_net_is_on_the_device_only_while_it_works(offload: Any) -> None:
    pipe, net = make_pipeline(), make_control_net(tiny().unet)
    pipe.controlnet = net
    moves: list[Any] = []
    move = net.to

    def to(*args: Any, **kwargs: Any) -> Any:
        moves.extend(args[:1])
        return move(*args, **kwargs)

    net.to = to
    models = Models.from_pipeline(pipe, offload=offload)
    upscale_image(models, some_image(), "a cat", config=settings("multidiffusion", control=ON))
    assert moves == ([models.device, "cpu"] if offload == "model" else [])
    assert any(part is net for part in models.resident) == (offload != "model")


def test_half_precision_draws_nearly_the_same_image() -> None:
    pipe = make_pipeline()
    pipe.controlnet = make_control_net(tiny().unet)
    config = settings("multidiffusion", control={**ON, "scale": 0.3}, steps=3)
    whole = upscale_image(Models.from_pipeline(pipe), some_image(), "a cat", config=config)
    pipe.to(torch.bfloat16)
    pipe.controlnet.to(torch.bfloat16)
    half = upscale_image(Models.from_pipeline(pipe), some_image(), "a cat", config=config)
    off = (torch.tensor(list(half.getdata())) - torch.tensor(list(whole.getdata()))).abs().float().mean()
    assert 0 < off < 6


def test_memory_holds_the_net_and_its_features(monkeypatch: pytest.MonkeyPatch) -> None:
    models = plain()
    net = make_control_net(tiny().unet)
    both = with_base(models, control_net=net)
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    assert weights_bytes(both) == weights_bytes(models) + size
    down, mid = net(
        torch.randn(1, 4, 16, 16),
        5,
        torch.randn(1, 77, 32),
        torch.rand(1, 3, 64, 64),
        added_cond_kwargs={"text_embeds": torch.randn(1, 16), "time_ids": torch.rand(1, 6)},
        return_dict=False,
    )
    assert feature_bytes(models.base.denoiser, 16, 16) == sum(each.numel() * 4 for each in (*down, mid))
    more = both.base.row_bytes(16, 16)
    assert more == row_bytes(models.base.denoiser, 16, 16) + feature_bytes(models.base.denoiser, 16, 16)
    monkeypatch.setattr(memory, "device_bytes", lambda device: 10**8)
    assert view_limit(both, None, (16, 16), 2) < view_limit(models, None, (16, 16), 2)


# ------------------------------------------------------------------------------------------- what depends on it


def dataset(folders: Path, net: dict[str, Any] | None, **upscale: Any):
    return parse_config(
        {
            "name": "d",
            "model": {"id": str(folders / "tiny"), "controlnet": net},
            "upscale": {"method": "resmaster", "image_prompt": {"enabled": False}, **upscale},
        }
    )


def test_only_high_res_images_with_control_depend_on_the_net(folders: Path, tmp_path: Path) -> None:
    own = {"id": str(folders / "net")}
    without, unused = (stage_hashes(dataset(folders, net)) for net in (None, own))
    assert without == unused
    used = stage_hashes(dataset(folders, own, control=ON))
    assert {stage for stage in used if used[stage] != without[stage]} == {"high_res", "quality"}
    other = shutil.copytree(folders / "net", tmp_path / "net")
    edit(other / "config.json", norm_eps=1e-6)
    changed = stage_hashes(dataset(folders, {"id": str(other)}, control=ON))
    assert {stage for stage in used if used[stage] != changed[stage]} == {"high_res", "quality"}
    for control in ({"scale": 0.5}, {"image": "canny"}, {"start": 0.1}, {"stop": 0.9}):
        assert stage_hashes(dataset(folders, own, control={**ON, **control}))["high_res"] != used["high_res"]


def test_a_dataset_is_built_and_its_low_res_images_serve_for_another_net(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red house\n")

    def build(control: dict[str, Any]) -> tuple[Any, bytes, bytes, dict[str, Any]]:
        config = parse_config(
            {
                "name": "demo",
                "root": str(tmp_path / "out"),
                "prompts": str(tmp_path / "prompts.txt"),
                "image_format": "png",
                "model": model(folders, folders / "net"),
                "low_res": {"steps": 2},
                "upscale": {"method": "multidiffusion", "scale": 2, "steps": 2, "control": control},
                "quality": {"clip": None},
            }
        )
        dataset = ingest(config)
        for stage in dataset.hashes:
            run_stage(dataset, stage, 0)
        (sample,) = OpenedDataset(dataset)
        assert sample.low_res is not None
        assert sample.high_res is not None
        receipt = dataset.commits("high_res").read(0)
        assert receipt is not None
        facts = dict(explain(dataset, sample.key).stages[-2].facts)
        return receipt, sample.low_res.data, sample.high_res.data, facts

    without, low, high, facts = build({})
    used, same_low, other_high, more = build(ON)
    assert (low, high != other_high) == (same_low, True)
    assert "controlnet" not in facts
    assert more["controlnet"].startswith("net@")
    assert more["upscale"]["control"]["enabled"]
    cost, both = without.provenance["unet"], used.provenance["unet"]
    assert both["native_rows"] == pytest.approx(1.44 * cost["native_rows"])


def test_names_of_nets() -> None:
    def name(**values: Any) -> str | None:
        return control_identity(ModelConfig(controlnet=ControlNetConfig(id="o/n", **values)))

    assert control_identity(ModelConfig()) is None
    names = [name(), name(revision="1"), name(subfolder="tile"), name(variant="fp16"), name(subfolder="a", variant="b")]
    assert names[:2] == ["o/n@main", "o/n@1"]
    assert len(set(names)) == len(names)
    plain, with_net = ModelConfig(), ModelConfig(controlnet=ControlNetConfig(id="o/n"))
    assert model_identity(plain) == model_identity(with_net)
    assert plain.identity() == with_net.identity()


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("xinsir/controlnet-tile-sdxl-1.0", "apache-2.0"),
        ("xinsir/controlnet-union-sdxl-1.0", "apache-2.0"),
        ("diffusers/controlnet-canny-sdxl-1.0", "openrail++"),
        ("somebody/else", None),
    ],
)
def test_the_licence_of_a_net_is_told_where_it_is_used(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, licence: str | None
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = {each.part: each for each in licences_of(dataset(folders, {"id": name}, control=ON))}
    assert (found["ControlNet"].model, found["ControlNet"].licence.name) == (name, licence)
    assert "ControlNet" not in {each.part for each in licences_of(dataset(folders, {"id": name}))}


def test_ranges_are_checked_when_a_configuration_is_read() -> None:
    for control, said in (
        ({"start": 0.5, "stop": 0.5}, "stop (0.5) must be greater than start (0.5)"),
        ({"scale": 3}, "less than or equal to 2"),
        ({"image": "depth"}, "'tile' or 'canny'"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_config({"name": "d", "upscale": {"method": "multidiffusion", "control": control}})
        assert said in str(caught.value)
    with pytest.raises(ConfigError, match="control"):
        parse_config({"name": "d", "upscale": {"method": "direct", "control": {"enabled": True}}})
