"""Which part of a method falls short: scenes whose true enlargement is known, enlarged with parts exchanged for the
truth.

    python benchmarks/true_scenes.py                       # 24 scenes, 128 to 512 px, the default rows
    python benchmarks/true_scenes.py --n 8 --methods lanczos,resmaster,resmaster@true,resmaster-tip

A scene of the picturebook's world is drawn at 128 px, enlarged, and held against the same scene drawn at 512 px.
Methods are written as for `resmaster compare`; `@true` behind one gives every view a true sentence of what it shows, in
place of the captioner's. The low-res images are true, so the low-res model plays no part; true captions take the
captioner away; the row of the VAE takes all but the VAE away. What is left is the UNet's and the method's share.
*Details redrawn* is the same scene with other leaves, stones and bricks: what an image gets whose detail is right in
kind and wrong in place. *Seam* looks at the borders of the row's own views. Finished images are kept under --out: the
same command goes on where it was stopped; other weights have a folder of their own. Needs `resvg_py` (the extra
`train`).

Cells: means over the scenes, `±` one standard error; *against the first*: the difference of distances, scene by scene;
*FID against the first*: the difference, its standard error by leaving out one scene at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import GitForCausalLM

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import load_config
from resmaster_stages.diffusion.cost import counting
from resmaster_stages.diffusion.views import Grid, view_grid
from resmaster_stages.evaluation.variants import variants
from resmaster_stages.high_res import caption_views
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.metrics.detail import detail_energy
from resmaster_stages.metrics.features import load_classifier
from resmaster_stages.metrics.fid import FeatureStatistics, frechet_distance
from resmaster_stages.metrics.seam import seam_ratio
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from resmaster_stages.picturebook import captions
from resmaster_stages.picturebook.scenes import HEIGHT, Scene
from resmaster_stages.picturebook.training import paired
from resmaster_stages.picturebook.training.evaluate import SCENE_SEED, as_pixels, describe_all, square_scenes
from resmaster_stages.picturebook.training.export import PACK

CONFIG = Path(__file__).parent.parent / "deployments" / "datasets" / "picturebook-evaluation.yaml"
FIRST_SCENE = SCENE_SEED + 5_000_000
"""These scenes are not those of the pack's own evaluation."""
TILED = "multidiffusion:init=noised_lr:start={start}:stride=0.75:fuse=linear"
SHORT = "resmaster{parts}:steps=14:shift_stop=0.7"
"""ResMaster at 1.4 times the rows of tiled img2img."""
METHODS = ",".join(
    [
        *(TILED.format(start=start) for start in (0.65, 0.5)),
        "lanczos",
        "super_resolution",
        "c_upscale",
        SHORT.format(parts=""),
        SHORT.format(parts="") + "@true",
        *(SHORT.format(parts=parts) for parts in ("-etp", "-tip", "-sg")),
        SHORT.format(parts="") + ":start=0.5",
        "resmaster:steps=25",
    ]
)
VAE = "drawings through the VAE"
REDRAWN = "drawings, details redrawn"


@dataclass(frozen=True)
class Row:
    """A method with the images that it made."""

    name: str
    images: list[Image.Image]
    rows: float | None
    """UNet rows per image."""
    views: Grid
    """Whose borders are looked at for seams."""


def views_of(models: Models, config: DatasetConfig, height: int, width: int) -> Grid:
    """The views that an image of `height` x `width` px is made from."""
    return view_grid(models.geometry, height, width, config.upscale.view_stride)


def true_captions(scene: Scene, models: Models, config: DatasetConfig, height: int, width: int) -> list[str]:
    """A true sentence for every view of a target of `height` x `width` px, row-major."""
    boxes = views_of(models, config, height, width).pixel_boxes
    unit = HEIGHT / height
    return [captions.caption(scene, (x0 * unit, y0 * unit, x1 * unit, y1 * unit)) for y0, x0, y1, x1 in boxes]


def redrawn(scene: Scene) -> Scene:
    """The same things in the same places; what of them is left to chance comes out otherwise."""
    return replace(scene, seed=scene.seed + 1, things=tuple(replace(each, seed=each.seed + 1) for each in scene.things))


def enlarge(
    models: Models, config: DatasetConfig, scene: Scene, image: Image.Image, prompt: str, seed: int, true: bool
) -> tuple[Image.Image, int]:
    """A scene's small drawing by a method, and the UNet rows that it took."""
    large = paired.SCALE * image.height, paired.SCALE * image.width
    texts = None
    if true:
        texts = true_captions(scene, models, config, *large)
    elif config.upscale.uses("captions"):
        texts = caption_views(config, prompt, image, *large)
    with counting() as cost:
        made = upscale_image(models, image, prompt, config=config.upscale, captions=texts, seed=seed)
    return made, cost.rows


def images_of(text: str, shown: paired.TrueScenes, found: Sequence[Scene], models: Models, out: Path) -> Row:
    """All scenes by one method; what lies in `out` already is read."""
    method, at, source = text.partition("@")
    if at and source != "true":
        raise SystemExit(f"--methods {text}: write @true, or nothing")
    (variant,) = variants(load_config(CONFIG), method, f"{paired.SCALE}x{paired.SCALE}")
    if at and not variant.config.upscale.uses("captions"):
        raise SystemExit(f"--methods {text}: this method reads no captions")
    folder = out / (variant.config.name + ("-true" if at else ""))
    folder.mkdir(parents=True, exist_ok=True)
    made, rows = [], []
    for n, (scene, image, prompt) in enumerate(zip(found, shown.low_res, shown.prompts)):
        path, counted = folder / f"{n:03d}.png", folder / f"{n:03d}.json"
        if not counted.exists():
            large, cost = enlarge(models, variant.config, scene, image, prompt, n, bool(at))
            large.save(path)
            counted.write_text(json.dumps({"rows": cost}))
            print(f"{text}: {n + 1} of {len(found)}", flush=True)
        made.append(Image.open(path).convert("RGB"))
        rows.append(json.loads(counted.read_text())["rows"])
    return Row(text, made, float(np.mean(rows)), views_of(models, variant.config, made[0].height, made[0].width))


def _spread(values: np.ndarray) -> str:
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{values.mean():+.3f} ± {error:.3f}"


def fids(made: Sequence[np.ndarray], drawn: Sequence[np.ndarray]) -> np.ndarray:
    """FID of the squares of all scenes, then without each scene in turn: [1 + scenes]."""
    found = []
    for left_out in (None, *range(len(drawn))):
        kept = [n for n in range(len(drawn)) if n != left_out]
        sides = (FeatureStatistics.of(np.concatenate([side[n] for n in kept])) for side in (made, drawn))
        found.append(frechet_distance(*sides))
    return np.array(found)


def jackknife(values: np.ndarray) -> float:
    """The standard error of a figure of all scenes, from `values` [1 + scenes] as `fids` gives them."""
    parts = values[1:]
    return float((np.square(parts - parts.mean()).sum() * (len(parts) - 1) / len(parts)) ** 0.5)


def table(rows: Sequence[Row], shown: paired.TrueScenes, by: paired.Judge) -> list[str]:
    """Markdown, a line per row."""
    head = [
        "row",
        "distance ↓",
        "against the first",
        "FID of squares ↓",
        "FID against the first",
        "PSNR ↑",
        "agreement ↑",
        "detail",
        "seam",
        "pairs ↑",
        "rows",
    ]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    drawn = paired.square_features(shown.drawings, by.extractor)
    first: np.ndarray | None = None
    first_squares = np.empty(0)
    for row in rows:
        judged = paired.judge(row.images, shown, by)
        distances = np.array(paired.distances(row.images, shown, by))
        squares = fids(paired.square_features(row.images, by.extractor), drawn)
        if first is None:
            first, first_squares = distances, squares
        apart = squares - first_squares
        seam = np.mean([seam_ratio(large, row.views.pixel_boxes) for large in row.images])
        detail = np.mean([detail_energy(large, *low.size) for large, low in zip(row.images, shown.low_res)])
        cells = [
            f"`{row.name}`" if row.rows is not None else row.name,
            _spread(distances).lstrip("+"),
            _spread(distances - first) if distances is not first else "",
            f"{judged.fid:.1f}",
            f"{apart[0]:+.1f} ± {jackknife(apart):.1f}" if distances is not first else "",
            f"{judged.psnr:.1f}",
            f"{judged.agreement:.1f}",
            f"{detail:.4f}",
            f"{seam:.2f}",
            f"{judged.pairs:.2f}",
            f"{row.rows:,.0f}" if row.rows is not None else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/true_scenes.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--n", type=int, default=24, help="scenes")
    parser.add_argument(
        "--methods", default=METHODS, help="as for resmaster compare, @true behind a method for true captions"
    )
    parser.add_argument("--out", type=Path, default=Path("out/true-scenes"), help="finished images are kept here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(words)
    found = square_scenes(options.n, FIRST_SCENE)
    shown = paired.draw(found)
    models = load_models(load_config(CONFIG).model.model_copy(update={"device": options.device}))
    captioner = GitForCausalLM.from_pretrained(PACK / "captioner").to(options.device).float().eval()
    by = paired.Judge(
        load_classifier(PACK, options.device),
        lambda images: [captions.pairs(text) for text in describe_all(captioner, as_pixels(list(images)))],
    )
    weights = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(PACK.rglob("*.safetensors")))).hexdigest()
    out = options.out / weights[:12]
    rows = [images_of(text.strip(), shown, found, models, out) for text in options.methods.split(",")]
    views = views_of(models, load_config(CONFIG), shown.drawings[0].height, shown.drawings[0].width)
    rows.append(Row(VAE, [paired.round_trip(models, drawing) for drawing in shown.drawings], None, views))
    rows.append(Row(REDRAWN, paired.draw([redrawn(scene) for scene in found]).drawings, None, views))
    rows.append(Row("the drawings", shown.drawings, None, views))
    print("\n".join(table(rows, shown, by)))


if __name__ == "__main__":
    main()
