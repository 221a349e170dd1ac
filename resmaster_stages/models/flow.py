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

from resmaster_stages.config.part import LONGEST_SHOWN
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.schedule import Step, Timing

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
    number of tokens (FLUX.1, Qwen-Image). Raises ConfigError."""
    least, most = _number(config, "base_image_seq_len", 256), _number(config, "max_image_seq_len", 4096)
    low, high = _number(config, "base_shift", 0.5), _number(config, "max_shift", 1.15)
    if most <= least:
        raise ConfigError(f"{SCHEDULER}: max_image_seq_len must be greater than base_image_seq_len; {_AGAIN}")
    return _grown(low + (high - low) * (tokens - least) / (most - least))


def empirical_shift(tokens: int, count: int) -> float:
    """The time shift of an image of `tokens` tokens in `count` steps that FLUX.2 was given.

    Its exponent is linear in the number of tokens, and up to 4300 tokens also in the number of steps.
    """
    many = 0.00016927 * tokens + 0.45666666  # at 200 steps
    few = 8.73809524e-05 * tokens + 1.89833333  # at 10 steps
    return _grown(many if tokens > 4300 else many + (many - few) / 190 * (count - 200))


_AGAIN = "download the model again, or mend scheduler_config.json"


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A finite number of a scheduler configuration. Raises ConfigError."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise ConfigError(f"{SCHEDULER}: {key} is {_short(value)} and must be a number; {_AGAIN}")
    return float(value)


def _short(value: object) -> str:
    """A value for a message."""
    return repr(value)[:LONGEST_SHOWN]


def _grown(exponent: float) -> float:
    """The time shift with an exponent. Raises ConfigError if it is beyond all use."""
    if abs(exponent) > 50:
        raise ConfigError(f"{SCHEDULER}: a time shift of exp({exponent:.3g}) leaves no noise levels; {_AGAIN}")
    return exp(exponent)


_NOT_SUPPORTED = ("invert_sigmas", "stochastic_sampling")
"""Wishes of a scheduler configuration that are not fulfilled. How noise is drawn anew is the setting `stepper`."""


_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""Wishes of which at most one can be fulfilled: the levels between the first and the last are spaced in another way."""


def require_flow(config: Mapping[str, Any], count: int) -> None:
    """Raise ConfigError unless a diffusers scheduler configuration describes a flow path that can be taken in `count`
    steps. What diffusers' scheduler does not read, such as a `prediction_type`, is not read here either."""
    name = str(config.get("_class_name", "scheduler"))[:LONGEST_SHOWN]
    if name != SCHEDULER:
        raise ConfigError(
            f"{name}: is not the scheduler of a flow-matching model; use a model with {SCHEDULER}, and for "
            "DPM-Solver++ upscale.stepper: dpmpp_2m"
        )
    for wish in _NOT_SUPPORTED:
        if config.get(wish):
            raise ConfigError(f"{name}: {wish} is not supported; set it to false in scheduler_config.json")
    for wish in _SPACINGS:
        if config.get(wish) not in (True, False, None):
            raise ConfigError(f"{name}: {wish} is {_short(config[wish])} and must be true or false; {_AGAIN}")
    if sum(bool(config.get(wish)) for wish in _SPACINGS) > 1:
        raise ConfigError(f"{name}: only one of {', '.join(_SPACINGS)} can be true; {_AGAIN}")
    if _number(config, "num_train_timesteps", 1000) != 1000:
        raise ConfigError(f"{name}: num_train_timesteps other than 1000 is not supported; use another model")
    kind = config.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise ConfigError(f"{name}: time_shift_type {_short(kind)} is not known; use exponential or linear")
    dynamic = config.get("use_dynamic_shifting")
    if dynamic not in (True, False, None):
        raise ConfigError(f"{name}: use_dynamic_shifting is {_short(dynamic)} and must be true or false; {_AGAIN}")
    if not dynamic and _number(config, "shift", 1.0) <= 0:
        raise ConfigError(f"{name}: shift is {_short(config['shift'])} and must be greater than 0; {_AGAIN}")
    last = 0.0 if config.get("shift_terminal") is None else _number(config, "shift_terminal", 0)
    if not 0 <= last < 1:
        raise ConfigError(f"{name}: shift_terminal is {last} and must be from 0 to 1; {_AGAIN}")
    if last and count < 2:
        raise ConfigError(f"steps: {name} with shift_terminal needs at least 2; use more")
    if count > 1000:
        raise ConfigError(f"steps: {count} is more than the 1000 steps that the model was trained with; use fewer")


def flow_schedule(
    config: Mapping[str, Any], count: int, timing: Timing, *, shift: float | None = None, spaced: bool = True
) -> tuple[Step, ...]:
    """The path in `count` steps that a diffusers scheduler configuration describes.

    shift: the time shift of an image of the view's size, for schedulers with dynamic shifting. spaced: whether the
    family's pipeline gives the scheduler evenly spaced levels, as most do, or only their number (Stable Diffusion 3).
    Raises ConfigError as `require_flow` does, and if the levels do not fall.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    require_flow(config, count)
    dynamic = bool(config.get("use_dynamic_shifting", False))
    own = shift if dynamic else _number(config, "shift", 1.0)
    assert own is not None, "a scheduler with dynamic shifting needs the shift of the view's size"
    wanted = timing.shift if timing.shift is not None else own * timing.growth
    kind = config.get("time_shift_type", "exponential")
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0 if dynamic else wanted,
        use_dynamic_shifting=dynamic,
        time_shift_type=kind,
        shift_terminal=config.get("shift_terminal"),
        **{wish: bool(config.get(wish)) for wish in _SPACINGS},
    )
    mu = log(wanted) if kind == "exponential" else wanted
    scheduler.set_timesteps(
        num_inference_steps=count,
        sigmas=[float(level) for level in np.linspace(1.0, 1 / count, count)] if spaced else None,
        mu=mu if dynamic else None,
    )
    levels = [min(1.0, float(level)) for level in scheduler.sigmas]  # rounding can raise the first one above 1
    if any(here <= after for here, after in pairwise(levels)):
        raise ConfigError(
            f"{SCHEDULER}: with a time shift of {wanted:.4g}, {count} steps have no {count} noise levels; use fewer "
            "steps, or a time_shift nearer to 1"
        )
    return flow_path(levels, [float(t) for t in scheduler.timesteps])
