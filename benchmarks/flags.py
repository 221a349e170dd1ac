"""How well the quality flags find planted faults, and how often they are wrong: the table that thresholds rest on.

    python benchmarks/flags.py                                    # drawings: 64 prompts, 128 to 512 px
    python benchmarks/flags.py --n 16 --values                    # with the spread of every number
    python benchmarks/flags.py --dataset out/picturebook          # with a row of a dataset's own images

A drawing of the picturebook's world is its own low-res and high-res image: the same scene at 128 and at 512 px. Each
fault is planted in the high-res one alone, at a place and in a way that follow from the prompt. Needs `resvg_py` (the
extra `train`).

Cells: share of samples that get the flag. A dataset's row has no truth: what is flagged there is to be looked at.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter, map_coordinates

from resmaster_stages.config.dataset import QualityConfig
from resmaster_stages.diffusion.views import Box, view_grid
from resmaster_stages.keys import digest
from resmaster_stages.metrics.flags import flags
from resmaster_stages.metrics.metric import Pair
from resmaster_stages.metrics.oklab import oklab
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.picturebook.render import render
from resmaster_stages.picturebook.scenes import COLOURS, HEIGHT, KINDS, Scene, Thing, drawing
from resmaster_stages.picturebook.truth import true_scene
from resmaster_stages.quality import measure

PROMPTS = Path(__file__).parent.parent / "resmaster_stages" / "picturebook" / "evaluation-prompts.txt"
LOW_PX, HIGH_PX = 128, 512
STRIDE = 0.5
"""Distance of views, over their size: the default of a method's `stride`."""
LEAST_SEEN, LEAST_PX = 5.0, 50
"""Mean difference (Oklab times 100) of the low-res px that a fault changes, and their number: fainter is no test."""
SHOWN = ("border", "lost", "added", "colour")
"""The flags that the table is about."""
COLUMNS = ("seam_worst", "lost_worst", "added_worst", "colour_worst")


@dataclass(frozen=True)
class Truth:
    """One scene, drawn twice."""

    prompt: str
    scene: Scene
    low: Image.Image
    high: Image.Image
    other: Image.Image
    """Another prompt's scene, as large as `high`."""
    rng: Random
    """What is left to chance follows from it."""

    @property
    def views(self) -> Sequence[Box]:
        """Boxes of the views of `high`, half-open (y0, x0, y1, x1), in px."""
        return view_grid(Geometry(LOW_PX, 8), HIGH_PX, HIGH_PX, STRIDE).pixel_boxes

    def drawn(self, *things: Thing) -> Image.Image:
        """The scene with these objects, in their order of depth, at high resolution."""
        return render(replace(self.scene, things=tuple(sorted(things, key=lambda t: t.y))), HIGH_PX, HIGH_PX)

    def box(self, thing: Thing) -> Box:
        """Where an object stands, in px of `high`."""
        left, top, right, bottom = (edge * HIGH_PX / HEIGHT for edge in drawing(thing).box)
        y0, x0, y1, x1 = (round(min(max(edge, 0), HIGH_PX)) for edge in (top, left, bottom, right))
        return y0, x0, max(y1, y0 + 1), max(x1, x0 + 1)

    def without(self, thing: Thing) -> Image.Image:
        """The scene without an object."""
        return self.drawn(*(t for t in self.scene.things if t is not thing))

    def one(self) -> Thing:
        """An object that can be seen: without it, the image is another."""
        found = [thing for thing in self.scene.things if self.changed_by(self.without(thing))]
        if not found:
            raise LookupError("no object can be seen")
        return self.rng.choice(found)

    def changed_by(self, image: Image.Image) -> bool:
        """Can be seen that this is not `high`?"""
        a, b = (np.asarray(each.reduce(HIGH_PX // LOW_PX), np.float32) for each in (self.high, image))
        apart = np.linalg.norm(oklab(a) - oklab(b), axis=2)
        return bool((apart > 1).sum() >= LEAST_PX and apart[apart > 1].mean() > LEAST_SEEN)


# -------------------------------------------------------------------------------------------------------------- faults


def inside(image: Image.Image, changed: Image.Image, box: Box, feather_px: float = 0) -> Image.Image:
    """`image` with what `changed` shows in `box`."""
    y0, x0, y1, x1 = box
    mask = Image.new("L", image.size)
    mask.paste(255, (x0, y0, x1, y1))
    return Image.composite(changed, image, mask.filter(ImageFilter.GaussianBlur(feather_px)) if feather_px else mask)


def recoloured(image: Image.Image, *, hue: float = 0, light: float = 0) -> Image.Image:
    """Hue turned by `hue` (share of a full turn), and `light` grey levels added."""
    h, s, v = image.convert("HSV").split()
    turned = Image.merge("HSV", (h.point(lambda x: (x + round(hue * 256)) % 256), s, v)).convert("RGB")
    return Image.fromarray((np.asarray(turned).astype(np.float32) + light).clip(0, 255).astype(np.uint8))


def view(truth: Truth, share: float = 1.0) -> Box:
    """A view, or the part of one from a border line to the next."""
    y0, x0, _, _ = truth.rng.choice(truth.views)
    side = round(LOW_PX * share)
    return y0, x0, y0 + side, x0 + side


def quarter(truth: Truth) -> Box:
    y0, x0 = truth.rng.choice([0, HIGH_PX // 2]), truth.rng.choice([0, HIGH_PX // 2])
    return y0, x0, y0 + HIGH_PX // 2, x0 + HIGH_PX // 2


def foreign(truth: Truth, share: float = 1.0) -> Image.Image:
    """A rectangle of another scene, from another place."""
    y0, x0, y1, x1 = view(truth, share)
    left, top = (truth.rng.randrange(HIGH_PX - (y1 - y0)) for _ in "xy")
    high = truth.high.copy()
    high.paste(truth.other.crop((left, top, left + x1 - x0, top + y1 - y0)), (x0, y0))
    return high


def bright(truth: Truth, share: float = 1.0) -> Image.Image:
    box = view(truth, share)
    return inside(truth.high, shifted(truth, box), box)


def shifted(truth: Truth, box: Box) -> Image.Image:
    """25 grey levels lighter or darker, to where there is room in `box`."""
    y0, x0, y1, x1 = box
    mean = np.asarray(truth.high.crop((x0, y0, x1, y1)).convert("L")).mean()
    return recoloured(truth.high, light=25 if mean < 128 else -25)


def hard(truth: Truth) -> Image.Image:
    """A rectangle of bars in two colours of the world."""
    a, b = (
        np.array([int(COLOURS[name][1][i : i + 2], 16) for i in (1, 3, 5)])
        for name in truth.rng.sample(sorted(COLOURS), 2)
    )
    y, x = np.indices((HIGH_PX, HIGH_PX))
    bars = ((y if truth.rng.random() < 0.5 else x) // truth.rng.choice([4, 8, 16]) % 2)[:, :, None]
    return inside(truth.high, Image.fromarray(np.where(bars, a, b).astype(np.uint8)), view(truth))


def removed(truth: Truth) -> Image.Image:
    return truth.without(truth.one())


def faded(truth: Truth) -> Image.Image:
    """An object of which a quarter is left, as through fog."""
    return Image.blend(truth.without(truth.one()), truth.high, 0.25)


def smeared(truth: Truth) -> Image.Image:
    """An object blurred by a quarter of its smaller side."""
    y0, x0, y1, x1 = box = truth.box(truth.one())
    blur = min(y1 - y0, x1 - x0) / 4
    return inside(truth.high, truth.high.filter(ImageFilter.GaussianBlur(blur)), box, blur / 2)


def repeated(truth: Truth) -> Image.Image:
    """An object once more, elsewhere."""
    return added(truth, truth.one())


def added(truth: Truth, like: Thing | None = None) -> Image.Image:
    """An object that the low-res image has not: like one of them, or of another kind."""
    rng = truth.rng
    for _ in range(50):
        if like is None:
            kind = KINDS[rng.choice([name for name, kind in KINDS.items() if truth.scene.ground in kind.grounds])]
            size = rng.uniform(*kind.sizes) * 0.8
            thing = Thing(kind.name, rng.choice(kind.colours), 0, 0, size, rng.getrandbits(31))
        else:
            thing = like
        floats = KINDS[thing.kind].floats
        y = rng.uniform(thing.size + 10, 300) if floats else rng.uniform(max(truth.scene.horizon + 12, thing.size), 500)
        thing = replace(thing, x=round(rng.uniform(40, HEIGHT - 40), 1), y=round(y, 1))
        changed = truth.drawn(*truth.scene.things, thing)
        if all(_apart(truth.box(thing), truth.box(t)) for t in truth.scene.things) and truth.changed_by(changed):
            return changed
    raise LookupError("no room for one more object")


def _apart(a: Box, b: Box) -> bool:
    """Do two boxes overlap by less than a third of the first?"""
    height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0, height) * max(0, width) < (a[2] - a[0]) * (a[3] - a[1]) / 3


def other_colour(truth: Truth) -> Image.Image:
    """An object in another of its colours."""
    thing = truth.one()
    colour = truth.rng.choice([c for c in KINDS[thing.kind].colours if c != thing.colour])
    return truth.drawn(*(replace(t, colour=colour) if t is thing else t for t in truth.scene.things))


def bright_quarter(truth: Truth) -> Image.Image:
    box = quarter(truth)
    return inside(truth.high, shifted(truth, box), box, 16)


def hued_quarter(truth: Truth) -> Image.Image:
    return inside(truth.high, recoloured(truth.high, hue=0.1), quarter(truth), 16)


# --------------------------------------------------------------------------------------------------------------- clean


def enlarged(truth: Truth) -> Image.Image:
    return truth.low.resize(truth.high.size, Image.Resampling.LANCZOS)


def grainy(truth: Truth) -> Image.Image:
    """White noise of 12 grey levels on all channels."""
    noise = np.random.default_rng(truth.rng.getrandbits(31)).normal(0, 12, (HIGH_PX, HIGH_PX, 3))
    return Image.fromarray((np.asarray(truth.high) + noise).clip(0, 255).astype(np.uint8))


def moved(truth: Truth) -> Image.Image:
    """Contours redrawn up to 2 px (half a low-res px) away, as models do."""
    rng = np.random.default_rng(truth.rng.getrandbits(31))
    shifts = [gaussian_filter(rng.normal(size=(HIGH_PX, HIGH_PX)), 16) for _ in range(2)]
    places = [grid + 2 * shift / np.abs(shift).max() for grid, shift in zip(np.indices((HIGH_PX, HIGH_PX)), shifts)]
    values = np.asarray(truth.high)
    found = [map_coordinates(values[:, :, c], places, order=1, mode="reflect") for c in range(3)]
    return Image.fromarray(np.stack(found, axis=2))


def textured(truth: Truth) -> Image.Image:
    """Fine bars of 30 grey levels all over, finer than the low-res image could hold."""
    bars = (np.indices((HIGH_PX, HIGH_PX)).sum(axis=0) // 2 % 2 * 30 - 15)[:, :, None]
    return Image.fromarray((np.asarray(truth.high).astype(np.int64) + bars).clip(0, 255).astype(np.uint8))


Plant = Callable[[Truth], Image.Image]
CLEAN: dict[str, Plant] = {
    "clean: drawn at both sizes": lambda truth: truth.high,
    "clean: enlarged (Lanczos)": enlarged,
    "clean: grain of 12 grey levels": grainy,
    "clean: fine texture": textured,
    "clean: contours half a low-res px off": moved,
}
FAULTS: dict[str, tuple[str, Plant]] = {
    "foreign rectangle, a view": ("border", foreign),
    "foreign rectangle, half a view": ("border", lambda truth: foreign(truth, 0.5)),
    "25 grey levels off, a view": ("border", bright),
    "25 grey levels off, half a view": ("border", lambda truth: bright(truth, 0.5)),
    "hard bars, a view": ("border", hard),
    "object removed": ("lost", removed),
    "object three quarters faded": ("lost", faded),
    "object smeared": ("lost", smeared),
    "object repeated": ("added", repeated),
    "object of another kind added": ("added", added),
    "object in another colour": ("colour", other_colour),
    "hue turned by a tenth, all": ("colour", lambda truth: recoloured(truth.high, hue=0.1)),
    "hue turned by a tenth, a quarter": ("colour", hued_quarter),
    "25 grey levels off, all": ("colour", lambda truth: shifted(truth, (0, 0, HIGH_PX, HIGH_PX))),
    "25 grey levels off, a quarter": ("colour", bright_quarter),
}
"""What is planted -> the flag that should find it, and how."""


# --------------------------------------------------------------------------------------------------------------- table


def truths(count: int, seed: int = 0) -> Iterator[Truth]:
    """A pair of images per prompt."""
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()[:count]
    scenes = [true_scene(prompt, HEIGHT, seed) for prompt in prompts]
    for at, (prompt, scene) in enumerate(zip(prompts, scenes)):
        high, other = (render(each, HIGH_PX, HIGH_PX) for each in (scene, scenes[(at + 1) % len(scenes)]))
        yield Truth(prompt, scene, render(scene, LOW_PX, LOW_PX), high, other, Random(seed))


def planted(count: int, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Name of a clean class or fault -> quality rows of its samples. A fault that can hardly be seen is left out."""
    plants = CLEAN | {name: plant for name, (_, plant) in FAULTS.items()}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in plants}
    for drawn in truths(count, seed):
        for name, plant in plants.items():
            truth = replace(drawn, rng=Random(int(digest([drawn.prompt, seed, name])[:12], 16)))
            try:
                image = plant(truth)
            except LookupError:
                continue
            if name in CLEAN or truth.changed_by(image):
                rows[name].append(measure(Pair(truth.low, image, truth.views)))
    return rows


def of_dataset(folder: Path, native_px: int = LOW_PX) -> list[dict[str, Any]]:
    """The quality rows of a dataset's own images, measured anew."""
    rows = []
    for sample in pq.read_table(folder / "manifest.parquet").to_pylist():
        low, high = (image(folder, sample, name) for name in ("low_res", "high_res"))
        boxes = view_grid(Geometry(native_px, 8), high.height, high.width, STRIDE).pixel_boxes
        rows.append({"key": sample["key"], **measure(Pair(low, high, boxes))})
    return rows


def image(folder: Path, sample: dict[str, Any], name: str) -> Image.Image:
    with (folder / sample[f"{name}_object"]).open("rb") as file:
        file.seek(sample[f"{name}_offset"])
        return Image.open(io.BytesIO(file.read(sample[f"{name}_bytes"]))).convert("RGB")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=64, help="prompts")
    parser.add_argument("--seed", type=int, default=0, help="other layouts of the same prompts")
    parser.add_argument("--values", action="store_true", help="also the 5th, 50th and 95th percentile of every number")
    parser.add_argument(
        "--dataset", type=Path, action="append", default=[], help="a dataset's folder, views of 128 px; may be repeated"
    )
    options = parser.parse_args(argv)
    rows = planted(options.n, options.seed) | {folder.name: of_dataset(folder) for folder in options.dataset}
    config = QualityConfig()
    print("| images | samples | should raise | " + " | ".join(SHOWN) + " | any of these |")
    print("| --- | ---: | --- |" + " ---: |" * (len(SHOWN) + 1))
    for name, found in rows.items():
        raised = [flags(row, config) for row in found]
        hits = [*([flag in each for each in raised] for flag in SHOWN), [bool({*each} & {*SHOWN}) for each in raised]]
        shares = [f"{np.mean(hit):.0%}" if hit else "–" for hit in hits]
        wanted = FAULTS[name][0] if name in FAULTS else "none" if name in CLEAN else ""
        print(f"| {name} | {len(found)} | {wanted} | " + " | ".join(shares) + " |")
    if options.values:
        print("\n| images | " + " | ".join(COLUMNS) + " |")
        print("| --- |" + " ---: |" * len(COLUMNS))
        for name, found in rows.items():
            if not found:
                continue
            values = [np.percentile([row[column] for row in found], [5, 50, 95]) for column in COLUMNS]
            print(f"| {name} | " + " | ".join(" / ".join(f"{v:.2f}" for v in each) for each in values) + " |")


if __name__ == "__main__":
    main()
