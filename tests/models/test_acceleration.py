"""Compiled blocks and 8-bit layers, as far as they go without a GPU."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from resmaster_stages.config.load import parse_config
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.diffusion.loop import _kernels
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models import acceleration, load
from resmaster_stages.models.acceleration import (
    can_compile,
    changed_blocks_uncompiled,
    compile_blocks,
    compiled_blocks,
    require_fp8,
    takes_fp8,
)
from resmaster_stages.models.parts import Models
from resmaster_stages.progress import Note, listening
from tests.config.test_config import hashes
from tests.methods.common import difference, sdxl_shaped, settings, some_image
from tests.tiny_models import make_adapted_pipeline

CPU = torch.device("cpu")


class Notes:
    def __init__(self):
        self.lines = []

    def hear(self, event):
        if isinstance(event, Note):
            self.lines.append(event.line)


@pytest.fixture
def graphs(monkeypatch):
    """Blocks are compiled by a backend that runs the traced graph as it is: what is tested is what is traced, and
    when."""
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kwargs: compile_module(self, backend=backend, **kwargs))
    torch._dynamo.reset()
    yield traced
    torch._dynamo.reset()


@pytest.fixture
def models():
    return Models.from_pipeline(make_adapted_pipeline())


def draw(models, method, **values):
    return upscale_image(models, some_image(), "a cat", config=settings(method, **{"steps": 4, **values}), seed=1)


@pytest.mark.parametrize("method", ["resmaster", "multidiffusion", "scalecrafter", "demofusion"])
def test_compiled_blocks_draw_the_same_image_and_are_traced_once_per_shape(models, graphs, method):
    plain = draw(models, method)
    compile_blocks(models.base.denoiser)
    assert compiled_blocks(models.base.denoiser)
    assert difference(draw(models, method), plain) <= 1
    seen = len(graphs)
    assert seen > 0
    draw(models, method)
    assert len(graphs) == seen


@pytest.mark.parametrize("method", ["c_upscale", "freescale", "scalediff"])
def test_blocks_whose_layers_a_method_changes_run_as_they_are_and_one_line_says_so(models, graphs, method):
    plain, notes = draw(models, method), Notes()
    compile_blocks(models.base.denoiser)
    compiled = [block._compiled_call_impl for block in compiled_blocks(models.base.denoiser)]
    with listening(notes.hear):
        assert difference(draw(models, method), plain) <= 1
    assert graphs == []
    assert set(notes.lines) == {
        f"{len(compiled)} of the model's blocks run uncompiled: the method changes layers of theirs"
    }
    assert [block._compiled_call_impl for block in compiled_blocks(models.base.denoiser)] == compiled
    draw(models, "multidiffusion")
    assert graphs


def test_what_was_uncompiled_is_put_back_after_an_exception(models, graphs):
    compile_blocks(models.base.denoiser)
    block = compiled_blocks(models.base.denoiser)[0]
    block.attn1.forward = block.attn1.forward
    with pytest.raises(RuntimeError, match="boom"), changed_blocks_uncompiled(models.base.denoiser):  # noqa: PT012
        assert block._compiled_call_impl is None
        assert block not in compiled_blocks(models.base.denoiser)
        raise RuntimeError("boom")
    assert block in compiled_blocks(models.base.denoiser)


def test_a_machine_that_cannot_compile_says_so_and_goes_on(monkeypatch, models):
    def broken(function, **kwargs):
        def call(*args):
            raise RuntimeError("\nno C compiler found\nmore")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    notes = Notes()
    with listening(notes.hear):
        load._accelerate(models.base.denoiser, ModelConfig(compile="blocks"), CPU)
    assert compiled_blocks(models.base.denoiser) == []
    (line,) = notes.lines
    assert "no C compiler found" in line
    assert "set model.compile: off" in line
    assert "\n" not in line


def test_cpus_compile_nothing_unless_asked(monkeypatch, models):
    monkeypatch.setattr(load, "can_compile", lambda device: True)
    load._accelerate(models.base.denoiser, ModelConfig(), CPU)
    assert compiled_blocks(models.base.denoiser) == []
    load._accelerate(models.base.denoiser, ModelConfig(compile="off"), torch.device("cuda"))
    assert compiled_blocks(models.base.denoiser) == []
    load._accelerate(models.base.denoiser, ModelConfig(), torch.device("cuda"))
    assert len(compiled_blocks(models.base.denoiser)) == sum(
        type(module).__name__ == "BasicTransformerBlock" for module in models.base.denoiser.modules()
    )


@pytest.mark.slow
def test_this_machine_compiles_for_its_processor_or_says_why_not():
    notes = Notes()
    with listening(notes.hear):
        assert can_compile(CPU) != bool(notes.lines)


def test_eight_bits_are_for_wide_linear_layers_of_the_blocks_alone():
    unet = sdxl_shaped((64, 640, 1280))
    chosen = {name for name, module in unet.named_modules() if takes_fp8(module, name)}
    assert chosen
    assert all(isinstance(unet.get_submodule(name), nn.Linear) for name in chosen)
    assert {name.rsplit(".", 1)[-1] for name in chosen} == {
        "to_q",
        "to_k",
        "to_v",
        "0",
        "2",
        "proj",
        "proj_in",
        "proj_out",
    }
    assert not any("attn2.to_k" in name or "attn2.to_v" in name or "emb" in name for name in chosen)
    narrow = nn.Linear(320, 1280), nn.Linear(1280, 648)
    assert not any(takes_fp8(layer, "blocks.ff") for layer in narrow)
    assert takes_fp8(narrow[0], "blocks.ff", least_width=320)


def test_eight_bits_are_refused_where_they_cannot_run_or_do_not_pay(monkeypatch):
    with pytest.raises(
        ConfigError, match=r"needs a CUDA device of compute capability 8\.9.*cpu.*set model\.quantise: none"
    ):
        require_fp8(CPU, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"8\.9"):
        require_fp8(torch.device("cuda"), True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ConfigError, match=r"unless it is compiled; set model\.compile: blocks"):
        require_fp8(torch.device("cuda"), False)
    monkeypatch.setattr(acceleration.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"resmaster-pipeline\[fp8\]"):
        require_fp8(torch.device("cuda"), True)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        load.load_models.__wrapped__(ModelConfig(device="cpu", quantise="fp8"))


def test_only_what_changes_results_changes_identities():
    base = {"name": "d", "prompts": "p.txt"}
    plain = hashes(parse_config(base))
    for model in ({"compile": "blocks"}, {"exactness": "fast"}, {"compile": "off"}):
        assert hashes(parse_config({**base, "model": model})) == plain
    assert hashes(parse_config({**base, "model": {"quantise": "fp8"}}))["low_res"] != plain["low_res"]
    assert "quantise" not in json.dumps(ModelConfig().identity())


@pytest.mark.parametrize("same_bytes", [True, False])
def test_kernels_are_chosen_by_rule_or_by_race_and_the_choice_is_put_back(same_bytes):
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    with pytest.raises(RuntimeError, match="boom"), _kernels(same_bytes):  # noqa: PT012
        assert (cudnn.benchmark, cudnn.deterministic) == (not same_bytes, same_bytes)
        raise RuntimeError("boom")
    assert (cudnn.benchmark, cudnn.deterministic) == before


def test_the_images_of_both_exactnesses_are_one_on_a_cpu():
    images = [
        draw(load.replace(Models.from_pipeline(make_adapted_pipeline()), same_bytes=same), "resmaster")
        for same in (True, False)
    ]
    assert np.array_equal(*map(np.asarray, images))
