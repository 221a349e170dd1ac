"""The part `structure` of a configuration: structural guidance. Several methods have it; the canvas engine reads it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from resmaster_stages.config.part import Part, known_name, offer_preset

STRUCTURE_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"cutoff": 0.8, "cutoff_units": "hr_nyquist", "stop": 1.0},
    "paper_decay": {"cutoff": 0.8, "cutoff_units": "hr_nyquist", "stop": 1.0, "weight": "linear_decay"},
    "paper_early": {"cutoff": 0.8, "cutoff_units": "hr_nyquist", "stop": 0.6},
    "lr_nyquist": {"cutoff": 0.8, "cutoff_units": "lr_nyquist", "stop": 1.0},
}
"""Readings of the paper's cutoff (`structure: {preset: paper}`). Explicit fields beside a preset win. The default is
`paper_early`, chosen by measurement (docs/evaluation-results.md)."""


class StructureConfig(Part):
    """Structural guidance (ResMaster eq. 5 to 7): swaps the low frequencies of each predicted x0 for those of the
    reference."""

    model_config = ConfigDict(
        json_schema_extra=offer_preset(STRUCTURE_PRESETS, "A reading of the paper's cutoff; other fields win.")
    )

    enabled: bool = True
    """Off: the paper's ablation without structural guidance."""
    cutoff: float = Field(default=0.8, ge=0.01, le=1_000_000)
    """Standard deviation of the Gaussian low-pass filter, in `cutoff_units`. The paper says 0.8."""
    cutoff_units: Literal["lr_nyquist", "hr_nyquist"] = "hr_nyquist"
    """The unit of `cutoff`: the Nyquist frequency of the low-res reference (the filter then passes the same image
    content at any scale) or of the canvas (the paper's literal wording)."""
    start: float = Field(default=0.0, ge=0, le=1)
    """Fraction of the steps after which the swap begins."""
    stop: float = Field(default=0.6, ge=0, le=1)
    """Fraction of the steps after which the swap ends. The steps after it are free to draw detail."""
    weight: Literal["constant", "linear_decay"] = "constant"
    """`linear_decay`: the weight of the swap falls from 1 to 0 over its steps."""

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and "preset" in values:
            preset = known_name("preset", values["preset"], STRUCTURE_PRESETS)
            rest = {key: value for key, value in values.items() if key != "preset"}
            return {**STRUCTURE_PRESETS[preset], **rest}
        return values

    @model_validator(mode="after")
    def _check_range(self) -> StructureConfig:
        if self.stop <= self.start:
            raise ValueError(f"stop ({self.stop}) must be greater than start ({self.start})")
        return self
