"""The part `structure` of a configuration: structural guidance. Several methods have it; the canvas engine reads it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from resmaster_stages.config.part import Later, Part, known_name, offer_preset

STRUCTURE_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"cutoff": 0.8, "cutoff_units": "hr_nyquist", "stop": 1.0},
    "paper_decay": {"cutoff": 0.8, "cutoff_units": "hr_nyquist", "stop": 1.0, "weight": "linear_decay"},
    "paper_early": {"cutoff": 0.8, "cutoff_units": "hr_nyquist", "stop": 0.6},
    "lr_nyquist": {"cutoff": 0.8, "cutoff_units": "lr_nyquist", "stop": 1.0},
    "imax": {"filter": "haar", "stop": 1.0, "weight": "cosine_decay"},
    "hiflow": {
        "filter": "butterworth",
        "cutoff": 0.2,
        "cutoff_units": "hr_nyquist",
        "stop": 1.0,
        "weight": "linear_decay",
        "anchor": "time_matched",
    },
}
"""Readings of the paper's cutoff (`structure: {preset: paper}`), and the guidance of two later papers: I-Max (2024) and
HiFlow (2025), the latter from 1024 to 2048 px. Explicit fields beside a preset win. The default is `paper_early`,
chosen by measurement (docs/evaluation-results.md)."""

_CUTOFF = ("cutoff", "cutoff_units")


class StructureConfig(Part):
    """Structural guidance (ResMaster eq. 5 to 7): swaps the low frequencies of each predicted x0 for those of the
    reference."""

    further_keys: ClassVar[tuple[str, ...]] = ("preset",)

    model_config = ConfigDict(
        json_schema_extra=offer_preset(
            STRUCTURE_PRESETS, "A reading of the paper's cutoff, or another paper's guidance; other fields win."
        )
    )

    enabled: bool = True
    """Off: the paper's ablation without structural guidance."""
    cutoff: float = Field(default=0.8, ge=0.01, le=1_000_000)
    """Standard deviation of the Gaussian filter (the paper says 0.8), or the frequency that the Butterworth filter
    halves, in `cutoff_units`. `haar` has no cutoff."""
    cutoff_units: Literal["lr_nyquist", "hr_nyquist"] = "hr_nyquist"
    """The unit of `cutoff`: the Nyquist frequency of the low-res reference (the filter then passes the same image
    content at any scale) or of the canvas (the paper's literal wording)."""
    filter: Literal["gaussian", "haar", "butterworth"] = Later("gaussian")
    """What counts as low frequencies. `gaussian`: a Gaussian blur (ResMaster). `haar`: the means of 2 x 2 latents, the
    low band of a Haar wavelet (I-Max). `butterworth`: a Butterworth filter of order 4, which falls more steeply
    (HiFlow)."""
    start: float = Field(default=0.0, ge=0, le=1)
    """Fraction of the steps after which the swap begins."""
    stop: float = Field(default=0.6, ge=0, le=1)
    """Fraction of the steps after which the swap ends. The steps after it are free to draw detail."""
    weight: Literal["constant", "linear_decay", "cosine_decay"] = "constant"
    """How the weight of the swap changes over its steps. `linear_decay`: it falls from 1 to 0. `cosine_decay`: it falls
    from 1 to 0 by half a cosine, slowly at both ends (I-Max)."""
    strength: float = Later(1.0, gt=0, le=1)
    """Factor on the weight of the swap. 1: the low frequencies are replaced. 0.25: they move a quarter of the way."""
    anchor: Literal["final", "time_matched"] = Later("final")
    """Where the low frequencies come from. `final`: the enlarged low-res image. `time_matched`: what the model predicts
    for the low-res image at the same noise level, enlarged as latents (HiFlow). This takes one prediction of the
    low-res image at each step of the swap."""

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and "preset" in values:
            preset = STRUCTURE_PRESETS[known_name("preset", values["preset"], STRUCTURE_PRESETS)]
            rest = {key: value for key, value in values.items() if key != "preset"}
            if rest.get("filter") == "haar":
                preset = {key: value for key, value in preset.items() if key not in _CUTOFF}
            return {**preset, **rest}
        return values

    @model_validator(mode="after")
    def _check_range(self) -> StructureConfig:
        if self.stop <= self.start:
            raise ValueError(f"stop ({self.stop}) must be greater than start ({self.start})")
        return self

    @model_validator(mode="after")
    def _check_cutoff(self) -> StructureConfig:
        unread = [name for name in _CUTOFF if getattr(self, name) != type(self).model_fields[name].default]
        if self.filter == "haar" and unread:
            raise ValueError(f"{unread[0]} is set, but filter haar has none; drop it, or set another filter")
        return self

    def acts(self, done: float) -> bool:
        """Whether the swap acts at a step before which the fraction `done` of the path lies."""
        return self.enabled and self.start <= done < self.stop
