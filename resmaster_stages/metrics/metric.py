"""Defines what a metric is: a function of one sample's images, with a description of its columns for tables and pages.

The file of a metric ends with its `Metric`, and `resmaster_stages.metrics.METRICS` lists all metrics. The tables'
schemas, flags, badness, report, summary, dataset card and comparison derive from that list.

Invariant: importing the list is quick, also for `resmaster status`. So a metric's file imports slow packages (torch,
transformers, scipy) inside the functions that use them, and none of the files needs pyarrow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from PIL import Image

from resmaster_stages.config.dataset import QualityConfig
from resmaster_stages.metrics.crops import Box
from resmaster_stages.metrics.luminance import Array, rgb

if TYPE_CHECKING:
    from resmaster_stages.metrics.clip_score import ClipScorer
    from resmaster_stages.metrics.score_models import ScoreModel

Value = float | str | None
"""The content of a cell of the quality table. None: the metric cannot measure the sample."""


@dataclass(frozen=True, eq=False)
class Pair:
    """The input of a metric: a high-res image with its low-res image, views, prompt and CLIP model."""

    low: Image.Image
    high: Image.Image
    boxes: Sequence[Box]
    """The views, in px of `high`."""
    prompt: str = ""
    clip: ClipScorer | None = None
    """The model that `quality.clip` names. None if it names none."""
    score_models: Mapping[str, ScoreModel] = field(default_factory=dict)
    """The models that `quality.aesthetic`, `quality.safety` and `quality.watermark` name, by these fields."""

    @cached_property
    def low_rgb(self) -> Array:
        """`low` as float32 [h, w, 3], 0 to 255. Do not write to it."""
        return rgb(self.low)

    @cached_property
    def high_rgb(self) -> Array:
        """`high` as float32 [H, W, 3], 0 to 255. Do not write to it."""
        return rgb(self.high)


@dataclass(frozen=True)
class Flag:
    """A flag that a sample gets if a value is too low or too high."""

    name: str
    meaning: str
    below: str | float | None = None
    """Values below this limit raise the flag. The limit is a number or the name of a field of `QualityConfig`."""
    above: str | float | None = None
    """Values above this limit raise the flag. The limit is given as in `below`."""
    badness: float = 2.0
    """What the flag adds to a sample's badness."""

    def raised(self, value: Value, config: QualityConfig) -> bool:
        """Whether a value raises the flag by the thresholds of `config`. None and text never do."""
        if not isinstance(value, int | float):
            return False
        below, above = (
            getattr(config, limit) if isinstance(limit, str) else limit for limit in (self.below, self.above)
        )
        return (below is not None and value < below) or (above is not None and value > above)


@dataclass(frozen=True)
class Column:
    """A column of a table, and how pages show it."""

    name: str
    """Name of the column in the tables."""
    meaning: str
    """What the column says, as a phrase without a full stop. Report, summary, dataset card and comparison show it."""
    label: str = ""
    """Name of the column on pages. A column without a label is in the tables only."""
    form: str = "{:.2f}"
    """Format of a value on pages, for `str.format`."""
    better: Literal["↑", "↓", ""] = ""
    """The direction of better values. Without a direction, low values count as the worst."""
    kind: str = "float64"
    """Type in Parquet, by Arrow's name: `float64` or `string`."""
    compared: bool = False
    """Whether a comparison of methods shows the mean of the column."""
    flag: Flag | None = None
    """The flag that a value of the column may raise."""
    badness: tuple[float, float] | None = None
    """The values that add 0 and 1 to a sample's badness. Values between add in proportion. None: the column adds
    nothing."""

    @property
    def heading(self) -> str:
        """The label with the direction of better values: `seam ↓`."""
        return f"{self.label} {self.better}".strip()


@dataclass(frozen=True)
class Metric:
    """One computation that fills one or several columns."""

    compute: Callable[[Pair], Sequence[Value]]
    """Gives the values of a sample, one per column, in order."""
    columns: tuple[Column, ...]
    setting: str = ""
    """The field of `QualityConfig` that names the model of the metric. A dataset that names none has no such columns.
    "": every dataset has them."""

    def asked(self, config: QualityConfig) -> bool:
        """Whether a dataset has the metric's columns."""
        return not self.setting or getattr(config, self.setting) is not None

    def measure(self, pair: Pair) -> dict[str, Value]:
        """Column name -> value. Raises ValueError if `compute` does not give one value per column."""
        return dict(zip((column.name for column in self.columns), self.compute(pair), strict=True))
