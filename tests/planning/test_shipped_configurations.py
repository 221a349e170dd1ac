"""The configurations for transformers: what can be checked of them without their weights.

A cache of the hub is made that holds the JSON files of each model, as far as they are read. Nothing is downloaded.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import load_config, parse_config
from resmaster_stages.diffusion.cost import CONTROL_SHARE
from resmaster_stages.diffusion.views import target_size, view_grid
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.resmaster import ResMaster
from resmaster_stages.methods.settings import Diffusion
from resmaster_stages.models.bases import family_of
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.models.licences import licences_of
from resmaster_stages.models.places import _read_json
from resmaster_stages.planning.checks import check
from resmaster_stages.planning.workload import denoising_of, stage_work
from tests.checkout import ROOT

KL = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "sample_size": 1024}
KL_16 = {**KL, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
FLOW = "FlowMatchEulerDiscreteScheduler"
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "base_image_seq_len": 256}

MODELS: dict[str, dict[str, Any]] = {
    "flux-4k": {
        "pipeline": "FluxPipeline",
        "transformer": {"_class_name": "FluxTransformer2DModel", "in_channels": 64, "guidance_embeds": True},
        "vae": KL_16,
        "scheduler": (FLOW, {**DYNAMIC, "shift": 3.0, "max_shift": 1.15, "max_image_seq_len": 4096}),
    },
    "z-image-4k": {
        "pipeline": "ZImagePipeline",
        "transformer": {"_class_name": "ZImageTransformer2DModel", "in_channels": 16},
        "vae": KL_16,
        "scheduler": (FLOW, {"shift": 3.0, "use_dynamic_shifting": False}),
    },
    "sd35-4k": {
        "pipeline": "StableDiffusion3Pipeline",
        "transformer": {
            "_class_name": "SD3Transformer2DModel",
            "in_channels": 16,
            "sample_size": 128,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        "vae": {**KL_16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        "scheduler": (FLOW, {"shift": 3.0}),
    },
    "pixart-4k": {
        "pipeline": "PixArtSigmaPipeline",
        "transformer": {
            "_class_name": "PixArtTransformer2DModel",
            "in_channels": 4,
            "out_channels": 8,
            "sample_size": 128,
        },
        "vae": {**KL, "latent_channels": 4, "scaling_factor": 0.13025},
        "scheduler": (
            "DPMSolverMultistepScheduler",
            {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": "epsilon"},
        ),
    },
    "qwen-4k": {
        "pipeline": "QwenImagePipeline",
        "transformer": {"_class_name": "QwenImageTransformer2DModel", "in_channels": 64, "out_channels": 16},
        "vae": {
            "_class_name": "AutoencoderKLQwenImage",
            "z_dim": 16,
            "temperal_downsample": [False, True, True],
            "latents_mean": [0.0] * 16,
            "latents_std": [1.0] * 16,
        },
        "scheduler": (
            FLOW,
            {**DYNAMIC, "shift": 1.0, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02},
        ),
    },
}
"""Configuration -> its model's files. The sizes are the published models'."""


TEXT_ENCODERS = {"flux-4k": 2, "sd35-4k": 3}
"""The number of text encoders, where it is not one."""


def put(folder: Path, name: str, values: dict[str, Any]) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values))


@pytest.fixture
def config(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetConfig:
    """The configuration, with its model's JSON files in the cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    loaded = load_config(ROOT / "deployments" / "datasets" / f"{request.param}.yaml", root=str(tmp_path / "out"))
    model, revision = MODELS[request.param], loaded.model.revision
    assert revision is not None
    folder = tmp_path / "hub" / f"models--{loaded.model.id.replace('/', '--')}" / "snapshots" / revision
    scheduler, path = model["scheduler"]
    parts = {part: ["diffusers", model[part]["_class_name"]] for part in ("transformer", "vae")}
    index = {"_class_name": model["pipeline"], "scheduler": ["diffusers", scheduler], **parts}
    for number in range(TEXT_ENCODERS.get(request.param, 1)):
        ending = f"_{number + 1}" if number else ""
        index[f"text_encoder{ending}"] = index[f"tokenizer{ending}"] = ["transformers", "T5"]
    put(folder, "model_index.json", index)
    put(folder, "scheduler/scheduler_config.json", path)
    for part in parts:
        put(folder, f"{part}/config.json", model[part])
    _read_json.cache_clear()
    return loaded


def test_the_configurations_for_transformers_are_all_looked_at() -> None:
    shipped = {path.stem for path in (ROOT / "deployments" / "datasets").glob("*.yaml")}
    assert {name for name in shipped if not name.startswith(("picturebook", "sdxl"))} == MODELS.keys()


@pytest.mark.parametrize("config", MODELS, indirect=True)
def test_only_what_is_not_downloaded_yet_stays_unchecked(config: DatasetConfig) -> None:
    checked = check(config)
    assert f"model.id: {config.model.id}, which is not on this machine yet" in checked.unchecked
    assert {line.partition(":")[0] for line in checked.unchecked} == {"model.id", "captions.model", "quality.clip"}
    assert not any("negative_prompt" in note for note in checked.notes)
    assert any("does not allow commercial use" in note for note in checked.notes) is (config.name == "flux-4k")


@pytest.mark.parametrize("config", MODELS, indirect=True)
def test_sampling_is_as_the_family_recommends(config: DatasetConfig) -> None:
    sampling = family_of(config.model).sampling(config.model)
    upscale = config.upscale
    assert isinstance(upscale, Diffusion)
    assert (config.low_res.steps, config.low_res.guidance_scale) == (sampling.steps, sampling.guidance_scale)
    assert upscale.guidance_scale == sampling.guidance_scale
    assert upscale.steps <= max(25, sampling.steps)


@pytest.mark.parametrize("config", MODELS, indirect=True)
def test_the_size_and_work_of_an_image(config: DatasetConfig) -> None:
    base = denoising_of(config.model)
    native = base.geometry.native_px
    assert native == config.low_res.height == config.low_res.width
    assert 3900 < native * config.upscale.scale <= 4096
    work = stage_work(config, native, native)
    views = len(view_grid(base.geometry, *target_size(native, native, config.upscale.scale), 0.5))
    branches = 2 if base.guided else 1
    assert isinstance(config.upscale, Diffusion)
    rows = sum(each.rows for each in work["high_res"])
    assert rows < 0.5 * config.upscale.steps * branches * views, "less than half of what `preset: exact` takes"
    assert sum(each.rows for each in work["low_res"]) == config.low_res.steps * branches
    page = (ROOT / "docs" / "bases.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| `{config.name}\.yaml` \| [^|]+ \| {rows} \|$", page, re.MULTILINE), rows


SDXL = {
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "in_channels": 4,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
}


def test_the_configuration_with_a_control_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ControlNet is one for SDXL, and the work is that of tiles at 1.44 rows each."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    name = "sdxl-controlnet-4k"
    config = load_config(ROOT / "deployments" / "datasets" / f"{name}.yaml", root=str(tmp_path / "out"))
    net = config.model.controlnet
    assert net is not None
    assert config.model.revision is not None
    assert net.revision is not None

    def folder(model: str, revision: str) -> Path:
        return tmp_path / "hub" / f"models--{model.replace('/', '--')}" / "snapshots" / revision

    base = folder(config.model.id, config.model.revision)
    encoders = {
        f"{part}{ending}": ["transformers", "CLIP"] for part in ("text_encoder", "tokenizer") for ending in ("", "_2")
    }
    scheduler = {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    put(base, "model_index.json", {"_class_name": "StableDiffusionXLPipeline", **scheduler, **encoders})
    put(base, "unet/config.json", {**SDXL, "sample_size": 128})
    put(base, "vae/config.json", {**KL, "latent_channels": 4})
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
    put(base, "scheduler/scheduler_config.json", {**betas, "timestep_spacing": "leading", "steps_offset": 1})
    _read_json.cache_clear()
    assert any(
        line.startswith("model.controlnet: xinsir/") for line in check(config).unchecked
    )  # still to be downloaded

    for changed, fits in (({}, True), ({"cross_attention_dim": 768}, False)):
        embedding = {"conditioning_embedding_out_channels": [16, 32, 96, 256]}
        put(
            folder(net.id, net.revision),
            "config.json",
            {"_class_name": "ControlNetModel", **SDXL, **embedding, **changed},
        )
        if fits:
            assert any(line.startswith("model.controlnet: ") for line in check(config).unchecked)  # its weights
        else:
            with pytest.raises(ConfigError, match=r"model\.controlnet: it was made for another base model"):
                check(config)

    (unet, control) = stage_work(config, 1024, 1024)["high_res"]
    assert (unet.rows, control.rows, control.share) == (23 * 2 * 25, unet.rows, CONTROL_SHARE)
    told = {each.part: each.licence.name for each in licences_of(config)}
    assert told == {"base model": "openrail++", "VAE": "mit", "ControlNet": "apache-2.0"}
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert f"{unet.native_rows + control.native_rows:,.0f} rows" in page


def test_the_adapter_that_flux_has_as_a_comment_can_be_used() -> None:
    """It is read, and both its licence and that of the base model are told."""
    text = (ROOT / "deployments" / "datasets" / "flux-4k.yaml").read_text(encoding="utf-8")
    used = re.sub(r"^  # (?=ip_adapter|  \w)", "  ", text, flags=re.MULTILINE)
    config = parse_config(yaml.safe_load(used.replace("enabled: false", "enabled: true")))
    assert config.model.ip_adapter is not None
    assert config.model.ip_adapter.image_encoder == "openai/clip-vit-large-patch14"
    told = {each.part: each.licence.non_commercial for each in licences_of(config)}
    assert told == {"base model": True, "IP-Adapter": True, "captioner": False}


SDXL_FILES = {
    "model_index.json": {
        "_class_name": "StableDiffusionXLPipeline",
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **{name: ["transformers", "CLIPTextModel"] for name in ("text_encoder", "text_encoder_2")},
        **{name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")},
    },
    "unet/config.json": {"sample_size": 128, "in_channels": 4, "addition_embed_type": "text_time"},
    "vae/config.json": {**KL, "latent_channels": 4, "scaling_factor": 0.13025},
    "scheduler/scheduler_config.json": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
    },
}


def test_few_step_weights_leave_196_rows_of_resmaster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """49 views in the last 4 of 8 steps, without an unconditional branch. Low-res images are SDXL's own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    config = load_config(ROOT / "deployments" / "datasets" / "sdxl-few-step-4k.yaml", root=str(tmp_path / "out"))
    assert config.model.revision is not None
    folder = tmp_path / "hub" / f"models--{config.model.id.replace('/', '--')}" / "snapshots" / config.model.revision
    for name, values in SDXL_FILES.items():
        put(folder, name, values)
    _read_json.cache_clear()
    checked = check(config)
    assert "model.few_step: ByteDance/SDXL-Lightning, which is not on this machine yet" in checked.unchecked
    assert checked.notes == ()
    work = stage_work(config, 1024, 1024)
    assert sum(each.rows for each in work["high_res"]) == 49 * 4 == 196
    assert {each.area for each in work["high_res"]} == {1.0}
    assert sum(each.rows for each in work["low_res"]) == 50 * 2
    upscale = config.upscale
    assert isinstance(upscale, ResMaster)
    grid = view_grid(Geometry(1024, 8), 4096, 4096, 0.5)
    course = denoising_of(config.model).course(upscale.steps, upscale.timing(grid))
    left = [course.done[index] for index in range(course.first(0.5), len(course.done))]
    assert [upscale.structure.acts(done) for done in left] == [True, True, False, False]
