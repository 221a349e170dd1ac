"""The noise schedule: which timesteps are visited, and how much signal and noise a latent holds there.

At every step z = alpha * x0 + sigma * eps. Two kinds of paths are known. On a flow path (`models.flow`) alpha is
1 - sigma, and the model predicts eps - x0. `make_schedule` makes paths of the other kind.

These are variance preserving: alpha^2 + sigma^2 = 1, alpha^2 = cumulative product of (1 - beta). An Euler scheduler
describes the same path in other units (z / alpha), so its configuration can be used too. These parts of a diffusers
scheduler configuration are used: betas, zero-SNR rescaling, prediction type, timestep spacing, steps offset, and the
`set_alpha_to_one` of DDIM and PNDM. The scheduler's class decides between two rules of spacing (`_ONE_MORE`). These are
ignored: Karras, exponential or beta sigmas, Lu's lambdas, thresholding, higher orders.

Invariants:
- Timesteps fall. The last step ends at alpha = 1, or at the first training timestep if a DDIM or PNDM configuration
  says so.
- Fractions of the path in settings mean the same noise level on both kinds of paths: that of SDXL (`Step.done`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import cos, log, pi
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from resmaster_stages.config.part import LONGEST_SHOWN
from resmaster_stages.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One step of the path, from (alpha, sigma) at timestep `t` to (alpha_next, sigma_next)."""

    index: int
    count: int
    t: float
    """The timestep: a whole number up to `train_steps`, and on a flow path `train_steps` * sigma."""
    alpha: float
    sigma: float
    alpha_next: float
    sigma_next: float
    prediction_type: Literal["epsilon", "v_prediction", "flow"] = "epsilon"
    train_steps: int = 1000

    @property
    def done(self) -> float:
        """The fraction of the path that lies before this step. `start` and `stop` settings are compared with it.

        On a flow path, it is the fraction of SDXL's 50 steps before the same noise level, because flow paths spend
        other numbers of steps at each noise level.
        """
        if self.prediction_type != "flow":
            return self.index / self.count
        return max(0.0, (_FIRST - sdxl_timestep(self.alpha, self.sigma)) / 1000)

    @property
    def cosine(self) -> float:
        """(1 + cos(pi (T - t) / T)) / 2, from 1 at t = T to 0 at t = 0: the decay of DemoFusion and FreeScale.

        On a flow path, t is SDXL's timestep with the same noise level, for which the exponents of the decay were
        chosen.
        """
        if self.prediction_type != "flow":
            return (1 + cos(pi * (self.train_steps - self.t) / self.train_steps)) / 2
        return (1 + cos(pi * (1000 - sdxl_timestep(self.alpha, self.sigma)) / 1000)) / 2

    def noised(self, x0: Tensor, noise: Tensor) -> Tensor:
        """`x0` with the noise level of this step."""
        return self.alpha * x0 + self.sigma * noise

    def pure(self, noise: Tensor) -> Tensor:
        """What a path begins with at this step: `noise` with the spread that latents of variance 1 have here.

        A flow path usually begins at sigma = 1, where this is `noise` itself.
        """
        return (self.alpha**2 + self.sigma**2) ** 0.5 * noise if self.prediction_type == "flow" else noise

    def split(self, z: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) from the model's `output` for `z`; all of one shape."""
        if self.prediction_type == "epsilon":
            return (z - self.sigma * output) / self.alpha, output
        if self.prediction_type == "flow":
            return z - self.sigma * output, z + self.alpha * output
        return self.alpha * z - self.sigma * output, self.alpha * output + self.sigma * z  # v-prediction


@dataclass(frozen=True)
class Timing:
    """What a path depends on beside the number of steps. Only flow paths read the area and the time shift."""

    cells: int
    """Area of a view, in latents. Some models move their steps to more noise for larger images."""
    growth: float = 1.0
    """Factor on the time shift of such a view."""
    shift: float | None = None
    """The time shift itself. None: the model's own."""
    timesteps: tuple[int, ...] = ()
    """The timesteps that the path visits, falling, from 0 to 999. The path ends clean. Empty: as the model's scheduler
    spaces them."""


@dataclass(frozen=True)
class Course:
    """As much of a path as a forecast of the work needs."""

    done: tuple[float, ...]
    """`Step.done` of each step."""
    guided: bool = True
    """Whether a guidance scale other than 1 takes an unconditional branch."""
    even: bool = True
    """Whether `done` is the number of the step over the number of steps."""
    decay: tuple[float, ...] = ()
    """`Step.cosine` of each step. Empty: not known, but above 0 and below 1 at all of them."""

    def first(self, fraction: float) -> int:
        """Index of the first step when the fraction `fraction` of the path is left out; at most the last index."""
        if self.even:
            return min(int(fraction * len(self.done)), len(self.done) - 1)
        left = (index for index, done in enumerate(self.done) if done >= fraction)
        return next(left, len(self.done) - 1)


def even_course(count: int, guided: bool = True) -> Course:
    """The course of a variance-preserving path in `count` steps."""
    return Course(tuple(index / count for index in range(count)), guided)


def course_of(path: Sequence[Step], guided: bool) -> Course:
    """The course of a path."""
    even = all(step.done == step.index / step.count for step in path)
    return Course(tuple(step.done for step in path), guided, even, tuple(step.cosine for step in path))


_FIRST = 981
"""The first of SDXL's 50 timesteps, 20 apart."""


@lru_cache(maxsize=1)
def _sdxl_levels() -> np.ndarray[Any, Any]:
    """log(alpha^2 / sigma^2) of SDXL at its timesteps 0 to 999: [1000], falling."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    signal = np.cumprod(1 - betas)
    return np.log(signal / (1 - signal))


@lru_cache(maxsize=4096)
def sdxl_timestep(alpha: float, sigma: float) -> float:
    """SDXL's timestep with the signal-to-noise ratio alpha^2 / sigma^2, from 0 to 999. Between timesteps the logarithm
    of the ratio is taken as linear."""
    if alpha <= 0 or sigma <= 0:
        return 999.0 if alpha <= 0 else 0.0
    levels = _sdxl_levels()
    return float(np.interp(2 * log(alpha / sigma), levels[::-1], np.arange(999.0, -1.0, -1.0)))


def noisier(timestep: int, ratio: float) -> int:
    """The first of SDXL's timesteps whose signal-to-noise ratio is at most `ratio` times that of `timestep`; at most
    999.

    In alpha^2 =: s this is s' <= r s / (1 + (r - 1) s).
    """
    levels = _sdxl_levels()
    return min(999, int(np.searchsorted(-levels, -(levels[timestep] + log(ratio)))))


def flow_level(timestep: float) -> float:
    """The noise level (sigma) of a flow path with the signal-to-noise ratio of SDXL's `timestep`."""
    return float(1 / (1 + np.exp(np.interp(timestep, np.arange(1000.0), _sdxl_levels()) / 2)))


_ONE_MORE = (
    "DPMSolverMultistepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
)
"""Schedulers that space `leading` and `linspace` timesteps as for one step more, and leave out the last of these."""


def _spacing(config: Mapping[str, Any]) -> tuple[str, bool]:
    """The timestep spacing of a diffusers scheduler configuration, and whether it is as for one step more."""
    name = config.get("_class_name")
    if name == "DPMSolverSinglestepScheduler":
        return "linspace", True  # it reads no timestep_spacing
    one_more = name in _ONE_MORE
    return str(config.get("timestep_spacing", "linspace" if one_more else "leading")), one_more


def timesteps(count: int, train_steps: int, spacing: str, offset: int, one_more: bool = False) -> list[int]:
    """`count` falling training timesteps, spaced as in diffusers' DDIM scheduler, or as in its DPM-Solver (`one_more`).

    Raises ConfigError.
    """
    points = count + one_more
    if spacing == "leading":
        chosen = np.arange(points, dtype=float)[::-1] * (train_steps // points) + offset
    elif spacing == "trailing":
        chosen = np.round(train_steps - np.arange(count) * (train_steps / count)) - 1
    elif spacing == "linspace":
        chosen = np.linspace(0, train_steps - 1, points).round()[::-1]
    else:
        raise ConfigError(
            f"scheduler: unknown timestep_spacing {spacing[:LONGEST_SHOWN]!r}; use leading, trailing or linspace"
        )
    return [int(t) for t in chosen[:count].clip(0, train_steps - 1)]


def require_falling(visited: Sequence[float], train_steps: int) -> None:
    """Raise ConfigError unless timesteps fall and lie below `train_steps`."""
    if any(a <= b for a, b in pairwise(visited)) or not all(0 <= t < train_steps for t in visited):
        shown = str(list(visited))[:LONGEST_SHOWN]
        raise ConfigError(f"timesteps: {shown} must fall and be from 0 to {train_steps - 1}; correct them")


MOST_TRAIN_STEPS = 100_000
"""Far more training timesteps than any model has."""


def require_path(scheduler_config: Mapping[str, Any], count: int) -> None:
    """Raise ConfigError unless a diffusers scheduler configuration describes a path that can be taken in `count` steps.

    Refused are schedulers without betas (flow matching), and predictions other than epsilon and v.
    """
    config, name = scheduler_config, str(scheduler_config.get("_class_name", "scheduler"))[:LONGEST_SHOWN]
    prediction_type, train_steps = config.get("prediction_type", "epsilon"), config.get("num_train_timesteps", 1000)
    (spacing, one_more), offset = _spacing(config), config.get("steps_offset", 0)
    if "beta_start" not in config and config.get("trained_betas") is None:
        raise ConfigError(
            f"{name}: not a variance-preserving scheduler (no betas); use an SDXL or Stable Diffusion model with a "
            "DDIM or Euler one"
        )
    if prediction_type not in ("epsilon", "v_prediction"):
        shown = repr(prediction_type)[:LONGEST_SHOWN]
        raise ConfigError(f"{name}: prediction_type {shown} is not supported; use epsilon or v_prediction")
    if config.get("use_flow_sigmas"):
        raise ConfigError(f"{name}: use_flow_sigmas goes with no {prediction_type} prediction; set it to false")
    if not isinstance(train_steps, int):
        raise ConfigError(f"{name}: num_train_timesteps is no whole number; download the model again")
    if not 1 <= train_steps <= MOST_TRAIN_STEPS:
        shown = str(train_steps) if abs(train_steps) < 10**12 else "too large"
        raise ConfigError(
            f"{name}: num_train_timesteps is {shown} and must be from 1 to {MOST_TRAIN_STEPS}; download the model again"
        )
    if not isinstance(offset, int | float) or offset % 1 or abs(offset) > MOST_TRAIN_STEPS:
        raise ConfigError(f"{name}: steps_offset is no whole number up to {MOST_TRAIN_STEPS}; download the model again")
    most = train_steps - (one_more and spacing != "trailing")
    if count > most:
        raise ConfigError(f"steps: {count} is more than the {most} steps that the model was trained with; use fewer")
    timesteps(count, train_steps, spacing, 0)  # raises for an unknown spacing


def _signal(config: dict[str, Any], name: str) -> Tensor:
    """alpha^2 at each training timestep, float64. Raises ConfigError."""
    from diffusers import DDIMScheduler

    try:
        products = DDIMScheduler.from_config(config).alphas_cumprod.double()
        falls = len(products) >= config.get("num_train_timesteps", 1000) and bool(
            ((products >= 0) & (products <= 1)).all()
        )
    except (ArithmeticError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError):
        falls = False
    if not falls:
        raise ConfigError(
            f"{name}: its betas (beta_start, beta_end, beta_schedule, trained_betas) describe no path; download the "
            "model again"
        )
    # Zero terminal SNR: keep the last alpha above zero, as diffusers' Euler scheduler does.
    return products.clamp(min=2.0**-24)


def make_schedule(scheduler_config: Mapping[str, Any], count: int, visited: Sequence[int] = ()) -> tuple[Step, ...]:
    """The path in `count` steps that a diffusers scheduler configuration describes.

    visited: the timesteps themselves, falling. The path then ends at alpha = 1, whatever the configuration says. Empty:
    as the configuration spaces them. Raises ConfigError as `require_path` does, for betas that describe no path, and
    for timesteps that do not fall or that the model does not have.
    """
    require_path(scheduler_config, count)
    config = dict(scheduler_config)
    name = str(config.get("_class_name", "scheduler"))
    prediction_type: Literal["epsilon", "v_prediction"] = config.get("prediction_type", "epsilon")
    train_steps = int(config.get("num_train_timesteps", 1000))
    products = _signal(config, name)
    keeps_first = name in ("DDIMScheduler", "PNDMScheduler") and not config.get(
        "set_alpha_to_one", name == "DDIMScheduler"
    )
    spacing, one_more = _spacing(config)
    if visited:
        require_falling(visited, train_steps)
        chosen, keeps_first = list(visited), False
    else:
        chosen = timesteps(count, train_steps, spacing, int(config.get("steps_offset", 0)), one_more)
    signal = [float(products[t]) for t in chosen] + [float(products[0]) if keeps_first else 1.0]
    return tuple(
        Step(
            index=i,
            count=len(chosen),
            t=t,
            alpha=signal[i] ** 0.5,
            sigma=(1 - signal[i]) ** 0.5,
            alpha_next=signal[i + 1] ** 0.5,
            sigma_next=(1 - signal[i + 1]) ** 0.5,
            prediction_type=prediction_type,
            train_steps=train_steps,
        )
        for i, t in enumerate(chosen)
    )
