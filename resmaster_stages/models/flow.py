"""The noise schedules of flow-matching models: z = (1 - sigma) x0 + sigma eps, and the model predicts eps - x0.

The levels are read from diffusers' scheduler, which is made from the model's own scheduler configuration. So time
shifts, terminal levels and other peculiarities of a family are those of its own pipeline.

Invariants:
- Levels fall from at most 1 to 0. The last step ends at 0.
- A pass that leaves out the first steps has the levels of the whole path from there on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import exp, log
from typing import Any

import numpy as np

from resmaster_stages.errors import ConfigError
from resmaster_stages.models.bases.base import Timing
from resmaster_stages.models.schedule import Step

SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def flow_path(levels: Sequence[float], times: Sequence[float] | None = None) -> tuple[Step, ...]:
    """The steps between neighbouring noise levels (sigma), which fall from at most 1 to 0.

    times: the timestep of each step. None: 1000 sigma.
    """
    count = len(levels) - 1
    times = times or [1000 * level for level in levels[:-1]]
    return tuple(
        Step(index, count, times[index], 1 - here, here, 1 - after, after, prediction_type="flow")
        for index, (here, after) in enumerate(pairwise(levels))
    )


def image_shift(config: Mapping[str, Any], tokens: int) -> float:
    """The time shift of an image of `tokens` tokens by a scheduler with dynamic shifting: its exponent is linear in the
    number of tokens (FLUX.1, Qwen-Image)."""
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return exp(low + (high - low) * (tokens - least) / (most - least))


def require_flow(config: Mapping[str, Any], count: int) -> None:
    """Raise ConfigError unless a diffusers scheduler configuration describes a flow path that can be taken in `count`
    steps."""
    name = str(config.get("_class_name", "scheduler"))
    if name != SCHEDULER:
        raise ConfigError(f"{name}: is not the scheduler of a flow-matching model; use a model folder with {SCHEDULER}")
    for wish in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"):
        if config.get(wish):
            raise ConfigError(f"{name}: {wish} is not supported; set it to false in scheduler_config.json")
    if count > 1000:
        raise ConfigError(f"steps: {count} is more than the 1000 steps that the model was trained with; use fewer")


def flow_schedule(
    config: Mapping[str, Any], count: int, timing: Timing, *, shift: float | None = None, spaced: bool = True
) -> tuple[Step, ...]:
    """The path in `count` steps that a diffusers scheduler configuration describes.

    shift: the time shift of an image of the view's size, for schedulers with dynamic shifting. spaced: whether the
    family's pipeline gives the scheduler evenly spaced levels, as most do, or only their number (Stable Diffusion 3).
    Raises ConfigError as `require_flow` does.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    require_flow(config, count)
    dynamic = bool(config.get("use_dynamic_shifting", False))
    own = shift if dynamic else config.get("shift", 1.0)
    assert own is not None, "a scheduler with dynamic shifting needs the shift of the view's size"
    wanted = timing.shift if timing.shift is not None else own * timing.growth
    values = {key: value for key, value in config.items() if not key.startswith("_")}
    if not dynamic:
        values["shift"] = wanted
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(values)
    mu = log(wanted) if dynamic and config.get("time_shift_type", "exponential") == "exponential" else wanted
    scheduler.set_timesteps(
        num_inference_steps=count,
        sigmas=[float(level) for level in np.linspace(1.0, 1 / count, count)] if spaced else None,
        mu=mu if dynamic else None,
    )
    return flow_path([float(level) for level in scheduler.sigmas], [float(t) for t in scheduler.timesteps])
