"""Estimates the hours, money and bytes of a run, from measured commits if there are any, else from a table.

Every number has a source. An unknown number is None, never a guess.

The estimate leaves out loading of models, start of workers, retries, and reads (a stage reads its upstream objects
once).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from resmaster_stages.config.dataset import DatasetConfig, DispatchConfig
from resmaster_stages.config.image_format import ImageFormat, lossless_format
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.diffusion.cost import UnetWork
from resmaster_stages.diffusion.views import patch_grid, target_size
from resmaster_stages.errors import UserError
from resmaster_stages.inspection.spending import SECONDS_PER_HOUR, Spending, spell_money, spell_time
from resmaster_stages.models.bases import family_of
from resmaster_stages.models.bases.unet import like_sdxl
from resmaster_stages.models.geometry import geometry_of
from resmaster_stages.models.identity import PACK_MODELS, PICTUREBOOK
from resmaster_stages.planning.preview import Preview, StagePreview
from resmaster_stages.planning.workload import stage_work
from resmaster_stages.storage.filesystem import open_root

MEASURED_COMMITS = 100
"""Number of commits of a stage (the last by shard number) from which its speed is measured."""


@dataclass(frozen=True)
class Rates:
    """The UNet speed of a model on one device."""

    device: str
    source: str
    """The source of the numbers."""
    row: tuple[tuple[float, float], ...]
    """Two or more (area in native views, seconds of one row of that area), sorted by area. Between and beyond these
    points, power laws are used."""

    def unet(self, work: Sequence[UnetWork]) -> float:
        """Seconds that `work` takes."""
        return sum(each.rows * each.share * self.row_seconds(each.area) for each in work)

    def row_seconds(self, area: float) -> float:
        """Seconds of one row with an area of `area` native views."""
        pairs = list(zip(self.row, self.row[1:]))
        (x0, y0), (x1, y1) = next((pair for pair in pairs if area <= pair[1][0]), pairs[-1])
        return float(y0 * (area / x0) ** (math.log(y1 / y0) / math.log(x1 / x0)))


PICTUREBOOK_RATES = Rates(
    device="two shared CPU cores",
    source="measured by this project: one run of deployments/datasets/picturebook.yaml, 16 samples, canvases taken as "
    "linear",
    row=((1.0, 0.011), (16.0, 16 * 0.011)),
)
CAPTION_SECONDS = 0.008
"""Time to caption one patch by picturebook's captioner, from the same run."""
CHECK_SECONDS = 0.0027
"""Time to check one caption by picturebook's CLIP: a third of the time of captioning, both measured in sequence."""
RECAPTION_SECONDS = 0.05
"""Time to caption one whole image by picturebook's captioner, which is asked about one image at a time."""
REDUCING_SECONDS = 0.035
"""Time to decode and to reduce an image before that, per megapixel; both on images of 512 and 2048 px."""
QUALITY_SECONDS = 0.75
"""Time of the quality stage per megapixel, with picturebook's CLIP, from the same run."""
SDXL_RATES = Rates(
    device="one A100 or A800",
    source="estimate: 0.122 s per guided native view, 0.78 s per guided canvas of 2048 px and 6.55 s of 4096 px, "
    "calibrated on the times that the FreeScale paper reports on an A800 (DemoFusion 86.5 s and 683 s, direct 5.46 "
    "min); UNet only",
    row=((1.0, 0.061), (4.0, 0.39), (16.0, 3.275)),
)

BYTES_PER_PIXEL = {"webp": 0.15, "png": 0.85, "avif": 0.19, "jxl": 0.20, "lossless webp": 1.0, "lossless jxl": 0.71}
BYTES_SOURCE = (
    "measured on 13 photographs (Debian's lomiri-wallpapers-16.04, 2048 px, WebP of quality 95; low-res 512 px "
    "without loss; AVIF of 90 and JPEG XL of 95 on 15 of them); busy images take several times as much"
)
ROW_BYTES = {"captions": 48, "quality": 1200, "recaptions": 640}
"""Parquet bytes per patch and, in the other tables, per sample, measured on picturebook in shards of four."""


@dataclass(frozen=True)
class StageEstimate:
    """The work that is left in one stage. `seconds` is for one device; None if unknown."""

    stage: str
    shards: int
    samples: int
    seconds_per_sample: float | None
    seconds: float | None
    seconds_source: str
    bytes: float
    bytes_source: str


@dataclass(frozen=True)
class Estimate:
    """The estimate of a run."""

    stages: tuple[StageEstimate, ...]
    workers: int
    price: float | None
    """Price of a worker's hour, in any currency."""
    shards: int
    """Shards with work left in some stage."""
    spent_seconds: float = 0.0
    """Device seconds that the dataset has cost so far."""

    @property
    def unknown(self) -> tuple[str, ...]:
        """Stages with work left whose time is not known."""
        return tuple(stage.stage for stage in self.stages if stage.seconds is None)

    @property
    def device_hours(self) -> float:
        """Hours of one device for all stages whose time is known."""
        return sum(stage.seconds or 0.0 for stage in self.stages) / 3600

    @property
    def cost(self) -> float | None:
        """Device hours times price; None without a price."""
        return None if self.price is None else self.device_hours * self.price

    @property
    def spent(self) -> float | None:
        """What the dataset has cost so far; None without a price."""
        return None if self.price is None else self.spent_seconds / SECONDS_PER_HOUR * self.price

    def warnings(self, limits: DispatchConfig) -> list[str]:
        """Which limits of a build are lower than the estimate, in words. Stages whose time is not known count nothing,
        so the estimate may be too low, but a limit that it passes is passed."""
        found = []
        if limits.max_cost is not None and self.cost is not None and self.spent is not None:
            total = self.spent + self.cost
            if self.shards and total > limits.max_cost:
                end = _part(limits.max_cost - self.spent, self.cost)
                found.append(
                    f"above the budget: {spell_money(self.spent)} spent and {spell_money(self.cost)} to come make "
                    f"{spell_money(total)}, and max_cost is {spell_money(limits.max_cost)}: the build will stop {end}"
                )
        if limits.max_hours is not None and self.wall_seconds > limits.max_hours * 3600:
            found.append(
                f"longer than allowed: {spell_time(self.wall_seconds)}, and max_hours is {limits.max_hours:g}: the "
                f"build will stop {_part(limits.max_hours * 3600, self.wall_seconds)}"
            )
        return found

    @property
    def bytes(self) -> float:
        """Bytes written."""
        return sum(stage.bytes for stage in self.stages)

    @property
    def wall_seconds(self) -> float:
        """Seconds until all workers are done. A shard is never split, so some workers may idle in the last round."""
        if not self.shards:
            return 0.0
        rounds = math.ceil(self.shards / self.workers)
        return rounds * self.device_hours * 3600 / self.shards


def _part(allowed: float, needed: float) -> str:
    """Where a build that needs more than is allowed will stop."""
    return "before its first shard" if allowed <= 0 else f"after about {allowed / needed:.0%} of its work"


def estimate(look: Preview, *, workers: int = 1, price: float | None = None) -> Estimate:
    """Estimate the work that is left in `look`, with one device per worker. Raises UserError for invalid numbers."""
    if workers < 1:
        raise UserError(f"--workers {workers}: give a number of at least 1")
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise UserError(f"--price {price}: give the price of one worker's hour, such as 2.5")
    stages = tuple(_stage(look, stage) for stage in look.stages)
    shards = max((stage.shards for stage in stages), default=0)
    return Estimate(stages, workers, price, shards, _spent_seconds(look))


def _spent_seconds(look: Preview) -> float:
    """Device seconds that the dataset has cost so far."""
    return Spending(open_root(look.config.root).sub(look.config.name)).seconds() if look.exists else 0.0


def _stage(look: Preview, todo: StagePreview) -> StageEstimate:
    measured = _measured(look, todo.stage)
    if measured:
        device, receipts = measured
        tried = sum(receipt.samples_ok + receipt.samples_failed for receipt in receipts)
        seconds: float | None = sum(receipt.seconds for receipt in receipts) / tried
        source = f"measured: {len(receipts)} commits of this stage on {device}"
        good = max(1, sum(receipt.samples_ok for receipt in receipts))
        size = sum(stored.bytes for receipt in receipts for stored in receipt.objects) / good
        size_source = source
    else:
        seconds, source = _from_table(look, todo.stage)
        size, size_source = _size_from_table(look, todo.stage), BYTES_SOURCE
    return StageEstimate(
        stage=todo.stage,
        shards=todo.shards_pending,
        samples=todo.samples_pending,
        seconds_per_sample=seconds,
        seconds=0.0 if not todo.samples_pending else None if seconds is None else seconds * todo.samples_pending,
        seconds_source=source,
        bytes=todo.samples_pending * size,
        bytes_source=size_source,
    )


def _measured(look: Preview, stage: str) -> tuple[str, list[Receipt]] | None:
    """The most frequent device in the stage's last commits, and its commits. None without commits."""
    if not look.exists:
        return None
    folder = open_root(look.config.root).sub(look.config.name)
    commits = Dataset(folder, look.config).commits(stage)
    numbers = commits.numbers()
    last = {shard: numbers[shard] for shard in sorted(numbers)[-MEASURED_COMMITS:]}
    receipts = [found for found in commits.read_many(last).values() if found.samples_ok + found.samples_failed]
    devices = Counter(_device(receipt) for receipt in receipts)
    if not devices:
        return None
    device = devices.most_common(1)[0][0]
    return device, [receipt for receipt in receipts if _device(receipt) == device]


def _device(receipt: Receipt) -> str:
    return str(receipt.provenance.get("gpu", "a CPU"))


def _rates(config: DatasetConfig) -> Rates | None:
    """The speed of a base model; None for all but picturebook and SDXL."""
    if config.model.id in PACK_MODELS:
        return PICTUREBOOK_RATES
    return SDXL_RATES if like_sdxl(family_of(config.model), geometry_of(config.model)) else None


def _from_table(look: Preview, stage: str) -> tuple[float | None, str]:
    """Seconds per sample of a stage from the table (None if unknown), and their source."""
    config, (height, width) = look.config, look.typical_px
    rates = _rates(config)
    nothing = "not known; build a few shards first (--limit N), then estimate again"
    if rates is None:
        return None, nothing
    source = f"{rates.source}; on {rates.device}"
    measured = f"{PICTUREBOOK_RATES.source}; on {PICTUREBOOK_RATES.device}"
    work = stage_work(config, height, width)
    if work.get(stage):
        return rates.unet(work[stage]), source
    if stage == "low_res":
        return 0.0, "your own images: copied"
    if stage == "high_res":
        return None, nothing
    if stage == "captions":
        if config.captions.source == "prompt":
            return 0.0, "the prompt is every patch's caption"
        judge = config.caption_clip()
        known = config.captions.source == "model" and config.captions.model == PICTUREBOOK
        if not known or (judge and judge[0] != PICTUREBOOK):
            return None, nothing
        each = CAPTION_SECONDS + (CHECK_SECONDS if judge else 0.0)
        return each * _patches(config, height, width), measured
    if stage == "recaptions":
        captioner = config.recaptioner()
        if captioner.source != "model" or captioner.model != PICTUREBOOK:
            return None, nothing
        seconds = len(config.recaption.styles) * RECAPTION_SECONDS + REDUCING_SECONDS * _megapixels(look)
        return seconds, f"measured by this project on picturebook; on {PICTUREBOOK_RATES.device}"
    known = config.quality.clip == PICTUREBOOK and config.quality.features in ("none", "picturebook")
    return (QUALITY_SECONDS * _megapixels(look), measured) if known else (None, nothing)


def _patches(config: DatasetConfig, height: int, width: int) -> int:
    target = target_size(height, width, config.upscale.way()[0].scale)
    return len(patch_grid(config, geometry_of(config.model), *target))


def _megapixels(look: Preview) -> float:
    """Megapixels of the typical high-res image."""
    height, width = look.typical_px
    return height * width * look.config.upscale.scale**2 / 1e6


def _size_from_table(look: Preview, stage: str) -> float:
    """Bytes per sample of a stage from the table."""
    config, (height, width) = look.config, look.typical_px
    if stage == "captions":
        return ROW_BYTES[stage] * _patches(config, height, width)
    if stage in ("quality", "recaptions"):
        return ROW_BYTES[stage]
    if stage == "low_res":
        return height * width * _bytes_per_pixel(lossless_format(config.image_format), 100)
    return _megapixels(look) * 1e6 * _bytes_per_pixel(config.image_format, config.image_quality)


def _bytes_per_pixel(image_format: ImageFormat, quality: int) -> float:
    lossless = f"lossless {image_format}"
    return BYTES_PER_PIXEL[lossless if quality == 100 and lossless in BYTES_PER_PIXEL else image_format]
