"""The training of the few-step LoRA: DDIM's algebra, targets that are the teacher's, resuming, and a file that the
high_res stage reads."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from torch import Tensor

from resmaster_stages.config.model import FewStepConfig, ModelConfig
from resmaster_stages.models.bases.few_step_files import fuse_lora
from resmaster_stages.picturebook.training import data, train_few_step, train_unet
from resmaster_stages.picturebook.training.course import Budget
from resmaster_stages.picturebook.training.train_few_step import Batch, FewRecipe, Teacher, Walk, path_times
from tests.tiny_models import make_pipeline

RECIPE = FewRecipe(batch=2, rank=1)
BUDGET = Budget(steps=2, warmup_steps=1, decay=0.01)


def a_batch(index: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(len(index), *shape, generator=generator)

    return Batch(draw(4, 8, 8), torch.tensor(index), draw(77, 32), draw(16), torch.full((len(index), 6), 64))


class Says:
    """A UNet that says the same of every latent: its text."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[int], int]] = []

    def __call__(self, z: Tensor, times: Tensor, context: Tensor, added_cond_kwargs: dict[str, Tensor]) -> Any:
        self.seen.append((times.tolist(), len(z)))
        return SimpleNamespace(sample=context.mean((1, 2))[:, None, None, None].expand_as(z))


def test_a_step_is_that_of_diffusers() -> None:
    scheduler = DDIMScheduler(**train_unet.SCHEDULE, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(8)
    times, walk = path_times(8), Walk()
    assert times[:-1].tolist() == scheduler.timesteps.tolist()
    z, noise = torch.randn(2, 1, 4, 8, 8).unbind()
    for now, after in pairwise(times):
        theirs = scheduler.step(noise, int(now), z).prev_sample
        torch.testing.assert_close(walk.step(z, noise, now[None], after[None]), theirs, atol=1e-4, rtol=1e-4)


def test_the_student_lands_where_its_target_says() -> None:
    walk, times = Walk(), path_times(4)
    now, after = times[[0, 1, 3]], times[[1, 2, 4]]
    z, end = torch.randn(2, 3, 4, 8, 8).unbind()
    clean = walk.landed(z, end, now, after)
    alpha, sigma = walk.levels(now)
    landed = walk.step(z, (z - alpha * clean) / sigma, now, after)
    torch.testing.assert_close(landed, end, atol=1e-3, rtol=1e-3)


def test_the_teacher_takes_two_guided_steps_between_two_of_the_students() -> None:
    batch, says, walk = a_batch([0, 3]), Says(), Walk()
    end = Teacher(says, 4.0).end(batch, 4)  # type: ignore[arg-type]
    assert says.seen == [([999, 249, 999, 249], 4), ([874, 124, 874, 124], 4)]
    noise = (4.0 * batch.context.mean((1, 2)))[:, None, None, None].expand_as(batch.z)
    steps = (torch.tensor([999, 249]), torch.tensor([874, 124]), torch.tensor([749, -1]))
    wanted = walk.step(walk.step(batch.z, noise, *steps[:2]), noise, *steps[1:])
    torch.testing.assert_close(end, wanted, atol=2e-2, rtol=2e-2)  # the text is rounded to bfloat16
    Teacher(says, 1.0).end(batch, 4)  # type: ignore[arg-type]
    assert says.seen[2:] == [([999, 249], 2), ([874, 124], 2)]


def test_a_fresh_lora_changes_nothing_and_a_fused_one_is_part_of_the_weights() -> None:
    unet, plain = make_pipeline().unet, make_pipeline().unet
    layers = sum(isinstance(each, torch.nn.Linear | torch.nn.Conv2d) for each in unet.modules())
    lora = train_few_step.attach_lora(unet, 2)
    assert len(lora) == layers
    assert all(torch.equal(unet.get_submodule(name).weight, weight) for name, weight in plain_of(plain))
    for value in lora.parameters():
        torch.nn.init.normal_(value, std=0.1)
    changed = {name: unet.get_submodule(name).weight.detach().clone() for name, _ in plain_of(plain)}
    train_few_step.fuse(unet)
    after = unet.state_dict()
    assert after.keys() == plain.state_dict().keys()
    assert all(torch.equal(after[f"{name}.weight"], weight) for name, weight in changed.items())


def plain_of(unet: Any) -> list[tuple[str, Tensor]]:
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return [(name, each.weight) for name, each in unet.named_modules() if isinstance(each, kinds)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, of two steps each, on a few photos."""
    folder = tmp_path_factory.mktemp("few")
    data.draw_photos(folder / "photos", 16, 1, shard=16)
    for steps in train_few_step.STAGES:
        train_few_step.train(folder, steps, BUDGET, RECIPE)
    return folder


def test_an_interrupted_training_ends_with_the_bytes_of_one_that_was_not(work: Path) -> None:
    whole = train_few_step.load(work, 8)
    train_few_step.checkpoint_of(work, 8).rename(work / "whole.pt")
    for steps in (1, 2):
        train_few_step.train(work, 8, Budget(steps=steps, warmup_steps=1, decay=0.01), RECIPE)
    again = train_few_step.load(work, 8)
    (work / "whole.pt").rename(train_few_step.checkpoint_of(work, 8))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert any(value.abs().max() > 0 for name, value in whole.items() if name.endswith("up"))


def test_four_steps_start_from_eight_and_are_taught_by_them(work: Path) -> None:
    eight, four = train_few_step.load(work, 8), train_few_step.load(work, 4)
    apart = [float((eight[name] - four[name]).abs().max()) for name in eight]
    assert 0 < max(apart) < 0.1
    unet = train_few_step.unet_of(train_few_step.PACK)
    teacher, _ = train_few_step.prepare(work, 4, unet, RECIPE)
    assert teacher.guidance == 1.0
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    own = eight[f"{layer.replace('.', '/')}.up"] @ eight[f"{layer.replace('.', '/')}.down"]
    base = train_few_step.unet_of(train_few_step.PACK).get_submodule(layer).weight
    torch.testing.assert_close(teacher.unet.get_submodule(layer).weight, base + own)


def test_the_first_step_starts_from_noise_and_the_others_from_photos() -> None:
    latents = torch.full((8, 4, 8, 8), 3.0)
    read = {"context": torch.ones(8, 77, 32), "vector": torch.ones(8, 16), "time_ids": torch.ones(8, 6)}
    cache: Any = SimpleNamespace(latents=latents, ids=range(8), **read)
    torch.manual_seed(0)
    batch = train_few_step.draw_batch(cache, FewRecipe(batch=8, text_dropped=1.0), 4, Random(0))
    assert sorted(batch.index.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    means = batch.z.mean((1, 2, 3))
    assert means[batch.index == 0].abs().max() < 0.3
    assert means[batch.index == 3].min() > 2.0
    assert batch.context.abs().max() == batch.vector.abs().max() == 0


def test_the_exported_file_is_read_by_the_high_res_stage(work: Path, tmp_path: Path) -> None:
    size = train_few_step.export(work, 4, tmp_path / "few.safetensors")
    assert size == (tmp_path / "few.safetensors").stat().st_size
    assert {value.dtype for value in load_file(tmp_path / "few.safetensors").values()} == {torch.float16}
    unet = train_few_step.unet_of(train_few_step.PACK)
    own = FewStepConfig(id=str(tmp_path), weight_name="few.safetensors", kind="lightning")
    fuse_lora(unet, ModelConfig(few_step=own))
    trained = train_few_step.unet_of(train_few_step.PACK)
    train_few_step.attach_lora(trained, RECIPE.rank).load_state_dict(train_few_step.load(work, 4))
    train_few_step.fuse(trained)
    wanted = trained.state_dict()
    for name, found in unet.state_dict().items():
        torch.testing.assert_close(found, wanted[name], atol=1e-4, rtol=1e-3)
