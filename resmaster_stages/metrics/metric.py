"""What a metric is: a function of one sample's images, and what tables and pages say of its columns. Knows no metric.

The file of a metric ends in its `Metric`, and `resmaster_stages.metrics.METRICS` lists it. The tables' schemas, flags,
badness, report, summary, dataset card and comparison derive from that list.

Invariant: whoever needs the list gets it at once, `resmaster status` too. A metric's file imports what loads slowly
(torch, transformers, scipy) in the functions that use it, and nobody needs pyarrow for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from PIL import Image

from resmaster_stages.config.dataset import QualityConfig
from resmaster_stages.metrics.crops import Box
from resmaster_stages.metrics.luminance import Array, rgb

if TYPE_CHECKING:
    from resmaster_stages.metrics.clip_score import ClipScorer

Value = float | str | None
"""What a cell of the quality table holds. None: the sample cannot be measured by this metric."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A high-res image with all that it may be judged by."""

    low: Image.Image
    high: Image.Image
    boxes: Sequence[Box]
    """The views, in px of `high`."""
    prompt: str = ""
    clip: ClipScorer | None = None
    """The model that `quality.clip` names; None where it names none."""

    @cached_property
    def low_rgb(self) -> Array:
        """`low` as float32 [h, w, 3], 0 to 255; not to be written to."""
        return rgb(self.low)

    @cached_property
    def high_rgb(self) -> Array:
        """`high` as float32 [H, W, 3], 0 to 255; not to be written to."""
        return rgb(self.high)


@dataclass(frozen=True)
class Flag:
    """What a value that is too low or too high says of a sample."""

    name: str
    meaning: str
    below: str | float | None = None
    """Values below this raise the flag: a number, or the name of a field of `QualityConfig`."""
    above: str | float | None = None
    """Values above this raise the flag, as in `below`."""
    badness: float = 2.0
    """What the flag adds to a sample's badness."""

    def raised(self, value: Value, config: QualityConfig) -> bool:
        """Whether a value raises the flag by the thresholds of `config`. None and text raise none."""
        if not isinstance(value, int | float):
            return False
        below, above = (
            getattr(config, limit) if isinstance(limit, str) else limit for limit in (self.below, self.above)
        )
        return (below is not None and value < below) or (above is not None and value > above)


@dataclass(frozen=True)
class Column:
    """One number of a table, and how pages show it."""

    name: str
    """The column in the tables."""
    meaning: str
    """What it says, as a phrase without a full stop: shown in report, summary, dataset card and comparison."""
    label: str = ""
    """What pages call it; a column without a label is in the tables only."""
    form: str = "{:.2f}"
    """How pages write a value, as for `str.format`."""
    better: Literal["↑", "↓", ""] = ""
    """The direction of better values. Without one, low values are those to look at."""
    kind: str = "float64"
    """Its type in Parquet, by Arrow's name: `float64` or `string`."""
    compared: bool = False
    """Whether a comparison of methods shows its mean."""
    flag: Flag | None = None
    """The flag that it raises."""
    badness: tuple[float, float] | None = None
    """The values that add 0 and 1 to a sample's badness, those between in proportion. None: it adds nothing."""

    @property
    def heading(self) -> str:
        """The label with the direction of better values: `seam ↓`."""
        return f"{self.label} {self.better}".strip()


@dataclass(frozen=True)
class Metric:
    """One computation, of one column or several."""

    compute: Callable[[Pair], Sequence[Value]]
    """The values of a sample, one per column, in order."""
    columns: tuple[Column, ...]

    def measure(self, pair: Pair) -> dict[str, Value]:
        """Column -> value. Raises ValueError if `compute` gives more or fewer values than there are columns."""
        return dict(zip((column.name for column in self.columns), self.compute(pair), strict=True))
