"""Train a latent enlarger (`models.latent_enlarger`) for the VAE of any base model, from a folder of images or, for the
picturebook, from its scenes.

An image is encoded at its full size and at 1/4, 1/3, 1/2 and 2/3 of it, by the mode of the VAE. The network learns to
make the latents of the full size from those of a reduced one, by the L1 distance. Encoding takes longer than training,
so latents are kept in the work folder, where an interrupted run goes on. Images are not turned or mirrored, because the
latents of a mirrored image are not mirrored latents.

The rate falls by the schedule of all trainings (`course`). The authors use 2e-4, falling by a cosine, over 1 M steps of
32 images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.diffusion import autoencoder
from resmaster_stages.diffusion.reference import enlarged
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.geometry import geometry_of
from resmaster_stages.models.latent_enlarger import FINGERPRINT, EnlargerShape, LatentEnlarger, Places, network_of
from resmaster_stages.models.latent_enlarger_files import fingerprint_of, same_vae
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from resmaster_stages.picturebook.training import data
from resmaster_stages.picturebook.training.course import Budget, Course, Ema, fit, optimiser
from resmaster_stages.picturebook.training.train_super_resolution import draw_large

FOLDER = "latent_enlarger"
"""Of the network in the work folder: config.json and model.safetensors."""
REDUCED = {"1/4": (0.25, 0.5), "1/3": (1 / 3, 0.125), "1/2": (0.5, 0.25), "2/3": (2 / 3, 0.125)}
"""Name -> (size of the reduced image as a share of the full one; share of the training steps)."""
FULL = "1"
MEASURED = 16
"""The most held-out images that are decoded to be measured."""
BUDGET = Budget(seconds=1500, decay=0.7)

Images = Callable[[int], Tensor]
"""The image of a number: uint8 [3, edge, edge]."""


@dataclass(frozen=True)
class LatentRecipe:
    """The network's sizes, and how it is trained. `block` is the edge of the part of a result that is compared, in
    latents; `edge_px` that of the full images."""

    edge_px: int = 4 * data.NATIVE_PX
    dim: int = 24
    depths: tuple[int, ...] = (2, 2)
    heads: int = 4
    hidden: int = 64
    layers: int = 3
    images: int = 400
    held_out: int = 32
    batch: int = 8
    block: int = 32
    rate: float = 2e-3
    ema: float = 0.998

    def shape(self, channels: int) -> EnlargerShape:
        """The sizes of the network for latents with `channels`."""
        return EnlargerShape(
            channels, dim=self.dim, depths=self.depths, heads=self.heads, hidden=self.hidden, layers=self.layers
        )


# ----------------------------------------------------------------------------------------------------------------------
# images and their latents


def scenes(number: int) -> Tensor:
    """The picturebook's photo of a seed at 4x."""
    return torch.from_numpy(draw_large(number).copy()).permute(2, 0, 1)


def crops_of(files: Sequence[Path], edge_px: int) -> Images:
    """Random squares of image files. Raises SystemExit for a file that cannot be read or is too small."""

    def crop(number: int) -> Tensor:
        path = files[number % len(files)]
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise SystemExit(f"{path}: cannot be read as an image ({error}); take it out of the folder") from None
        if min(image.size) < edge_px:
            raise SystemExit(
                f"{path}: has {image.width} x {image.height} px; take it out of the folder, or lower --edge-px"
            )
        rng = Random(number)
        left, top = (rng.randint(0, side - edge_px) for side in image.size)
        box = image.crop((left, top, left + edge_px, top + edge_px))
        return torch.from_numpy(np.array(box)).permute(2, 0, 1)

    return crop


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder, by name. Raises SystemExit if there are fewer than two."""
    known = Image.registered_extensions()
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in known)
    if len(found) < 2:
        raise SystemExit(f"{folder}: has {len(found)} images; give a folder with at least two")
    return found


def reduced_sizes(edge_px: int, step_px: int) -> dict[str, int]:
    """The edges in px of an image's versions by name. They are multiples of `step_px`."""
    sizes = {name: max(1, round(edge_px * share / step_px)) * step_px for name, (share, _) in REDUCED.items()}
    return {**sizes, FULL: edge_px}


def _levels(image: Tensor, edge_px: int) -> Tensor:
    """An image [3, S, S], uint8, reduced to 8-bit levels: [1, 3, edge, edge] in [-1, 1]."""
    pixels = image[None].float()
    if edge_px != image.shape[-1]:
        pixels = F.interpolate(pixels, (edge_px, edge_px), mode="bicubic", antialias=True, align_corners=False)
    return pixels.clamp(0, 255).round() / 127.5 - 1


def encode_whole(models: Models, pixels: Tensor) -> Tensor:
    """Latents [B, C, h, w] of pixels [B, 3, H, W] without tiles, whose borders the network would learn."""
    vae = models.base.vae
    with torch.inference_mode(), models.using(vae):
        latents = vae.encode(pixels.to(models.device, vae.dtype)).latent_dist.mode()
    return models.base.to_canvas(latents.float()).cpu()


@dataclass(frozen=True)
class Lesson:
    """What is learned from: the base model whose VAE it is, images, and the numbers of the images to learn from and to
    measure on."""

    models: Callable[[], Models]
    """Loads the base model."""
    images: Images
    learned: range
    measured: range


def own_lesson(models: Callable[[], Models], recipe: LatentRecipe) -> Lesson:
    """Photos of the picturebook."""
    learned = range(data.TRAIN_SEED, data.TRAIN_SEED + recipe.images)
    return Lesson(models, scenes, learned, range(data.HELD_OUT_SEED, data.HELD_OUT_SEED + recipe.held_out))


def lesson_of(folder: Path, models: Callable[[], Models], recipe: LatentRecipe) -> Lesson:
    """Crops of the images in a folder. Crops of the first `held_out` images (at most half) are measured on."""
    files = image_files(folder)
    held_out = min(recipe.held_out, len(files) // 2)
    kept, rest = crops_of(files[:held_out], recipe.edge_px), crops_of(files[held_out:], recipe.edge_px)
    return Lesson(
        models,
        lambda number: kept(number) if number < held_out else rest(number - held_out),
        range(held_out, held_out + recipe.images),
        range(held_out),
    )


@dataclass(frozen=True)
class LatentCache:
    """Latents of images at their full and at reduced sizes, in a folder, in files of a few images each."""

    folder: Path
    models: Callable[[], Models]
    """Loads the base model, if latents are missing."""
    edge_px: int
    shard: int = 20

    def latents(self, images: Images, numbers: range) -> dict[str, Tensor]:
        """The latents of the images with these numbers, by size: float16 [N, C, h, w]."""
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = []
        for start in numbers[:: self.shard]:
            size = min(self.shard, numbers.stop - start)
            path = self.folder / f"latents-{self.edge_px}-{start}-{size}.pt"
            if not path.exists():
                partial = path.with_suffix(".partial")
                torch.save(self._encoded(images, range(start, start + size)), partial)
                partial.rename(path)
                print(f"latent_enlarger: encoded {start + size - numbers.start} of {len(numbers)} images", flush=True)
            parts.append(torch.load(path, map_location="cpu", weights_only=True))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _encoded(self, images: Images, numbers: range) -> dict[str, Tensor]:
        models = self.models()
        sizes = reduced_sizes(self.edge_px, models.geometry.step_px)
        made: dict[str, list[Tensor]] = {name: [] for name in sizes}
        for number in numbers:
            image = images(number)
            for name, edge_px in sizes.items():
                made[name].append(encode_whole(models, _levels(image, edge_px)).half())
        return {name: torch.cat(each) for name, each in made.items()}


# ----------------------------------------------------------------------------------------------------------------------
# training


def draw_batch(latents: dict[str, Tensor], recipe: LatentRecipe, rng: Random) -> tuple[Tensor, Tensor]:
    """Latents of some images, all reduced to one size [B, C, h, w], and at full size [B, C, H, W]."""
    (name,) = rng.choices([*REDUCED], [weight for _, weight in REDUCED.values()])
    pick = rng.sample(range(len(latents[FULL])), min(recipe.batch, len(latents[FULL])))
    return latents[name][pick].float(), latents[FULL][pick].float()


def block_loss(network: LatentEnlarger, small: Tensor, target: Tensor, block: int, rng: Random) -> Tensor:
    """The L1 distance of a random block of the enlarged latents to the target's."""
    height, width = target.shape[-2:]
    top, left = (rng.randint(0, max(0, side - block)) for side in (height, width))
    part = (slice(top, top + block), slice(left, left + block))
    plain = F.interpolate(small, size=(height, width), mode="bicubic", align_corners=False)
    rows, cols = (
        Places.of(cells, side, small.device)[each] for cells, side, each in zip(small.shape[-2:], (height, width), part)
    )
    made = plain[:, :, *part] + network.answer(network.encode_by_tiles(small), rows, cols)
    return F.l1_loss(made, target[:, :, *part])


def begin_at_bicubic(network: LatentEnlarger) -> LatentEnlarger:
    """Give a new network a head that adds nothing, so that training starts from bicubic enlargement."""
    torch.nn.init.zeros_(network.out.weight)
    torch.nn.init.zeros_(network.out.bias)
    return network


def load(work: Path) -> LatentEnlarger:
    """The network with averaged weights."""
    return network_of(torch.load(work / "latent_enlarger.pt", map_location="cpu", weights_only=True)["ema"])


def require_vae(work: Path, vae: Tensor) -> None:
    """Note the fingerprint of the VAE that the latents in `work` are of. Raises SystemExit if they are of another."""
    path = work / "latents" / "vae.pt"
    if path.exists():
        if not same_vae(torch.load(path, map_location="cpu", weights_only=True), vae):
            raise SystemExit(
                f"{path.parent} and {work / 'latent_enlarger.pt'} are of another VAE; move both away to train anew"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(vae, path)


@torch.no_grad()
def held_out_l1(network: LatentEnlarger, latents: dict[str, Tensor], name: str = "1/4") -> tuple[float, float]:
    """Mean L1 distance (network, bicubic) of enlarged latents to those of the full size."""
    small, full = latents[name].float(), latents[FULL].float()
    plain = F.interpolate(small, size=full.shape[-2:], mode="bicubic", align_corners=False)
    made = torch.cat([network(each[None], *full.shape[-2:]) for each in small])
    return float(F.l1_loss(made, full)), float(F.l1_loss(plain, full))


@torch.no_grad()
def held_out_measures(
    network: LatentEnlarger, models: Models, images: Images, numbers: Sequence[int]
) -> dict[str, float]:
    """What enlarging images from a quarter of their size is like: `ratio` (the L1 distance of the network's latents to
    those of the full images, over that of bicubic enlargement), and the mean PSNR in dB of decoded latents by how they
    were enlarged: `image` (in pixels, then encoded), `latent` (bicubically) and `network`."""
    network = network.to(models.device)
    distances: dict[str, list[float]] = {"image": [], "latent": [], "network": []}
    psnr: dict[str, list[float]] = {name: [] for name in distances}
    for number in numbers:
        image = images(number)
        truth, edge_px = _levels(image, image.shape[-1]), image.shape[-1]
        small = _levels(image, reduced_sizes(edge_px, models.geometry.step_px)["1/4"])
        cells, full = autoencoder.encode(models, small), encode_whole(models, truth)
        ways = {
            "image": autoencoder.encode(models, enlarged(small, edge_px, edge_px)),
            "latent": F.interpolate(cells, size=full.shape[-2:], mode="bicubic", align_corners=False),
            "network": network(cells, *full.shape[-2:]),
        }
        for name, latents in ways.items():
            distances[name].append(float(F.l1_loss(latents.cpu(), full)))
            pixels = autoencoder.decode(models, latents).clamp(-1, 1).cpu()
            error = (pixels - truth).square().mean().clamp_min(1e-10) / 4
            psnr[name].append(-10 * float(error.log10()))
    means = {name: float(np.mean(each)) for name, each in psnr.items()}
    return {"ratio": float(np.mean(distances["network"]) / np.mean(distances["latent"])), **means}


def export(work: Path, folder: Path, vae: Tensor) -> None:
    """Write the network to `folder`, float16, with the fingerprint of the VAE that it is for."""
    from safetensors.torch import save_file

    require_vae(work, vae)
    network = load(work)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    save_file({**weights, FINGERPRINT: vae}, folder / "model.safetensors")
    card = {"architecture": "LatentEnlarger", **asdict(network.shape)}
    (folder / "config.json").write_text(json.dumps(card, indent=2) + "\n")


def train(work: Path, budget: Budget, recipe: LatentRecipe, lesson: Lesson, device: str = "cpu") -> None:
    """Train until the budget is spent; latents in `work`/latents, checkpoint in `work`/latent_enlarger.pt."""
    torch.manual_seed(12)
    require_vae(work, fingerprint_of(lesson.models()))
    cache = LatentCache(work / "latents", lesson.models, recipe.edge_px)
    held_out = cache.latents(lesson.images, lesson.measured)
    latents = cache.latents(lesson.images, lesson.learned)
    network = begin_at_bicubic(LatentEnlarger(recipe.shape(latents[FULL].shape[1]))).to(device)
    optim = optimiser([network], recipe.rate, 0.0)

    def losses(rng: Random) -> dict[str, Tensor]:
        small, full = (each.to(device) for each in draw_batch(latents, recipe, rng))
        return {"loss": block_loss(network, small, full, recipe.block, rng)}

    way = Course(budget, work / "latent_enlarger.pt", work / "STOP-LATENT-ENLARGER")
    for step in fit(network, optim, Ema(network, recipe.ema), losses, way, seed=13_000):
        ours, theirs = held_out_l1(load(work), held_out)
        print(f"latent_enlarger: step {step} held-out L1 {ours:.4f}, bicubic {theirs:.4f}", flush=True)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    own = LatentRecipe()
    parser = argparse.ArgumentParser(
        prog="python -m resmaster_stages.picturebook.training.train_latent_enlarger",
        description="Train a network that enlarges the latents of a model's VAE.",
    )
    parser.add_argument("--model", default="picturebook", help="hub id or folder of a base model")
    parser.add_argument("--revision", default=None, help="commit or tag at the hub")
    parser.add_argument("--vae", default=None, help="hub id or folder of another VAE")
    parser.add_argument("--images", type=Path, default=None, help="folder of images; default: the picturebook's scenes")
    parser.add_argument("--count", type=int, default=own.images, help="images, or crops of them, to learn from")
    parser.add_argument("--held-out", type=int, default=own.held_out, help="images to measure on")
    parser.add_argument("--edge-px", type=int, default=own.edge_px, help="edge of the full images")
    parser.add_argument("--work", type=Path, default=Path("train"), help="cached latents and checkpoint")
    parser.add_argument("--out", type=Path, default=None, help="folder of the network; default: WORK/latent_enlarger")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=BUDGET.seconds, help="of training, without encoding")
    parser.add_argument("--steps", type=int, default=None, help="instead of seconds")
    parser.add_argument("--batch", type=int, default=own.batch)
    parser.add_argument("--rate", type=float, default=own.rate)
    parser.add_argument("--dim", type=int, default=own.dim, help="width of the encoder")
    parser.add_argument("--depths", type=int, nargs="+", default=own.depths, help="blocks of each of its layers")
    parser.add_argument("--heads", type=int, default=own.heads)
    parser.add_argument("--hidden", type=int, default=own.hidden, help="width of the head")
    parser.add_argument("--layers", type=int, default=own.layers, help="hidden layers of the head")
    return parser.parse_args(words)


def recipe_of(args: argparse.Namespace) -> LatentRecipe:
    """The recipe of the command line. Raises SystemExit."""
    if args.dim % args.heads:
        raise SystemExit(f"--dim: {args.dim} is no multiple of the {args.heads} heads; use {args.heads * 6}")
    names = ("edge_px", "dim", "heads", "hidden", "layers", "held_out", "batch", "rate")
    values = {name: getattr(args, name) for name in names}
    if bad := next((name for name in ("count", *names) if getattr(args, name) <= 0), None):
        raise SystemExit(f"--{bad.replace('_', '-')}: {getattr(args, bad)} is not above 0")
    return LatentRecipe(images=args.count, depths=tuple(args.depths), **values)


def main(words: Sequence[str] | None = None) -> None:
    """Train, measure and write the network."""
    args = _arguments(words)
    recipe, out = recipe_of(args), args.out or args.work / FOLDER
    config = ModelConfig(id=args.model, revision=args.revision, vae=args.vae, device=args.device, dtype="float32")
    models = lru_cache(lambda: load_models(config))
    try:
        step_px = geometry_of(config).step_px
        if recipe.edge_px % step_px:
            raise SystemExit(f"--edge-px: {recipe.edge_px} is no multiple of {step_px} px")
        lesson = lesson_of(args.images, models, recipe) if args.images else own_lesson(models, recipe)
        train(args.work, replace(BUDGET, seconds=args.seconds, steps=args.steps), recipe, lesson, args.device)
        found = held_out_measures(load(args.work), models(), lesson.images, lesson.measured[:MEASURED])
        export(args.work, out, fingerprint_of(models()))
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    shown = ", ".join(f"{name} {found[name]:.2f} dB" for name in ("image", "latent", "network"))
    print(
        f"latent_enlarger: L1 distance (network / bicubic) {found['ratio']:.2f}; decoded PSNR of "
        f"{len(lesson.measured[:MEASURED])} held-out images: {shown}; wrote {out}",
        flush=True,
    )


if __name__ == "__main__":
    main()
