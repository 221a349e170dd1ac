"""The embedded UNet as a flow-matching model: another description of the same network, with the same images.

A noisy latent of a variance-preserving path, z = alpha x0 + sigma eps, is one of a flow path if it is divided by
alpha + sigma. Its noise level is then sigma / (alpha + sigma). So the UNet's eps gives a velocity, eps - x0. This model
draws what the UNet draws, up to rounding, which makes it the strictest check of the engine on flow paths, with images
that mean something. One thing differs: DemoFusion's blurred dilated views. They are predicted from other latents than
the step's, and velocities of other latents say something else than their noise does (`loop.ViewGroup.prepare`).

Invariants:
- The path has the noise levels of the UNet's own path, and the UNet sees its own timesteps. There is no time shift.
- A fraction of the path in settings is a fraction of the steps, as for the UNet, and not a noise level of SDXL
  (`FlowStep`). Otherwise settings would mean different steps in the two descriptions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.bases import unet
from resmaster_stages.models.bases.base import Demand, Family
from resmaster_stages.models.files import Check
from resmaster_stages.models.identity import PICTUREBOOK
from resmaster_stages.models.schedule import Step, Timing, make_schedule

if TYPE_CHECKING:
    import torch

_NO_SHIFT = "upscale.time_shift: this model has no time shift; leave it out"


@dataclass(frozen=True, kw_only=True)
class FlowStep(Step):
    """A step of a variance-preserving path as a step of a flow path."""

    origin: Step

    @property
    def done(self) -> float:
        """That of the original step."""
        return self.origin.done

    @property
    def cosine(self) -> float:
        """That of the original step."""
        return self.origin.cosine


def as_flow(step: Step) -> FlowStep:
    """The step of a flow path between the noise levels of `step`."""
    here, after = _level(step.alpha, step.sigma), _level(step.alpha_next, step.sigma_next)
    return FlowStep(
        index=step.index,
        count=step.count,
        t=1000 * here,
        alpha=1 - here,
        sigma=here,
        alpha_next=1 - after,
        sigma_next=after,
        prediction_type="flow",
        origin=step,
    )


def _level(alpha: float, sigma: float) -> float:
    """The noise level on a flow path with the ratio alpha / sigma."""
    return sigma / (alpha + sigma)


@dataclass(frozen=True, eq=False)
class AsFlow(unet.Unet):
    """A loaded UNet model on a flow path."""

    @property
    def network(self) -> Any:
        """The UNet inside the denoiser."""
        return self.denoiser.network

    def path(self, steps: int, timing: Timing) -> tuple[Step, ...]:
        """The noise levels of the UNet's own path. Raises ConfigError for a time shift."""
        if timing.shift is not None or timing.growth != 1:
            raise ConfigError(_NO_SHIFT)
        return tuple(as_flow(step) for step in super().path(steps, timing))


class AsFlowPipeline:
    """A pipeline with a UNet of SDXL that predicts noise, to be used as a flow-matching model."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @property
    def device(self) -> torch.device:
        """The device that the pipeline runs on."""
        return self.pipe._execution_device


def _own(config: ModelConfig) -> ModelConfig:
    """The configuration of the embedded model as it is."""
    return config.model_copy(update={"id": PICTUREBOOK})


def _load(config: ModelConfig, dtype: torch.dtype) -> AsFlowPipeline:
    return AsFlowPipeline(unet.SDXL.load(_own(config), dtype))


def _base(pipe: AsFlowPipeline, config: ModelConfig) -> AsFlow:
    import torch

    from resmaster_stages.models.velocity import VelocityOfNoise

    plain = unet.base(True, pipe.pipe, config)
    path = dict(plain.scheduler_config)
    if path.get("prediction_type", "epsilon") != "epsilon":
        raise ConfigError(f"its UNet predicts {path['prediction_type']}; use it as it is, without AsFlowPipeline")
    every = {**path, "_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}
    steps = make_schedule(every, int(path.get("num_train_timesteps", 1000)))
    levels = torch.tensor([_level(step.alpha, step.sigma) for step in reversed(steps)])
    values = {field.name: getattr(plain, field.name) for field in fields(plain)}
    return replace(AsFlow(**values), family=AS_FLOW, denoiser=VelocityOfNoise(plain.denoiser, levels).eval())


def _checks(config: ModelConfig, demand: Demand) -> Iterator[Check]:
    yield from unet.SDXL.checks(_own(config), demand)
    if demand.time_shift:
        yield "upscale.time_shift", _refuse_shift


def _refuse_shift() -> None:
    raise ConfigError(_NO_SHIFT)


AS_FLOW = Family(
    name="SDXL as a flow-matching model",
    pipelines="AsFlowPipeline",
    abilities=unet.SDXL.abilities - {"few_step_weights"},
    geometry=unet.geometry,
    token_counter=unet.token_counter,
    load=_load,
    base=_base,
    checks=_checks,
)
