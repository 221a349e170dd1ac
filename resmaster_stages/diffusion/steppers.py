"""Steppers go from z_t to z_{t-1} on the canvas, given the latent, the (possibly edited) x0 and the predicted noise.

With a, b = alpha, sigma of the step and a', b' those of the next step:

    ddim_keep       z' = a' x0 + b' eps                                    DDIM, eta = 0
    ddim_implied    z' = a' x0 + b' (z - a x0) / b                         the noise that leads from the edited x0 to z
    posterior       z' ~ N(a' beta / b^2 x0 + sqrt(alpha) b'^2 / b^2 z,    q(z' | z, x0): ResMaster eq. 7, strided,
                           beta b'^2 / b^2)                                alpha = a^2 / a'^2, beta = b^2 - alpha b'^2
    ddim_ancestral  z' = a' x0 + sqrt(b'^2 - s^2) eps + s noise            DDIM, eta = 1: s^2 the variance above
    dpmpp_2m        z' = b' / b z - a' (e^-h - 1) D                        DPM-Solver++(2M), Lu et al. 2022, Algorithm
    2:
                           D = x0 + (x0 - x0 before) h / (2 h before)      h = log(a' / b') - log(a / b)
    renoise         z' = a' x0 + b' noise                                  Consistency models, LCM (Luo et al. 2023,
                                                                           Algorithm 3), DMD2: fresh noise at every step

`ddim_keep` and `ddim_implied` differ only if x0 was edited. Both are Euler's method for the probability-flow ODE in
units of z / a. `posterior` and `ddim_ancestral` are the same if x0 was not edited. ScaleCrafter and FouriScale sample
with `ddim_ancestral`. `dpmpp_2m` is of second order: it needs half the steps for about the same path. With D = x0 it is
`ddim_implied`.

All rules hold for any path z = a x0 + b eps. On a variance-preserving path (a^2 + b^2 = 1), beta is 1 - alpha. On a
flow path (a = 1 - b), `ddim_keep` is the Euler step of the flow-matching scheduler. A flow path begins at a = 0, where
`posterior` and `ddim_ancestral` draw all noise anew.

Invariants:
- Every rule acts on the whole canvas. Noise is drawn once for the canvas, because noise per view would average away
  where views overlap. Only `posterior`, `ddim_ancestral` and `renoise` call `noise`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp, inf, log
from typing import Protocol

from torch import Tensor

from resmaster_stages.models.schedule import Step

Noise = Callable[[], Tensor]
"""Draws standard normal noise of the canvas's shape."""


class Stepper(Protocol):
    """One step of the path. All tensors are [B, C, H, W], float32."""

    def __call__(self, z: Tensor, x0: Tensor, eps: Tensor, step: Step, noise: Noise) -> Tensor: ...


def ddim_keep(z: Tensor, x0: Tensor, eps: Tensor, step: Step, noise: Noise) -> Tensor:
    """DDIM with eta = 0, keeping the noise that the model predicted."""
    return step.alpha_next * x0 + step.sigma_next * eps


def ddim_implied(z: Tensor, x0: Tensor, eps: Tensor, step: Step, noise: Noise) -> Tensor:
    """DDIM with eta = 0 and the noise implied by z and the edited x0."""
    return step.alpha_next * x0 + step.sigma_next / step.sigma * (z - step.alpha * x0)


def _ratio_and_spread(step: Step) -> tuple[float, float]:
    """(alpha, beta): over the step's stride, z = sqrt(alpha) z' + sqrt(beta) * noise.

    Both expressions of beta are equal on a variance-preserving path. There the shorter one is used, which the bytes of
    existing datasets depend on.
    """
    alpha = step.alpha**2 / step.alpha_next**2
    return alpha, step.sigma**2 - alpha * step.sigma_next**2 if step.prediction_type == "flow" else 1 - alpha


def posterior(z: Tensor, x0: Tensor, eps: Tensor, step: Step, noise: Noise) -> Tensor:
    """A draw from q(z' | z, x0) over the step's stride."""
    alpha, beta = _ratio_and_spread(step)
    variance = step.sigma**2
    mean = step.alpha_next * beta / variance * x0 + alpha**0.5 * step.sigma_next**2 / variance * z
    if step.sigma_next == 0:
        return mean
    return mean + (beta * step.sigma_next**2 / variance) ** 0.5 * noise()


def ddim_ancestral(z: Tensor, x0: Tensor, eps: Tensor, step: Step, noise: Noise) -> Tensor:
    """DDIM with eta = 1: a mixture of the noise that the model predicted and fresh noise."""
    if step.sigma_next == 0:
        return step.alpha_next * x0
    variance = _ratio_and_spread(step)[1] * step.sigma_next**2 / step.sigma**2
    kept = max(0.0, step.sigma_next**2 - variance)  # 0 where alpha is 0, and rounding could make it negative
    return step.alpha_next * x0 + kept**0.5 * eps + variance**0.5 * noise()


def renoise(z: Tensor, x0: Tensor, eps: Tensor, step: Step, noise: Noise) -> Tensor:
    """x0 with fresh noise. The last step draws none."""
    if step.sigma_next == 0:
        return step.alpha_next * x0
    return step.alpha_next * x0 + step.sigma_next * noise()


class Dpmpp2M:
    """DPM-Solver++(2M) for x0: it uses the straight line through the last two x0 instead of the last x0 alone.

    It remembers the x0 of the previous step, so every pass of the loop needs a stepper of its own. The first step is
    `ddim_implied`. So are steps next to an infinite h: the last step, which ends without noise, and the first two steps
    of a flow path, which begins without signal.
    """

    def __init__(self) -> None:
        self._before: tuple[Tensor, float] | None = None  # x0 [B, C, H, W] of the step before, and its h

    def __call__(self, z: Tensor, x0: Tensor, eps: Tensor, step: Step, noise: Noise) -> Tensor:
        before, self._before = self._before, None
        if step.sigma_next == 0:
            return ddim_implied(z, x0, eps, step, noise)
        before_step = log(step.alpha / step.sigma) if step.alpha > 0 else -inf
        h = log(step.alpha_next / step.sigma_next) - before_step
        line = x0 if before is None else x0 + (x0 - before[0]) * (h / (2 * before[1]))
        self._before = (x0, h) if h else None  # 0 if two timesteps of a path are equal
        return step.sigma_next / step.sigma * z - step.alpha_next * (exp(-h) - 1) * line


STEPPERS: dict[str, Stepper] = {
    "ddim_keep": ddim_keep,
    "ddim_implied": ddim_implied,
    "posterior": posterior,
    "ddim_ancestral": ddim_ancestral,
    "renoise": renoise,
}
"""The steppers without memory, by the names that the setting `stepper` of a method takes."""


def make_stepper(name: str) -> Stepper:
    """The stepper for one pass of the loop, by a name that the setting `stepper` of a method takes."""
    return Dpmpp2M() if name == "dpmpp_2m" else STEPPERS[name]
