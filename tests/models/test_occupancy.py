"""The base model and the captioner take turns on a device, from the first stage to the last.

Here the device is the CPU, which is told to have memory of its own: what moves there and back is written down.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, GitForCausalLM

from resmaster_stages import captions, high_res, low_res
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset.sample import EncodedImage, Output, Sample
from resmaster_stages.errors import ConfigError, SampleError
from resmaster_stages.models import captioner, load, occupancy
from resmaster_stages.models.captioner import LocalCaptioner, ServerCaptioner
from resmaster_stages.models.occupancy import occupy
from resmaster_stages.models.parts import Models
from tests.tiny_models import make_pipeline

DEVICE = torch.device("cpu", 0)
UPSCALE = {"steps": 1, "scale": 2, "via": [1.25, 1.5], "micro_conditioning": "native", "preset": "exact"}
FEW_STEPS: dict[str, Any] = {
    "model": {"few_step": {"id": "picturebook"}},
    "upscale": {"steps": 8, "guidance_scale": 1, "stepper": "ddim_keep", "scale": 2, "init": "noised_lr", "start": 0.9},
}


def configured(device: str, **values: Any) -> DatasetConfig:
    model = {"device": device, **values.pop("model", {})}
    quick: dict[str, Any] = {"low_res": {"steps": 1}, "captions": {"max_new_tokens": 4, "min_detail": 0}}
    return parse_config({"name": "d", "image_format": "png", "upscale": UPSCALE, "model": model, **quick, **values})


SAMPLES = [Sample(f"{n:024x}", n, "a red house", "", 128, 128, 0) for n in range(3)]


def built(config: DatasetConfig) -> list[Output]:
    """The high-res images of `SAMPLES`, after the stages before, in this process."""
    samples = SAMPLES
    for stage in (low_res, captions, high_res):
        outputs = [output.finished() for output in stage.process(config, samples)]
        samples = [following(*pair) for pair in zip(samples, outputs)]
    return outputs


def following(sample: Sample, output: Output) -> Sample:
    """What the next stage sees of a sample."""
    if output.error or "png" not in output.files:
        return Sample(**{**vars(sample), "captions": tuple(output.rows)})
    return Sample(**{**vars(sample), "low_res": EncodedImage(output.files["png"], "png", {})})


@dataclass
class Diary:
    """What came to the device and left it."""

    there: set[nn.Module] = field(default_factory=set)
    moves: list[tuple[str, str]] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    too_large: str = ""
    """The class that does not fit."""

    def moved(self, module: nn.Module, place: str) -> None:
        (self.there.discard if place == "cpu" else self.there.add)(module)
        self.moves.append((type(module).__name__, place))
        names = {type(each).__name__ for each in self.there}
        assert "GitForCausalLM" not in names or len(names) == 1, names
        if place == "device" and type(module).__name__ == self.too_large:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def turns(self) -> list[str]:
        """Whose UNet or captioner came, in order."""
        return [name[:3] for name, place in self.moves if place == "device" and name[:3] in ("UNe", "Git")]


@pytest.fixture
def diary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Diary]:
    diary, to, load_pipeline = Diary(), nn.Module.to, load.load_pipeline
    from_pretrained = AutoModelForImageTextToText.from_pretrained
    unet, generate = UNet2DConditionModel.forward, GitForCausalLM.generate

    def moving(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if args and isinstance(args[0], str | torch.device):
            assert not torch.is_inference_mode_enabled()
            diary.moved(self, "cpu" if args[0] == "cpu" else "device")
        return to(self, *args, **kwargs)

    def watched(work: Any) -> Any:
        def at_work(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            assert self in diary.there
            return work(self, *args, **kwargs)

        return at_work

    def loading(what: str, call: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            diary.loaded.append(what)
            return call(*args, **kwargs)

        return counted

    monkeypatch.setattr(occupancy, "has_own_memory", lambda device: True)
    monkeypatch.setattr(nn.Module, "to", moving)
    monkeypatch.setattr(UNet2DConditionModel, "forward", watched(unet))
    monkeypatch.setattr(GitForCausalLM, "generate", watched(generate))
    monkeypatch.setattr(load, "load_pipeline", loading("base", load_pipeline))
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", loading("captioner", from_pretrained))
    for cache in (load.load_models, captioner._load_local):
        cache.cache_clear()
    yield diary
    for cache in (load.load_models, captioner._load_local):
        cache.cache_clear()
    occupancy._there.clear()


@pytest.fixture(scope="module")
def without_moving() -> list[Output]:
    """What the stages make where nothing moves."""
    return built(configured("cpu"))


@pytest.fixture(scope="module")
def few_steps_without_moving() -> list[Output]:
    """The same with few-step weights."""
    outputs = built(configured("cpu", **FEW_STEPS))
    assert load.load_models.cache_info().currsize == 1, "one model at a time, where they would share the memory"
    return outputs


def test_they_take_turns_through_all_stages_and_passes_and_are_loaded_once(
    diary: Diary, without_moving: list[Output]
) -> None:
    outputs = built(configured("cpu:0"))
    assert [output.files["png"] for output in outputs] == [output.files["png"] for output in without_moving]
    assert diary.loaded == ["base", "captioner"]
    stages, passes = ["UNe", "Git"], ["UNe", "Git", "UNe", "Git"]  # a sample's last pass is followed by a first one
    assert diary.turns() == [*stages, *passes * len(SAMPLES), "UNe"]


def test_a_base_model_waits_for_its_few_step_weights_and_is_loaded_once_for_all_shards(
    few_steps_without_moving: list[Output], diary: Diary
) -> None:
    for _ in range(2):  # shards
        outputs = built(configured("cpu:0", **FEW_STEPS))
        assert [output.files["png"] for output in outputs] == [
            output.files["png"] for output in few_steps_without_moving
        ]
    assert diary.loaded == ["base", "captioner", "base"]
    load.load_models(configured("cpu:0", model={"dtype": "bfloat16"}).model)
    assert load.load_models.cache_info().currsize == 1


def test_on_a_cpu_nothing_moves(monkeypatch: pytest.MonkeyPatch, without_moving: list[Output]) -> None:
    for models in (load.load_models(configured("cpu").model), load.load_models(configured("cpu:0").model)):
        for part in models.parts:
            monkeypatch.setattr(part, "to", lambda *args: pytest.fail("it was moved"))
        models.come()
    assert not occupancy._there


def test_offloaded_parts_and_the_captioner_are_never_there_together(diary: Diary) -> None:
    config = configured("cpu:0")
    models = load.replace(load.load_models(config.model), offload="model")
    diary.moves.clear()
    occupy(DEVICE)
    writer = captioner.load_captioner(config.captions, config.model.device)
    with models.using(models.base.vae):
        assert diary.there == {models.base.vae}
    assert isinstance(writer, LocalCaptioner)
    writer.caption([Image.new("RGB", (32, 32), "red")])
    assert diary.turns() == ["Git", "Git"]


def test_a_captioner_that_fails_costs_its_sample_and_the_base_model_comes_back(
    diary: Diary, monkeypatch: pytest.MonkeyPatch, without_moving: list[Output]
) -> None:
    config, calls, generate = configured("cpu:0"), [], GitForCausalLM.generate

    def sometimes(self: Any, **inputs: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == len(SAMPLES) + 1:  # the first sample's second pass
            raise SampleError("nothing to say")
        return generate(self, **inputs)

    monkeypatch.setattr(GitForCausalLM, "generate", sometimes)
    first, *others = built(config)
    assert str(first.error) == "nothing to say"
    assert [output.files["png"] for output in others] == [output.files["png"] for output in without_moving[1:]]
    assert diary.loaded == ["base", "captioner"]


def test_a_captioner_on_a_server_leaves_the_base_model_in_its_place(
    diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(self: ServerCaptioner, images: Sequence[Any]) -> list[str]:
        return ["a house"] * len(images)

    monkeypatch.setattr(ServerCaptioner, "caption", answers)
    server = {"source": "server", "base_url": "http://127.0.0.1:1", "model": "m", "check": {"enabled": False}}
    assert all(output.error is None for output in built(configured("cpu:0", captions=server)))
    assert "cpu" not in dict(diary.moves).values()


def test_a_users_pipeline_stays_where_it_is(diary: Diary) -> None:
    pipe = make_pipeline()
    occupy(DEVICE, kept := nn.Linear(1, 1))
    models = Models.from_pipeline(pipe)
    diary.moves.clear()
    with models.using(models.base.vae):
        pass
    occupy(DEVICE, nn.Linear(1, 1))
    assert diary.moves == [("Linear", "cpu"), ("Linear", "device")]
    assert kept not in diary.there


def test_who_does_not_fit_is_not_there_in_part_and_others_may_come(diary: Diary) -> None:
    small, heavy, other = nn.Linear(1, 1), nn.Tanh(), nn.ReLU()
    diary.too_large = "Tanh"
    occupy(DEVICE, other)
    with pytest.raises(RuntimeError, match="out of memory"):
        occupy(DEVICE, small, heavy)
    assert not diary.there
    occupy(DEVICE, other)
    assert diary.there == {other}


def test_a_base_model_that_does_not_fit_says_what_to_set(diary: Diary) -> None:
    diary.too_large = "AutoencoderKL"
    with pytest.raises(ConfigError, match=r"does not fit; set model\.offload: model"):
        load.load_models(configured("cpu:0").model)
    assert not diary.there


def test_what_nobody_keeps_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(occupancy, "has_own_memory", lambda device: True)
    occupy(DEVICE, nn.Linear(1, 1))
    assert not occupancy._there.pop(("cpu", 0))
