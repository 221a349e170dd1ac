"""What every training stage shares: a budget in seconds or steps, a warm-up / constant / decay schedule, checkpoints.

`fit` is the whole loop, for stages that train one model by one optimiser in one process. The budget counts training
time over all runs, so an interrupted stage resumes where its last checkpoint was. A stop file starts the final decay
early. Knows nothing about models.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Budget:
    """How long a stage trains: `seconds` of wall-clock, or `steps` when given. The last `decay` share anneals to
    zero."""

    seconds: float = 600.0
    steps: int | None = None
    warmup_steps: int = 100
    decay: float = 0.3
    decay_seconds_on_stop: float = 600.0


@dataclass
class Course:
    """Where a stage stands. `elapsed` is training time in seconds over all runs; `stopping_since` marks a stop file."""

    budget: Budget
    checkpoint: Path
    stop_file: Path | None = None
    save_every_seconds: float = 120.0
    step: int = 0
    elapsed: float = 0.0
    stopping_since: float | None = None
    last_save: float = field(default_factory=time.monotonic)
    _tick: float = field(default_factory=time.monotonic)

    def progress(self) -> float:
        if self.budget.steps is not None:
            return self.step / self.budget.steps
        return self.elapsed / self.budget.seconds

    def rate(self) -> float:
        """The learning-rate factor of the next step, 0 at the end."""
        warm = min(1.0, (self.step + 1) / self.budget.warmup_steps)
        tail = min(1.0, max(0.0, (1.0 - self.progress()) / self.budget.decay))
        if self.stopping_since is not None:
            tail = min(tail, max(0.0, 1.0 - (self.elapsed - self.stopping_since) / self.budget.decay_seconds_on_stop))
        return warm * tail

    def advance(self) -> bool:
        """Count one step. True while training should go on."""
        now = time.monotonic()
        self.elapsed += min(now - self._tick, 60.0)
        self._tick = now
        self.step += 1
        if self.stopping_since is None and self.stop_file is not None and self.stop_file.exists():
            self.stopping_since = self.elapsed
        return self.progress() < 1.0 and self.rate() > 0.0

    def due(self) -> bool:
        return time.monotonic() - self.last_save > self.save_every_seconds

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint atomically."""
        state = {**state, "step": self.step, "elapsed": self.elapsed, "stopping_since": self.stopping_since}
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(self.checkpoint)
        self.last_save = time.monotonic()

    def resume(self, *needed: str) -> dict[str, Any] | None:
        """The last checkpoint, if any; sets step and elapsed.

        Raises SystemExit if it lacks what this stage goes on from: another version wrote it, or it came finished from a
        pack.
        """
        if not self.checkpoint.exists():
            return None
        state: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        missing = [name for name in (*needed, "step", "elapsed", "stopping_since") if name not in state]
        if missing:
            raise SystemExit(
                f"{self.checkpoint} cannot be trained further: it has no {' and no '.join(missing)} (an earlier "
                "version wrote it, or it came finished from a pack). Move it away to train this stage anew, or leave "
                "this stage out."
            )
        self.step, self.elapsed, self.stopping_since = state["step"], state["elapsed"], state["stopping_since"]
        return state

    def start(self) -> None:
        """The clock begins. Without its stop file a decay that it had started is over, and the course goes on."""
        stopped = self.stop_file is not None and self.stop_file.exists()
        if self.step == 0 and stopped:
            raise SystemExit(f"{self.stop_file} is left from an earlier training: remove it first.")
        if not stopped:
            self.stopping_since = None
        self._tick = self.last_save = time.monotonic()


def keep(checkpoint: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint of a stage that an earlier pack brings finished: no step and no second of its own."""
    Course(Budget(), checkpoint).save(state)


class Team:
    """The processes of one stage under `torchrun`: one thread each beats one process with many where cores are shared.

    Each process draws its own share of the batch; gradients are averaged; process 0 decides, logs and saves.
    """

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.size > 1 and not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=timedelta(minutes=60))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, batch: int) -> int:
        return max(1, batch // self.size)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            distributed.barrier()

    def average_gradients(self, model: nn.Module) -> None:
        """Replace every gradient by its mean over the processes, in one message."""
        if self.size == 1:
            return
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in grads])
        distributed.all_reduce(flat)
        flat /= self.size
        for grad, part in zip(grads, flat.split([g.numel() for g in grads])):
            grad.copy_(part.view_as(grad))

    def decide(self, going: bool, rate: float) -> tuple[bool, float]:
        """Process 0's decision to go on and its next rate, told to all."""
        if self.size == 1:
            return going, rate
        message = torch.tensor([float(going), rate], dtype=torch.float64)
        distributed.broadcast(message, 0)
        return bool(message[0]), float(message[1])


def descend(team: Team, model: nn.Module, optimisers: Sequence[torch.optim.Optimizer]) -> None:
    """One step by the mean gradients of all processes, no longer than 1; gradients are cleared."""
    team.average_gradients(model)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for each in optimisers:
        each.step()
    model.zero_grad(set_to_none=True)


def fresh(path: Path, source: Path) -> bool:
    """Whether `path` exists and is not older than what it was made from."""
    return path.exists() and path.stat().st_mtime >= source.stat().st_mtime


class Ema:
    """An exponential moving average of a model's parameters; the decay grows with the step count up to `decay`."""

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in model.state_dict().items():
            if value.dtype.is_floating_point:
                self.shadow[key].lerp_(value, 1 - decay)
            else:
                self.shadow[key].copy_(value)


def fit(
    model: nn.Module,
    optim: torch.optim.Optimizer,
    ema: Ema,
    losses: Callable[[Random], Mapping[str, Tensor]],
    course: Course,
    seed: int,
) -> Iterator[int]:
    """Train until the budget is spent, from the last checkpoint on. Yields the step after each checkpoint.

    losses: draws a batch by the generator that it is given and returns scalars by name; their sum is descended.
    course: its checkpoints hold `model`, `ema` (averaged weights) and `optim`. seed: of that generator, with the first
    step.
    """
    name, rate, device = course.checkpoint.stem, optim.param_groups[0]["lr"], next(model.parameters()).device
    if state := course.resume("model", "ema", "optim"):
        model.load_state_dict(state["model"])
        optim.load_state_dict(state["optim"])
        ema.shadow = {key: value.to(device) for key, value in state["ema"].items()}
    print(f"{name}: {parameters_m(model):.2f} M parameters, from step {course.step}", flush=True)
    rng, going = Random(seed + course.step), True
    course.start()
    while going:
        set_rate(optim, rate * course.rate())
        with attention(device.type):
            found = losses(rng)
            torch.stack([*found.values()]).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        optim.zero_grad(set_to_none=True)
        going = course.advance()
        ema.update(model, course.step)
        if course.step % 50 == 0:
            shown = " ".join(f"{key} {value.item():.4f}" for key, value in found.items())
            print(f"{name}: step {course.step} {shown} {course.elapsed:.0f} s", flush=True)
        if course.due() or not going:
            course.save({"model": model.state_dict(), "ema": ema.shadow, "optim": optim.state_dict()})
            yield course.step


def attention(device: str) -> AbstractContextManager[None]:
    """Plain matrix products for attention on a CPU, where they train twice as fast as the fused kernel's backward."""
    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()


def parameters_m(model: nn.Module) -> float:
    """The number of parameters in millions."""
    return sum(p.numel() for p in model.parameters()) / 1e6


def optimiser(models: list[nn.Module], rate: float, weight_decay: float = 0.01) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    params = [p for m in models for p in m.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), eps=1e-7, fused=True)


class _Muon(torch.optim.Muon):
    """Muon (arXiv:2502.16982) over parameters of two dimensions and more, each seen as a matrix with a row per output.

    Step by step it learns such small networks about twice as fast as AdamW. Memory layouts may be channels-last.
    """

    def __init__(self, parameters: list[nn.Parameter], rate: float, weight_decay: float) -> None:
        self.sources = parameters
        matrices = [self._matrix(p.detach()) for p in parameters]
        super().__init__(matrices, lr=rate, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")

    @staticmethod
    def _matrix(values: Tensor) -> Tensor:
        """A view of a parameter, or of its gradient: [outputs, the rest]."""
        if values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last):
            values = values.permute(0, 2, 3, 1)  # how the numbers lie in memory
        return values.view(len(values), -1)

    def step(self, closure: Any = None) -> Any:
        for source, matrix in zip(self.sources, self.param_groups[0]["params"]):
            grad = source.grad  # none for parts that took no part in this step, which then stay as they are
            matrix.grad = None if grad is None else self._matrix(grad.contiguous(memory_format=_layout(source)))
        return super().step(closure)


def _layout(values: Tensor) -> torch.memory_format:
    channels_last = values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def muon(models: list[nn.Module], rate: float, weight_decay: float = 0.01) -> torch.optim.Optimizer:
    """Muon for the weights of layers; `vectors` takes the rest."""
    return _Muon([p for m in models for p in m.parameters() if p.requires_grad and p.ndim >= 2], rate, weight_decay)


def vectors(models: list[nn.Module], rate: float) -> torch.optim.AdamW:
    """AdamW for biases and norms."""
    rest = [p for m in models for p in m.parameters() if p.requires_grad and p.ndim < 2]
    return torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.99), eps=1e-7, weight_decay=0.0, fused=True)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate
