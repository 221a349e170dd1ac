"""The part `control` of a configuration: a ControlNet on views. Several methods have it; the canvas engine reads it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from resmaster_stages.config.part import Part

ControlImage = Literal["tile", "canny"]
"""What a ControlNet is shown."""


class ControlConfig(Part):
    """A ControlNet (`model.controlnet`) that reads each view's own crop of a control image."""

    enabled: bool = False
    """On: every view is predicted with the ControlNet, for about 1.4 times the work."""
    image: ControlImage = "tile"
    """The control image. `tile`: the enlarged low-res image. `canny`: the edges of the low-res image, enlarged
    (AccDiffusion v2). It must be what the ControlNet was trained on. A union ControlNet is told which it is."""
    scale: float = Field(default=0.6, ge=0, le=2)
    """Weight of the ControlNet. Above 0.8, blur and JPEG blocks of the low-res image are copied too. 0: off."""
    start: float = Field(default=0.0, ge=0, le=1)
    """Fraction of the steps after which the ControlNet begins to act."""
    stop: float = Field(default=1.0, ge=0, le=1)
    """Fraction of the steps after which the ControlNet no longer acts, and takes no time."""

    @model_validator(mode="after")
    def _check_range(self) -> ControlConfig:
        if self.stop <= self.start:
            raise ValueError(f"stop ({self.stop}) must be greater than start ({self.start})")
        return self

    @property
    def acting(self) -> bool:
        """Whether the ControlNet acts at some step."""
        return self.enabled and self.scale > 0

    def weight(self, done: float) -> float:
        """The ControlNet's weight at a step before which the fraction `done` of the path lies. 0: it is not called."""
        return self.scale if self.acting and self.start <= done < self.stop else 0.0
