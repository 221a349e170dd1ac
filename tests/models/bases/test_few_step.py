"""Few-step weights: their sampling, and the files that they come from."""

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import resmaster_stages as rm
from resmaster_stages import high_res, library, low_res
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.model import FewStepConfig, ModelConfig
from resmaster_stages.dataset.sample import EncodedImage, Sample
from resmaster_stages.dataset.stages import stage_hashes
from resmaster_stages.diffusion.cost import counting
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases import few_step_files
from resmaster_stages.models.bases.few_step import FewStep, Kind, few_step_of
from resmaster_stages.models.identity import few_step_identity, model_identity, pack_folder
from resmaster_stages.models.licences import licences_of
from resmaster_stages.models.load import load_models
from resmaster_stages.models.schedule import Timing
from resmaster_stages.planning.checks import check, notes_of
from resmaster_stages.planning.workload import denoising_of, high_res_work, stage_work
from tests.methods.common import settings, some_image
from tests.tiny_models import SCHEDULER, make_pipeline, save
from tests.tiny_transformers import make_flux

LAYERS = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (2, 3),
    "down_blocks.0.resnets.0.conv1": (3, None),
    "time_embedding.linear_1": (2, 1),
}
"""Layer -> rank of its change, and alpha if there is one."""
SHOWN = "tiny/few.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield
    load_models.cache_clear()


def unet_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def low_rank(unet: dict[str, torch.Tensor], underscored: bool) -> tuple[dict, dict]:
    """The tensors of a LoRA by either way of naming, and layer -> what it adds to the layer's weight."""
    torch.manual_seed(5)
    tensors, added = {}, {}
    for layer, (rank, alpha) in LAYERS.items():
        weight = unet[f"{layer}.weight"]
        down, up = torch.randn(rank, *weight.shape[1:]), torch.randn(len(weight), rank, *(1,) * (weight.ndim - 2))
        added[layer] = torch.einsum("or,r...->o...", up.flatten(1), down) * (1 if alpha is None else alpha / rank)
        name = f"lora_unet_{layer.replace('.', '_')}" if underscored else f"unet.{layer}"
        ends = ("lora_down", "lora_up") if underscored else ("lora_A", "lora_B")
        tensors |= {f"{name}.{end}.weight": each for end, each in zip(ends, (down, up))}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors, added


def few(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **values: object) -> FewStepConfig:
    """Weights in `folder`/few.safetensors: `tensors`, or those that lie there."""
    if tensors is not None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "few.safetensors")
    return FewStepConfig(**{"id": str(folder), "weight_name": "few.safetensors", "kind": "lightning", **values})


def model(saved: Path, few_step: FewStepConfig | None) -> ModelConfig:
    return ModelConfig(id=str(saved), device="cpu", few_step=few_step)


def refused(config: ModelConfig) -> str:
    """The one line with which loading, and planning before it, refuse."""
    with pytest.raises(ConfigError) as loading:
        load_models(config)
    with pytest.raises(ConfigError) as planning:
        few_step_files.check(config)
    assert str(loading.value) == str(planning.value)
    assert "\n" not in str(loading.value)
    return str(loading.value)


# ------------------------------------------------------------------------------------------------- kinds


TRAILING = {**SCHEDULER, "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("kind", "scheduler", "counts"),
    [
        ("lightning", diffusers.EulerDiscreteScheduler, (2, 4, 8)),
        ("hyper", diffusers.DDIMScheduler, (2, 4, 8, 12)),
        ("turbo", diffusers.EulerAncestralDiscreteScheduler, (1, 2, 3, 4)),
        ("lcm", diffusers.LCMScheduler, range(1, 9)),
    ],
)
def test_timesteps_are_those_of_the_schedulers_that_the_authors_use(kind: Kind, scheduler: type, counts) -> None:
    for count in counts:
        theirs = scheduler(**TRAILING)
        theirs.set_timesteps(count)
        assert FewStep("", kind, count).timesteps(count) == tuple(int(t) for t in theirs.timesteps)


def test_timesteps_that_only_the_authors_state() -> None:
    assert FewStep("", "hyper", 1).timesteps(1) == (800,)
    assert FewStep("", "dmd2", 1).timesteps(1) == (399,)
    assert FewStep("", "dmd2", 4).timesteps(4) == (999, 749, 499, 249)


LIGHTNING, HYPER = "ByteDance/SDXL-Lightning", "ByteDance/Hyper-SD"


@pytest.mark.parametrize(
    ("values", "kind", "steps", "guided"),
    [
        (
            {"id": LIGHTNING, "weight_name": "sdxl_lightning_8step_lora.safetensors"},
            "lightning",
            8,
            False,
        ),
        ({"id": HYPER, "weight_name": "Hyper-SDXL-1step-lora.safetensors"}, "hyper", 1, False),
        ({"id": HYPER, "weight_name": "Hyper-SDXL-12steps-CFG-lora.safetensors"}, "hyper", 12, True),
        (
            {"id": "latent-consistency/lcm-lora-sdxl", "weight_name": "pytorch_lora_weights.safetensors"},
            "lcm",
            4,
            False,
        ),
        ({"id": "tianweiy/DMD2", "weight_name": "dmd2_sdxl_4step_lora_fp16.safetensors"}, "dmd2", 4, False),
        ({"id": "stabilityai/sdxl-turbo", "subfolder": "unet"}, "turbo", 4, False),
        ({"id": "me/mine", "weight_name": "w.safetensors", "kind": "dmd2", "steps": 1}, "dmd2", 1, False),
    ],
    ids=str,
)
def test_published_weights_are_recognised_by_their_names(values: dict, kind: str, steps: int, guided: bool) -> None:
    found = few_step_of(FewStepConfig(**values))
    assert (found.kind, found.steps, found.guided) == (kind, steps, guided)
    assert found.sampling.kind == ("cfg" if guided else "none")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"id": "me/mine", "weight_name": "w.safetensors"}, "kind: auto cannot tell what me/mine/w.safetensors"),
        ({"id": "me/turbo-lcm"}, "kind: auto cannot tell"),
        (
            {"id": LIGHTNING, "weight_name": "sdxl_lightning_1step_unet_x0.safetensors"},
            "predict the image",
        ),
        ({"id": "tianweiy/DMD2", "steps": 3}, "steps: 3 for weights of kind dmd2, of which those of 1, 4 steps"),
    ],
    ids=str,
)
def test_names_that_say_too_little_or_what_cannot_be_used(values: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.few_step") as caught:
        few_step_of(FewStepConfig(**values))
    assert said in str(caught.value)


def test_a_loaded_model_has_the_path_and_the_sampling_of_its_weights(saved: Path, tmp_path: Path) -> None:
    weights = low_rank(unet_weights(saved), underscored=True)[0]
    base = load_models(model(saved, few(tmp_path, weights, steps=8))).base
    path = base.path(8, Timing(cells=256))
    assert [step.t for step in path] == [999, 874, 749, 624, 499, 374, 249, 124]
    assert (path[-1].alpha_next, path[-1].sigma_next) == (1.0, 0.0)
    assert [step.t for step in base.path(1, Timing(cells=256, timesteps=(249,)))] == [249]
    assert base.sampling == few_step_of(few(tmp_path, steps=8)).sampling
    plain = load_models(model(saved, None)).base
    assert [step.t for step in plain.path(2, Timing(cells=256))] == [501, 1]
    assert plain.sampling.kind == "cfg"


# ------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("underscored", [True, False])
def test_a_lora_is_added_to_the_layers_that_it_names(saved: Path, tmp_path: Path, underscored: bool) -> None:
    before = unet_weights(saved)
    tensors, added = low_rank(before, underscored)
    config = model(saved, few(tmp_path, tensors))
    few_step_files.check(config)
    after = load_models(config).base.denoiser.state_dict()
    for layer, change in added.items():
        torch.testing.assert_close(after[f"{layer}.weight"], before[f"{layer}.weight"] + change)
    others = before.keys() - {f"{layer}.weight" for layer in added}
    assert all(torch.equal(after[name], before[name]) for name in others)


def test_a_lora_goes_together_with_an_image_adapter(saved: Path, tmp_path: Path) -> None:
    tensors, added = low_rank(unet_weights(saved), underscored=True)
    adapter = {"id": str(saved), "subfolder": "ip_adapter", "weight_name": "ip-adapter.safetensors"}
    config = ModelConfig(id=str(saved), device="cpu", few_step=few(tmp_path, tensors), ip_adapter=adapter)
    base = load_models(config).base
    assert base.image_adapter() is not None
    layer, change = next(iter(added.items()))
    weight = base.denoiser.get_submodule(layer).weight
    torch.testing.assert_close(weight, unet_weights(saved)[f"{layer}.weight"] + change)


def spoilt(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    name = f"lora_unet_{next(iter(LAYERS)).replace('.', '_')}"
    made = dict(tensors)
    if how == "another layer":
        made["lora_unet_input_blocks_4_1_proj_in.lora_down.weight"] = torch.zeros(2, 32)
    elif how == "text":
        made["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.zeros(2, 32)
    elif how == "another part":
        made[f"{name}.dora_scale"] = torch.zeros(2)
    elif how == "half":
        del made[f"{name}.lora_up.weight"]
    elif how == "shape":
        made[f"{name}.lora_down.weight"] = torch.zeros(2, 31)
    elif how == "rank":
        made[f"{name}.lora_down.weight"] = torch.zeros(4, 32)
    return made


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("another layer", "lora_unet_input_blocks_4_1_proj_in.lora_down.weight of"),
        ("text", "belongs to no layer of the UNet of"),
        ("another part", "dora_scale of"),
        ("half", "lacks a matrix for the layer down_blocks.1"),
        ("shape", "the matrices 32 x 2 and 2 x 31 of"),
        ("rank", "the matrices 32 x 2 and 4 x 32 of"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_and_not_used_in_part(
    saved: Path, tmp_path: Path, how: str, said: str
) -> None:
    tensors = spoilt(low_rank(unet_weights(saved), underscored=True)[0], how)
    assert said in refused(model(saved, few(tmp_path, tensors)))


def changed(saved: Path) -> dict[str, torch.Tensor]:
    return {name: tensor + 0.01 for name, tensor in unet_weights(saved).items()}


def test_a_whole_unet_takes_the_place_of_the_base_models(saved: Path, tmp_path: Path) -> None:
    wanted = changed(saved)
    config = model(saved, few(tmp_path, wanted))
    few_step_files.check(config)
    models = load_models(config)
    found = models.base.denoiser.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not models.base.denoiser.training


def test_a_whole_unet_may_be_a_folder(saved: Path, tmp_path: Path) -> None:
    pipe = make_pipeline(seed=3)
    pipe.unet.save_pretrained(tmp_path / "turbo" / "unet")
    own = FewStepConfig(id=str(tmp_path / "turbo"), subfolder="unet", kind="turbo")
    few_step_files.check(model(saved, own))
    found = load_models(model(saved, own)).base.denoiser.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in pipe.unet.state_dict().items())


@pytest.mark.parametrize("whole", [True, False])
def test_unets_of_lcm_that_read_the_guidance_scale_are_refused(saved: Path, tmp_path: Path, whole: bool) -> None:
    values = diffusers.UNet2DConditionModel.load_config(saved / "unet")
    unet = diffusers.UNet2DConditionModel.from_config({**values, "time_cond_proj_dim": 8})
    folder = tmp_path / "lcm"
    unet.save_pretrained(folder)
    named = {} if whole else {"weight_name": "diffusion_pytorch_model.safetensors"}
    own = FewStepConfig(id=str(folder), kind="lcm", **named)
    assert "is a whole LCM UNet, which reads the guidance scale with the time" in refused(model(saved, own))


def test_other_unets_are_refused_by_the_headers_of_their_files(saved: Path, tmp_path: Path) -> None:
    weights = unet_weights(saved)
    single = {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}
    assert "is not the UNet of" in refused(model(saved, few(tmp_path / "a", single)))
    less = {name: tensor for name, tensor in weights.items() if name != "conv_in.bias"}
    assert "(it has no tensor conv_in.bias)" in refused(model(saved, few(tmp_path / "b", less)))
    wider = {**weights, "conv_in.bias": torch.zeros(17)}
    said = refused(model(saved, few(tmp_path / "c", wider)))
    assert "conv_in.bias of" in said
    assert "is 17, and 16 in" in said


def test_files_that_are_missing_pickled_or_damaged_are_named(saved: Path, tmp_path: Path) -> None:
    gone = FewStepConfig(id=str(saved), weight_name="lightning.safetensors")
    assert "has no file lightning.safetensors" in refused(model(saved, gone))
    pickled = FewStepConfig(id=str(saved), weight_name="lightning_unet.bin")
    assert "lightning_unet.bin is not a .safetensors file" in refused(model(saved, pickled))
    (tmp_path / "few.safetensors").write_bytes(b"nothing")
    assert "cannot be read as safetensors" in refused(model(saved, few(tmp_path)))
    elsewhere = FewStepConfig(id="owner/lightning", weight_name="few.safetensors")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        few_step_files.check(model(saved, elsewhere))


def test_weights_that_are_still_at_the_hub_stay_unchecked(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    own = {"id": "owner/lightning", "weight_name": "lightning_8step.safetensors"}
    config = dataset(saved, tmp_path, own, steps=8)
    assert "model.few_step: owner/lightning, which is not on this machine yet" in check(config).unchecked


def test_the_model_before_is_let_go_before_another_one_is_loaded(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two denoisers of gigabytes are never in memory together."""
    tensors = low_rank(unet_weights(saved), underscored=True)[0]
    before = weakref.ref(load_models(model(saved, None)).base.denoiser)
    assert before() is not None
    seen, original = [], few_step_files.load_unet
    monkeypatch.setattr(few_step_files, "load_unet", lambda *asked: seen.append(before()) or original(*asked))
    load_models(model(saved, few(tmp_path, tensors)))
    assert seen == [None]


# ------------------------------------------------------------------------------------------------- datasets


def dataset(saved: Path, tmp_path: Path, few_step: object, **upscale: object) -> DatasetConfig:
    own = few_step.model_dump() if isinstance(few_step, FewStepConfig) else few_step
    values = {"guidance_scale": 1, "stepper": "ddim_keep", "scale": 2, "image_prompt": {"enabled": False}, **upscale}
    return parse_config(
        {
            "name": "d",
            "root": str(tmp_path / "out"),
            "model": {"id": str(saved), "few_step": own, "device": "cpu"},
            "low_res": {"steps": 3},
            "captions": {"source": "prompt"},
            "quality": {"clip": None},
            "upscale": {"preset": "exact", **values},
        }
    )


def test_low_res_images_do_not_know_of_few_step_weights(saved: Path, tmp_path: Path) -> None:
    own = few(tmp_path, low_rank(unet_weights(saved), underscored=True)[0], steps=8)
    with_weights, without = (stage_hashes(dataset(saved, tmp_path, each, steps=8)) for each in (own, None))
    assert with_weights["low_res"] == without["low_res"]
    assert with_weights["captions"] == without["captions"]
    assert with_weights["high_res"] != without["high_res"]
    work = stage_work(dataset(saved, tmp_path, own, steps=8), 64, 64)
    assert sum(each.rows for each in work["low_res"]) == 2 * 3
    assert sum(each.rows for each in work["high_res"]) == 8 * 9


def test_other_bytes_of_a_lora_are_another_high_res_stage(saved: Path, tmp_path: Path) -> None:
    tensors = low_rank(unet_weights(saved), underscored=True)[0]
    hashes = []
    for factor in (1, 2):
        few(tmp_path, {name: factor * tensor for name, tensor in tensors.items()})
        hashes.append(stage_hashes(dataset(saved, tmp_path, few(tmp_path), steps=4))["high_res"])
    assert hashes[0] != hashes[1]


def test_an_image_takes_one_row_per_view_and_step_and_other_bytes_than_the_base_models(
    saved: Path, tmp_path: Path
) -> None:
    tensors = low_rank(unet_weights(saved), underscored=True)[0]
    values = {"steps": 8, "guidance_scale": 1, "stepper": "ddim_keep", "image_prompt": {"enabled": False}}
    config = settings("resmaster", preset="exact", init="noised_lr", start=0.5, view_batch=1, **values)
    made = []
    for own in (few(tmp_path, tensors, steps=8), None):
        models = load_models(model(saved, own))
        with counting() as counted:
            made.append(upscale_image(models, some_image(), "a cat", config=config).tobytes())
        assert counted.rows == sum(each.rows for each in high_res_work(config, denoising_of(model(saved, own)), 64, 64))
        assert counted.rows == 4 * 9
    assert made[0] != made[1]


@pytest.mark.parametrize(
    ("upscale", "said"),
    [
        ({"steps": 8, "guidance_scale": 7.5}, "upscale.guidance_scale: 7.5 has no effect on"),
        ({"steps": 50}, "upscale.steps: 50 are too many for"),
        ({"steps": 4}, "upscale.steps: 4 are not the 8 that"),
        ({"steps": 8, "stepper": "dpmpp_2m"}, "upscale.stepper: dpmpp_2m does not fit"),
    ],
    ids=str,
)
def test_sampling_that_does_not_fit_is_refused_by_the_plan_and_by_the_library(
    saved: Path, tmp_path: Path, upscale: dict, said: str
) -> None:
    own = few(tmp_path, low_rank(unet_weights(saved), underscored=True)[0], steps=8)
    config = dataset(saved, tmp_path, own, **upscale)
    good = (
        "set upscale.steps: 8, upscale.guidance_scale: 1 and upscale.stepper: ddim_keep, which are recommended for it"
    )
    with pytest.raises(ConfigError) as planning:
        check(config)
    with pytest.raises(ConfigError) as making:
        upscale_image(load_models(config.model), some_image(), "a cat", config=config.upscale)
    for caught in (planning, making):
        assert said in str(caught.value)
        assert str(caught.value).endswith(good)


def test_kinds_that_draw_noise_anew_take_no_other_stepper(saved: Path, tmp_path: Path) -> None:
    own = few(tmp_path, low_rank(unet_weights(saved), underscored=True)[0], kind="dmd2")
    with pytest.raises(ConfigError, match=r"ddim_keep does not fit .*upscale\.stepper: renoise"):
        check(dataset(saved, tmp_path, own, steps=4))
    assert check(dataset(saved, tmp_path, own, steps=4, stepper="renoise")).dataset is None


def test_pixelrush_takes_any_weights_for_its_own_steps(saved: Path, tmp_path: Path) -> None:
    own = few(tmp_path, low_rank(unet_weights(saved), underscored=True)[0], kind="dmd2")
    values = dataset(saved, tmp_path, own, steps=4, stepper="renoise").model_dump()
    config = parse_config({**values, "upscale": {"method": "pixelrush", "scale": 2}})
    assert not any("few-step" in note for note in check(config).notes)
    with counting() as counted:
        made = upscale_image(load_models(config.model), some_image(), "a cat", config=config.upscale)
    assert made.size == (128, 128)
    assert counted.calls >= 2


def test_hyper_sds_guided_loras_keep_guidance(saved: Path, tmp_path: Path) -> None:
    tensors = low_rank(unet_weights(saved), underscored=True)[0]
    folder = few(tmp_path, tensors).id
    (Path(folder) / "few.safetensors").rename(Path(folder) / "Hyper-SDXL-8steps-CFG-lora.safetensors")
    own = FewStepConfig(id=folder, weight_name="Hyper-SDXL-8steps-CFG-lora.safetensors")
    config = dataset(saved, tmp_path, own, steps=8, guidance_scale=5)
    assert check(config).dataset is None
    assert sum(each.rows for each in stage_work(config, 64, 64)["high_res"]) == 2 * 8 * 9


def test_the_plan_says_that_the_high_res_stage_reads_no_negative_prompts(saved: Path, tmp_path: Path) -> None:
    own = few(tmp_path, low_rank(unet_weights(saved), underscored=True)[0], steps=8)
    config = dataset(saved, tmp_path, own, steps=8, negative_prompt="blurry")
    (note,) = [each for each in notes_of(config) if "not read" in each]
    assert note == f"upscale.negative_prompt: not read, because model.few_step {own.id} has no unconditional branch"
    assert not [each for each in notes_of(dataset(saved, tmp_path, None, negative_prompt="x")) if "not read" in each]


def test_transformers_take_none(tmp_path: Path) -> None:
    make_flux().save_pretrained(tmp_path / "flux")
    config = ModelConfig(id=str(tmp_path / "flux"), device="cpu", few_step=FewStepConfig(id="x/lightning"))
    with pytest.raises(
        ConfigError, match=r"model.few_step: needs few step weights, which model .* has not; leave it out"
    ):
        load_models(config)


def test_the_licences_of_few_step_weights_are_told() -> None:
    def told(few_step: str, **upscale: object) -> list[str]:
        model = {"few_step": {"id": few_step}}
        config = parse_config({"name": "d", "model": model, "upscale": upscale})
        return [str(each.licence.name) for each in licences_of(config) if each.part == "few-step weights"]

    assert told("stabilityai/sdxl-turbo") == ["sai-nc-community"]
    assert told("tianweiy/DMD2") == ["cc-by-nc-4.0"]
    assert told("ByteDance/SDXL-Lightning") == told("latent-consistency/lcm-lora-sdxl") == ["openrail++"]
    assert told("ByteDance/Hyper-SD") == ["None"]
    assert told("tianweiy/DMD2", method="lanczos") == []
    values = {"name": "d", "model": {"few_step": {"id": "tianweiy/DMD2"}}}
    notes = list(notes_of(parse_config({**values, "upscale": {"guidance_scale": 1}})))
    assert any("few-step weights tianweiy/DMD2: cc-by-nc-4.0, which does not allow commercial use" in n for n in notes)


def test_an_identity_names_the_weights(saved: Path, tmp_path: Path) -> None:
    own = few(tmp_path, low_rank(unet_weights(saved), underscored=True)[0], steps=8)
    identity = load_models(model(saved, own)).identity
    assert "+few_step=few.safetensors@" in identity
    assert identity.partition("+")[0] == load_models(model(saved, None)).identity


def test_a_damaged_configuration_of_a_folder_is_one_line(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "unet", tmp_path / "turbo" / "unet").parent
    (folder / "unet" / "config.json").write_text(json.dumps([]))
    with pytest.raises(ConfigError, match=r"config.json is not a JSON object"):
        few_step_files.check(model(saved, FewStepConfig(id=str(folder), subfolder="unet")))


@pytest.mark.parametrize(("kind", "stepper"), [("lightning", "ddim_keep"), ("lcm", "renoise")])
def test_the_library_takes_the_sampling_of_loaded_weights(saved: Path, tmp_path: Path, kind: str, stepper: str) -> None:
    tensors = low_rank(unet_weights(saved), underscored=True)[0]
    models = load_models(model(saved, few(tmp_path, tensors, kind=kind, steps=4)))
    taken = library.single("tiny", "prompt", models)["upscale"]
    assert {name: taken[name] for name in ("steps", "guidance_scale", "stepper")} == {
        "steps": 4,
        "guidance_scale": 1.0,
        "stepper": stepper,
    }
    with counting() as counted:
        (low_res,) = rm.generate("a cat", model=models)
    assert counted.rows == 4
    assert rm.upscale(low_res, "a cat", model=models, scale=2).size == (128, 128)
    assert rm.upscale(low_res, "a cat", model=models, scale=2, method="pixelrush").size == (128, 128)


def test_a_process_makes_low_res_images_by_the_base_model_and_high_res_ones_by_the_weights(
    saved: Path, tmp_path: Path
) -> None:
    """Both stages in one process, one after the other."""
    own = few(tmp_path, low_rank(unet_weights(saved), underscored=True)[0], steps=8)
    config = dataset(saved, tmp_path, own, steps=8, init="noised_lr", start=0.5, text_prompt={"enabled": False})
    sample = Sample("k" * 32, 0, "a cat", "", 64, 64, 0)
    (small,) = (each.finished() for each in low_res.process(config, [sample]))
    (plain,) = (each.finished() for each in low_res.process(dataset(saved, tmp_path, None), [sample]))
    assert small.files == plain.files
    drawn = replace(sample, low_res=EncodedImage(small.files["webp"], "webp", {}))
    (large,) = (each.finished() for each in high_res.process(config, [drawn]))
    assert (small.error, large.error) == (None, None)
    names = [json.loads(each.files["json"])["model"] for each in (small, large)]
    assert "few_step" not in names[0]
    assert names[1] == f"{names[0]}+few_step={few_step_identity(own)}"


def test_the_packs_own_weights_need_only_their_name() -> None:
    """In the durable stages: a part of its own, so the base model keeps its identity."""
    own = FewStepConfig(id="picturebook")
    found = few_step_of(own)
    assert (found.kind, found.steps) == ("lightning", 8)
    config = ModelConfig(device="cpu", few_step=own)
    few_step_files.check(config)
    models = load_models(config)
    base, _, weights = models.identity.partition("+")
    assert base == model_identity(ModelConfig())
    assert weights.startswith("few_step=picturebook@")
    assert models.base.image_adapter() is not None
    size = (pack_folder() / "few_step" / "8-step-lora.safetensors").stat().st_size
    assert size < 1_550_000
    values = {"preset": "exact", "steps": 8, "guidance_scale": 1, "stepper": "ddim_keep"}
    dataset = parse_config({"name": "d", "model": {"few_step": {"id": "picturebook"}}, "upscale": values})
    told = {each.part: each.licence.name for each in licences_of(dataset)}
    assert told["few-step weights"] == "apache-2.0"
    assert not [note for note in check(dataset).notes if "few" in note]
