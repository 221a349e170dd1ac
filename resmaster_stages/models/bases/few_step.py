"""Kinds of few-step weights for UNets: the timesteps, guidance and steppers that each was distilled to.

This module does not import torch and reads no file.

| kind | path | after a step |
| --- | --- | --- |
| lightning | trailing, exactly 2, 4 or 8 steps | DDIM |
| hyper | trailing, exactly the steps of the weights; one step at 800 | DDIM |
| lcm | every so many-th of 50 timesteps, 20 apart | all noise anew |
| dmd2 | 999, 749, 499, 249; or 399 alone | all noise anew |
| turbo | trailing, up to 4 steps | DDIM, or all noise anew |

Guidance is distilled into all of them but the LoRAs of Hyper-SD that have `CFG` in their name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from resmaster_stages.config.model import FewStepConfig, ModelConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.bases.base import Asked, Sampling, require_sampling
from resmaster_stages.models.identity import PICTUREBOOK
from resmaster_stages.models.schedule import timesteps

Kind: TypeAlias = Literal["lightning", "hyper", "lcm", "dmd2", "turbo"]

KINDS: tuple[Kind, ...] = ("lightning", "hyper", "lcm", "dmd2", "turbo")

MADE_FOR: dict[Kind, tuple[int, ...]] = {
    "lightning": (2, 4, 8),
    "hyper": (1, 2, 4, 8, 12),
    "lcm": tuple(range(1, 9)),
    "dmd2": (1, 4),
    "turbo": (1, 2, 3, 4),
}
"""The numbers of steps for which there are weights of a kind."""

ANY_OF_THEM: frozenset[Kind] = frozenset({"lcm", "turbo"})
"""Kinds whose weights take all these numbers of steps. Weights of the other kinds take their own number only."""

PACK_WEIGHTS = "8-step-lora.safetensors"
"""The file of the embedded pack's few-step weights, in its folder `few_step`."""

DETERMINISTIC = ("ddim_keep", "ddim_implied", "renoise")
RENOISED = ("renoise",)


@dataclass(frozen=True)
class FewStep:
    """Few-step weights, as far as sampling goes."""

    name: str
    """Where they are from, for messages."""
    kind: Kind
    steps: int
    """The number of steps that is recommended and, for most kinds, the only one."""
    guided: bool = False
    """Whether they take guidance."""

    @property
    def sampling(self) -> Sampling:
        """What can be asked of the sampling."""
        known = MADE_FOR[self.kind] if self.kind in ANY_OF_THEM else (self.steps,)
        return Sampling(
            "cfg" if self.guided else "none",
            self.steps,
            5.0 if self.guided else 1.0,
            most_steps=max(known),
            only_steps=known,
            steppers=RENOISED if self.kind in ("lcm", "dmd2") else DETERMINISTIC,
        )

    def timesteps(self, count: int) -> tuple[int, ...]:
        """The timesteps of a path in `count` steps, falling."""
        if self.kind == "lcm":  # as diffusers' LCMScheduler chooses from 50 timesteps
            return tuple(999 - 20 * int(place * 50 / count) for place in range(count))
        if count == 1 and self.kind in ("hyper", "dmd2"):
            return (800,) if self.kind == "hyper" else (399,)
        return tuple(timesteps(count, 1000, "trailing", 0))


def resolved(config: FewStepConfig) -> FewStepConfig:
    """The place of few-step weights, with the file and kind of those of the embedded pack."""
    if config.id != PICTUREBOOK:
        return config
    return config.model_copy(update={"subfolder": "", "weight_name": PACK_WEIGHTS, "kind": "lightning"})


def few_step_of(config: FewStepConfig) -> FewStep:
    """What a configuration says of few-step weights. Raises ConfigError."""
    config = resolved(config)
    name = "/".join(filter(None, (config.id, config.subfolder, config.weight_name)))
    kind = _kind(config, name)
    steps = config.steps or _steps_in(config) or 4
    known = MADE_FOR[kind]
    if steps not in known:
        why = ", because weights of one step predict the image itself" if (kind, steps) == ("lightning", 1) else ""
        raise ConfigError(
            f"model.few_step.steps: {steps} for weights of kind {kind}, of which those of "
            f"{', '.join(str(each) for each in known)} steps can be used{why}; choose another weight_name, or correct "
            "steps"
        )
    return FewStep(name, kind, steps, guided=kind == "hyper" and "cfg" in name.lower())


def _kind(config: FewStepConfig, name: str) -> Kind:
    """The kind of the weights `name`. Raises ConfigError if it is neither configured nor named."""
    if config.kind != "auto":
        return config.kind
    found = [kind for kind in KINDS if kind in name.lower()]
    if len(found) != 1:
        raise ConfigError(
            f"model.few_step.kind: auto cannot tell what {name} was distilled by; set it to one of {', '.join(KINDS)}"
        )
    return found[0]


def _steps_in(config: FewStepConfig) -> int | None:
    """The number of steps in the name of the weights, or None."""
    found = re.search(r"(\d{1,3})[-_ ]?step", config.weight_name or "", re.IGNORECASE)
    return int(found[1]) if found else None


def sampling(config: ModelConfig) -> Sampling:
    """What can be asked of the sampling of a UNet model. Raises ConfigError."""
    return few_step_of(config.few_step).sampling if config.few_step else Sampling()


def check_sampling(config: ModelConfig, asked: Asked) -> None:
    """Raise ConfigError unless the few-step weights of a model can be sampled as `asked`."""
    assert config.few_step is not None
    found = few_step_of(config.few_step)
    require_sampling(found.sampling, asked, found.name)
