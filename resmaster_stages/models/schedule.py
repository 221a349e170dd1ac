"""The noise schedule: which timesteps are visited, and how much signal and noise a latent holds there.

The path is variance preserving: z = alpha * x0 + sigma * eps with alpha^2 + sigma^2 = 1, alpha^2 = cumulative product
of (1 - beta). An Euler scheduler describes the same path in other units (z / alpha), so its configuration can be used
too. These parts of a diffusers scheduler configuration are used: betas, zero-SNR rescaling, prediction type, timestep
spacing, steps offset, and the `set_alpha_to_one` of DDIM and PNDM. These are ignored: Karras, exponential or beta
sigmas, thresholding, higher orders.

Invariants:
- Timesteps fall. The last step ends at alpha = 1, or at the first training timestep if a DDIM or PNDM configuration
  says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import cos, pi
from typing import TYPE_CHECKING, Any

import numpy as np

from resmaster_stages.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One step of the path, from (alpha, sigma) at timestep `t` to (alpha_next, sigma_next)."""

    index: int
    count: int
    t: int
    alpha: float
    sigma: float
    alpha_next: float
    sigma_next: float
    prediction_type: str = "epsilon"
    train_steps: int = 1000

    @property
    def done(self) -> float:
        """The fraction of the path's steps that lie before this step. `start` and `stop` settings are compared with
        it."""
        return self.index / self.count

    @property
    def cosine(self) -> float:
        """(1 + cos(pi (T - t) / T)) / 2, from 1 at t = T to 0 at t = 0: the decay of DemoFusion and FreeScale."""
        return (1 + cos(pi * (self.train_steps - self.t) / self.train_steps)) / 2

    def noised(self, x0: Tensor, noise: Tensor) -> Tensor:
        """`x0` with the noise level of this step."""
        return self.alpha * x0 + self.sigma * noise

    def split(self, z: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) from the model's `output` for `z`; all of one shape."""
        if self.prediction_type == "epsilon":
            return (z - self.sigma * output) / self.alpha, output
        return self.alpha * z - self.sigma * output, self.alpha * output + self.sigma * z  # v-prediction


def timesteps(count: int, train_steps: int, spacing: str, offset: int) -> list[int]:
    """`count` falling training timesteps, spaced as in diffusers' DDIM scheduler."""
    if spacing == "leading":
        chosen = np.arange(count, dtype=float)[::-1] * (train_steps // count) + offset
    elif spacing == "trailing":
        chosen = np.round(train_steps - np.arange(count) * (train_steps / count)) - 1
    elif spacing == "linspace":
        chosen = np.linspace(0, train_steps - 1, count).round()[::-1]
    else:
        raise ConfigError(f"scheduler: unknown timestep_spacing {spacing!r}; use leading, trailing or linspace")
    return [int(t) for t in chosen.clip(0, train_steps - 1)]


def require_path(scheduler_config: Mapping[str, Any], count: int) -> None:
    """Raise ConfigError unless a diffusers scheduler configuration describes a path that can be taken in `count` steps.

    Refused are schedulers without betas (flow matching), and predictions other than epsilon and v.
    """
    config, name = scheduler_config, scheduler_config.get("_class_name", "scheduler")
    prediction_type, train_steps = config.get("prediction_type", "epsilon"), config.get("num_train_timesteps", 1000)
    if "beta_start" not in config and config.get("trained_betas") is None:
        raise ConfigError(
            f"{name}: not a variance-preserving scheduler (no betas); use an SDXL or Stable Diffusion model with a "
            "DDIM or Euler one"
        )
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ConfigError(f"{name}: prediction_type {prediction_type!r} is not supported; use epsilon or v_prediction")
    if not isinstance(train_steps, int):
        raise ConfigError(f"{name}: num_train_timesteps is no whole number; download the model again")
    if count > train_steps:
        raise ConfigError(
            f"steps: {count} is more than the {train_steps} steps that the model was trained with; use fewer"
        )
    timesteps(count, train_steps, str(config.get("timestep_spacing", "leading")), 0)  # raises for an unknown spacing


def make_schedule(scheduler_config: Mapping[str, Any], count: int) -> tuple[Step, ...]:
    """The path in `count` steps that a diffusers scheduler configuration describes.

    Raises ConfigError as `require_path` does.
    """
    from diffusers import DDIMScheduler

    require_path(scheduler_config, count)
    config = dict(scheduler_config)
    name = str(config.get("_class_name", "scheduler"))
    prediction_type = str(config.get("prediction_type", "epsilon"))
    train_steps = int(config.get("num_train_timesteps", 1000))
    ddim = DDIMScheduler.from_config(config)
    # Zero terminal SNR: keep the last alpha above zero, as diffusers' Euler scheduler does.
    products = ddim.alphas_cumprod.double().clamp(min=2.0**-24)
    keeps_first = name in ("DDIMScheduler", "PNDMScheduler") and not config.get(
        "set_alpha_to_one", name == "DDIMScheduler"
    )
    chosen = timesteps(
        count, train_steps, str(config.get("timestep_spacing", "leading")), int(config.get("steps_offset", 0))
    )
    signal = [float(products[t]) for t in chosen] + [float(products[0]) if keeps_first else 1.0]
    return tuple(
        Step(
            index=i,
            count=count,
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
