"""Train the few-step LoRA of picturebook's UNet, taught by the UNet itself: eight guided steps in one row each, then
four.

`python -m resmaster_stages.picturebook.training.train_few_step --work train_few`. Every stage halves the steps
(progressive distillation, arXiv:2202.00512 and 2210.03142): the first teacher is the pack's UNet with guidance in twice
eight DDIM steps, and the second is the LoRA of eight steps. The student's one step, in one row and without guidance,
must land where two steps of its teacher land. Times are trailing: the only ones that the LoRA knows.

A LoRA here is a product of two thin matrices for every linear layer and convolution. The IP-Adapter takes no part.
Photos and texts come from the caches of `train_flow`.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from resmaster_stages.models.schedule import timesteps
from resmaster_stages.picturebook.training import data, train_flow, train_unet
from resmaster_stages.picturebook.training.course import (
    Budget,
    Course,
    Ema,
    Team,
    attention,
    descend,
    optimiser,
    parameters_m,
    set_rate,
)
from resmaster_stages.picturebook.training.export import PACK

STAGES = (8, 4)
"""Steps of the students, in the order of training: each but the first halves the one before."""
RECIPE = Budget(seconds=6000, decay=0.4, decay_seconds_on_stop=300)
"""How long each stage trains: wall-clock seconds, on a CPU core of its own."""


@dataclass(frozen=True)
class FewRecipe:
    """How a stage is trained."""

    rank: int = 6
    batch: int = 32
    rate: float = 2e-3
    ema: float = 0.998
    guidance: float = 4.0
    """Of the first teacher, folded into the student."""
    text_dropped: float = 0.05
    """Share of the samples without text."""
    max_weight: float = 5.0
    """The error of the clean image weighs as much as the signal-to-noise ratio, between one and this."""


class LowRank(nn.Module):
    """A weight plus a product of two thin matrices, which starts as zero: a LoRA layer of alpha = rank."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows = weight.reshape(len(weight), -1)
        self.down = nn.Parameter(torch.randn(rank, rows.shape[1]) / rows.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def attach_lora(unet: UNet2DConditionModel, rank: int) -> nn.ModuleDict:
    """Give every linear layer and convolution a LoRA, and freeze the rest. Returns the LoRA's layers under the names of
    theirs, with `/` for dots."""
    unet.requires_grad_(False)
    layers = [(n, m) for n, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    found = nn.ModuleDict()
    for name, layer in layers:
        found[name.replace(".", "/")] = low_rank = LowRank(layer.weight, rank)
        parametrize.register_parametrization(layer, "weight", low_rank)
    return found


def fuse(unet: UNet2DConditionModel) -> None:
    """Make an attached LoRA part of the weights."""
    for module in list(unet.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")


def path_times(steps: int) -> Tensor:
    """The times of so many trailing steps, falling, with -1 (clean) at the end: [steps + 1]."""
    return torch.tensor([*timesteps(steps, 1000, "trailing", 0), -1])


@dataclass(frozen=True)
class Batch:
    """Latents z [N, C, h, w] at step `index` [N] of the student, and the text and sizes that the UNet reads."""

    z: Tensor
    index: Tensor
    context: Tensor
    vector: Tensor
    time_ids: Tensor


class Walk:
    """DDIM on SDXL's schedule."""

    def __init__(self) -> None:
        squared = DDPMScheduler(**train_unet.SCHEDULE).alphas_cumprod
        self.squared = torch.cat([squared, torch.ones(1)])  # [-1]: clean

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at times [N]: [N, 1, 1, 1] each."""
        squared = self.squared[times][:, None, None, None]
        return squared.sqrt(), (1 - squared).sqrt()

    def clean(self, z: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The clean latents that a predicted noise says."""
        alpha, sigma = self.levels(times)
        return (z - sigma * noise) / alpha

    def step(self, z: Tensor, noise: Tensor, times: Tensor, after: Tensor) -> Tensor:
        """One DDIM step."""
        alpha, sigma = self.levels(after)
        return alpha * self.clean(z, noise, times) + sigma * noise

    def landed(self, z: Tensor, end: Tensor, times: Tensor, after: Tensor) -> Tensor:
        """The clean latents for which one step from z lands at `end`."""
        (alpha, sigma), (alpha_after, sigma_after) = self.levels(times), self.levels(after)
        kept = sigma_after / sigma
        return (end - kept * z) / (alpha_after - kept * alpha)


def draw_batch(cache: train_flow.Cache, recipe: FewRecipe, steps: int, rng: Random) -> Batch:
    """The photos, texts and noise of one training step; the first step of a path starts from noise alone."""
    n = recipe.batch
    pick = torch.tensor(rng.sample(range(len(cache.ids)), n))
    index = (torch.randperm(n) * steps) // n
    keep = torch.tensor([float(rng.random() >= recipe.text_dropped) for _ in range(n)])
    noise = torch.randn(cache.latents[pick].shape)
    alpha, sigma = Walk().levels(path_times(steps)[index])
    noised = alpha * cache.latents[pick].float() + sigma * noise
    return Batch(
        z=torch.where((index == 0)[:, None, None, None], noise, noised),
        index=index,
        context=cache.context[pick].float() * keep[:, None, None],
        vector=cache.vector[pick].float() * keep[:, None],
        time_ids=cache.time_ids[pick],
    )


def said_noise(unet: UNet2DConditionModel, batch: Batch, z: Tensor, times: Tensor, guidance: float) -> Tensor:
    """The noise that a UNet says in z at `times` [N], guided by zeros unless guidance is 1."""
    branches = 1 if guidance == 1 else 2

    def rows(values: Tensor) -> Tensor:
        return values if branches == 1 else torch.cat([values, torch.zeros_like(values)])

    added = {"text_embeds": rows(batch.vector), "time_ids": batch.time_ids.repeat(branches, 1)}
    with torch.autocast(z.device.type, torch.bfloat16):
        noisy, at = z.repeat(branches, 1, 1, 1), times.repeat(branches)
        noise: Tensor = unet(noisy, at, rows(batch.context), added_cond_kwargs=added).sample.float()
    if branches == 2:
        with_text, without = noise.chunk(2)
        noise = without + guidance * (with_text - without)
    return noise


@dataclass(frozen=True)
class Teacher:
    """A UNet that walks in twice the student's steps."""

    unet: UNet2DConditionModel
    guidance: float

    @torch.no_grad()
    def end(self, batch: Batch, steps: int) -> Tensor:
        """Where its two steps land that begin at a student's step of each sample."""
        times, walk, z = path_times(2 * steps), Walk(), batch.z
        for half in (0, 1):
            now, after = times[2 * batch.index + half], times[2 * batch.index + half + 1]
            z = walk.step(z, said_noise(self.unet, batch, z, now, self.guidance), now, after)
        return z


def few_loss(student: UNet2DConditionModel, teacher: Teacher, batch: Batch, steps: int, max_weight: float) -> Tensor:
    """The weighted error of the student's clean latents against those that land where the teacher lands."""
    walk, times = Walk(), path_times(steps)
    now, after = times[batch.index], times[batch.index + 1]
    wanted = walk.landed(batch.z, teacher.end(batch, steps), now, after)
    clean = walk.clean(batch.z, said_noise(student, batch, batch.z, now, 1.0), now)
    alpha, sigma = walk.levels(now)
    weight = (alpha / sigma).square().clamp(1.0, max_weight)
    return (weight * (clean - wanted).square()).mean()


def checkpoint_of(work: Path, steps: int) -> Path:
    """Where the stage of so many steps is kept."""
    return work / f"few-{steps}.pt"


def load(work: Path, steps: int) -> dict[str, Tensor]:
    """The LoRA of a stage's last checkpoint, its moving average."""
    state: dict[str, Any] = torch.load(checkpoint_of(work, steps), map_location="cpu", weights_only=True)
    found: dict[str, Tensor] = state["ema"]
    return found


def unet_of(pack_folder: Path) -> UNet2DConditionModel:
    """The pack's UNet, without IP-Adapter."""
    return UNet2DConditionModel.from_pretrained(pack_folder, subfolder="unet", local_files_only=True).float()


def prepare(work: Path, steps: int, unet: UNet2DConditionModel, recipe: FewRecipe) -> tuple[Teacher, nn.ModuleDict]:
    """The teacher of a stage, and the LoRA of its student, which `unet` becomes; it starts as the teacher's."""
    before = 2 * steps
    if before not in STAGES:
        return Teacher(deepcopy(unet), recipe.guidance), attach_lora(unet, recipe.rank)
    known = load(work, before)
    taught = deepcopy(unet)
    attach_lora(taught, recipe.rank).load_state_dict(known)
    fuse(taught)
    lora = attach_lora(unet, recipe.rank)
    lora.load_state_dict(known)
    return Teacher(taught, 1.0), lora


def train(
    work: Path,
    steps: int,
    budget: Budget,
    recipe: FewRecipe | None = None,
    pack_folder: Path = PACK,
    compiled: bool = False,
) -> None:
    """Train one stage until its budget is spent, or decay early once `work`/STOP-FEW exists; checkpoint in
    `work`/few-STEPS.pt. A larger budget later goes on from there. Randomness depends on the step only, so with a budget
    of steps an interrupted training ends with the bytes of one that was not."""
    recipe = recipe or FewRecipe()
    train_flow.seed_work(work, pack_folder)
    painter, scaling = train_flow.load_teacher(pack_folder)
    cache = train_flow.make_cache(work, painter, scaling)
    course = Course(budget, checkpoint_of(work, steps), work / "STOP-FEW")
    state = course.resume("lora", "ema", "optim")
    torch.manual_seed(11)
    student = unet_of(pack_folder)
    teacher, lora = prepare(work, steps, student, recipe)
    optim, ema = optimiser([lora], recipe.rate), Ema(lora, recipe.ema)
    if state:
        lora.load_state_dict(state["lora"])
        optim.load_state_dict(state["optim"])
        ema.shadow = state["ema"]
    if compiled:
        student.compile(dynamic=False)
        teacher.unet.compile(dynamic=False)
    print(f"few {steps}: {parameters_m(lora):.3f} M, {len(cache.ids)} photos, from step {course.step}", flush=True)
    running, going = 0.0, True
    course.start()
    while going:
        torch.manual_seed(4000 + course.step)
        set_rate(optim, recipe.rate * course.rate())
        batch = draw_batch(cache, recipe, steps, Random(4000 + course.step))
        with attention("cpu"):
            loss = few_loss(student, teacher, batch, steps, recipe.max_weight)
            loss.backward()
        descend(Team(), lora, [optim])
        going = course.advance()
        ema.update(lora, course.step)
        running = loss.item() if running == 0 else 0.98 * running + 0.02 * loss.item()
        if course.step % 25 == 0:
            shown = f"loss {running:.4f} rate {course.rate():.2f} {course.elapsed:.0f} s"
            print(f"few {steps}: step {course.step} {shown}", flush=True)
        if course.due() or not going:
            course.save({"lora": lora.state_dict(), "ema": ema.shadow, "optim": optim.state_dict()})


def export(work: Path, steps: int, target: Path) -> int:
    """Write the LoRA of a stage, fp16, under the names that diffusers gives LoRAs. Returns its size in bytes."""
    weights = {}
    for key, value in load(work, steps).items():
        name, _, part = key.rpartition(".")
        which = {"down": "lora_A", "up": "lora_B"}[part]
        weights[f"unet.{name.replace('/', '.')}.{which}.weight"] = value.half().contiguous()
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, target)
    return target.stat().st_size


def main() -> None:
    """Train the stages; with more seconds or steps than before, go on where they ended."""
    parser = argparse.ArgumentParser(
        prog="python -m resmaster_stages.picturebook.training.train_few_step", description=__doc__
    )
    parser.add_argument("--work", type=Path, default=Path("train_few"), help="photos, caches and checkpoints")
    parser.add_argument("--pack", type=Path, default=PACK, help="the pack whose UNet teaches")
    parser.add_argument("--photos", type=int, default=24_000)
    parser.add_argument("--processes", type=int, default=2, help="for drawing photos")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument("--seconds", type=float, default=RECIPE.seconds, help="of each stage's training, over all runs")
    parser.add_argument("--steps", type=int, default=None, help="of each stage's training, instead of seconds")
    parser.add_argument("--stages", type=int, nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--to", type=Path, help="write the last stage's LoRA to this .safetensors file")
    parser.add_argument("--compile", action="store_true", help="torch.compile: a minute first, then twice as fast")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    data.draw_photos(args.work / "photos", args.photos, args.processes)
    budget = replace(RECIPE, seconds=args.seconds, steps=args.steps)
    for stage in args.stages:
        train(args.work, stage, budget, pack_folder=args.pack, compiled=args.compile)
    if args.to:
        print(f"few: {export(args.work, args.stages[-1], args.to) / 1e6:.2f} MB in {args.to}", flush=True)


if __name__ == "__main__":
    main()
