"""What only a CUDA device can show: its images are the CPU's, its compiled and 8-bit layers compute what the plain
ones do."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch._dynamo.utils import counters as dynamo_counters

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.methods.resmaster import ResMaster
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.metrics.agreement import psnr
from resmaster_stages.models.acceleration import compile_blocks, quantise_fp8
from resmaster_stages.models.load import load_models
from resmaster_stages.models.occupancy import occupy
from resmaster_stages.picturebook.training import train_vae
from resmaster_stages.picturebook.training.course import Budget
from resmaster_stages.picturebook.training.data import draw_photos

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = ResMaster(scale=2.0, steps=8, view_batch=9)


@pytest.fixture(scope="module")
def low_res() -> Image.Image:
    return Image.effect_noise((8, 8), 80).convert("RGB").resize((128, 128), Image.Resampling.BICUBIC)


def drawn(low_res: Image.Image, **model: Any) -> Image.Image:
    models = load_models(ModelConfig.model_validate({"compile": "off", "device": "cuda", **model}))
    return upscale_image(models, low_res, "a red house on a green meadow", config=CONFIG)


@pytest.mark.parametrize(("dtype", "least"), [("float32", 40), ("float16", 30), ("bfloat16", 24)])
def test_the_image_is_the_cpus(low_res: Image.Image, dtype: str, least: float) -> None:
    assert psnr(drawn(low_res, dtype=dtype), drawn(low_res, device="cpu", dtype="float32")) > least


@pytest.mark.parametrize("compiled", ["off", "blocks"])
def test_the_same_bytes_twice(low_res: Image.Image, compiled: str) -> None:
    assert drawn(low_res, compile=compiled).tobytes() == drawn(low_res, compile=compiled).tobytes()


def test_offloading_changes_no_byte(low_res: Image.Image) -> None:
    assert drawn(low_res, offload="model").tobytes() == drawn(low_res).tobytes()


@pytest.mark.parametrize("compiled", ["off", "blocks"])
def test_a_turn_of_another_model_changes_no_byte_and_compiles_nothing_anew(low_res: Image.Image, compiled: str) -> None:
    before, device = drawn(low_res, compile=compiled), torch.device("cuda")
    graphs = dynamo_counters["stats"]["unique_graphs"]
    occupy(device, other := nn.Linear(8, 8))
    denoiser = load_models(ModelConfig.model_validate({"compile": compiled, "device": "cuda"})).base.denoiser
    assert (denoiser.device.type, other.weight.device.type) == ("cpu", "cuda")
    assert drawn(low_res, compile=compiled).tobytes() == before.tobytes()
    assert (denoiser.device.type, other.weight.device.type) == ("cuda", "cpu")
    assert dynamo_counters["stats"]["unique_graphs"] == graphs


def test_compiled_blocks_compute_the_same() -> None:
    unet = load_models(ModelConfig(device="cuda", dtype="float32", compile="off")).base.denoiser
    compiled = copy.deepcopy(unet)
    compile_blocks(compiled)
    size = unet.config.sample_size
    added = {
        "text_embeds": torch.randn(2, unet.add_embedding.linear_1.in_features - 6 * 32, device="cuda"),
        "time_ids": torch.full((2, 6), 128.0, device="cuda"),
        "image_embeds": [torch.randn(2, 1, 128, device="cuda")],
    }
    text = torch.randn(2, 77, unet.config.cross_attention_dim, device="cuda")
    with torch.inference_mode():
        one, other = (
            each(torch.ones(2, 4, size, size, device="cuda"), 500, text, added_cond_kwargs=added).sample
            for each in (unet, compiled)
        )
    assert (one - other).norm() / one.norm() < 1e-2


def test_8_bit_layers_stay_near() -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(1280, 1280), torch.nn.GELU(), torch.nn.Linear(1280, 640)).cuda()
    plain.to(torch.bfloat16).requires_grad_(False)
    short = copy.deepcopy(plain)
    assert quantise_fp8(short) == 2
    x = torch.randn(256, 1280, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        one, other = plain(x), torch.compile(short)(x)
    assert 0 < (one - other).norm() / one.norm() < 0.1


def test_the_vae_trains(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    draw_photos(tmp_path / "photos", 16, 2, shard=8)
    draw_photos(tmp_path / "held-out", 8, 1, shard=8)
    budget = Budget(steps=6, warmup_steps=1, decay=0.1)
    train_vae.train(tmp_path, budget, train_vae.VaeRecipe(batch=4), device="cuda")
    assert all(value.isfinite().all() for value in train_vae.load(tmp_path).state_dict().values())
