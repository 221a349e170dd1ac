"""Train the picturebook's super-resolution network: a small RRDBNet, x4, on the pack's own photos drawn at 4x.

Ground truth is drawn from vectors at 512 px. Its low-res image comes about as in BSRGAN, in small: blur, reduction by
a random filter, noise and JPEG, in random order and strength; a fifth of the images are only reduced. So the network
sharpens what the low-res stage draws, and also a user's own compressed image of this world.

L1 loss plus that of gradients and of local gradient energy (as the VAE's), no adversary: strokes come out crisp,
textures that the low-res image does not show do not appear.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from resmaster_stages.models.rrdbnet import RRDBNet, RRDBShape
from resmaster_stages.picturebook.training import course, data
from resmaster_stages.picturebook.training.course import Budget, Course, Ema, fit, optimiser

SHAPE = RRDBShape(features=32, blocks=2, growth=16)
LARGE_PX = data.NATIVE_PX * SHAPE.scale
FOLDER = "super_resolution"
"""Of the network in the pack: config.json and model.safetensors."""


@dataclass(frozen=True)
class SuperResolutionRecipe:
    """`photos` are drawn at 4x; `crop_px` is the training crop of the low-res image."""

    photos: int = 800
    held_out: int = 32
    batch: int = 8
    crop_px: int = 32
    rate: float = 1.5e-3
    gradient_weight: float = 0.5
    energy_weight: float = 0.5
    ema: float = 0.997


# ----------------------------------------------------------------------------------------------------------------------
# images


def draw_large(seed: int) -> np.ndarray:
    """The photo of a seed at 4x, whatever resolution its small version has: uint8 [512, 512, 3]."""
    from resmaster_stages.picturebook.render import render

    photo = data.make_photo(seed)
    return np.asarray(render(photo.scene, LARGE_PX, LARGE_PX, photo.box))


def _draw_shard(path: Path, first: int, count: int) -> None:
    if path.exists():
        return
    pixels = np.stack([draw_large(first + i) for i in range(count)])
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, pixels)
    partial.rename(path)


def draw_photos(folder: Path, count: int, base_seed: int, processes: int = 1, shard: int = 50) -> Tensor:
    """`count` photos at 4x, uint8 [N, 3, 512, 512], from `folder`; what it lacks is drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {i: min(shard, count - i) for i in range(0, count, shard)}
    paths = [folder / f"large-{base_seed + i}-{size}.npy" for i, size in sizes.items()]
    with ProcessPoolExecutor(processes) as pool:
        jobs = [pool.submit(_draw_shard, path, base_seed + i, size) for path, (i, size) in zip(paths, sizes.items())]
        for job in jobs:
            job.result()
    return torch.cat([torch.from_numpy(np.load(path)).permute(0, 3, 1, 2) for path in paths])


def _blurred(image: Tensor, rng: Random) -> Tensor:
    """An anisotropic Gaussian blur, in pixels of the large image."""
    along, across, angle = rng.uniform(0.3, 3.0), rng.uniform(0.3, 3.0), rng.uniform(0, math.pi)
    y, x = torch.meshgrid(torch.arange(-8.0, 9), torch.arange(-8.0, 9), indexing="ij")
    u, v = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    kernel = torch.exp(-0.5 * ((u / along) ** 2 + (v / across) ** 2))
    kernel = (kernel / kernel.sum()).expand(3, 1, -1, -1)
    return F.conv2d(F.pad(image[None], (8,) * 4, mode="reflect"), kernel, groups=3)[0]


def _reduced(image: Tensor, rng: Random, plain: bool) -> Tensor:
    """A quarter of the size by a random filter; `plain`: by antialiased bicubic interpolation."""
    size = [side // SHAPE.scale for side in image.shape[-2:]]
    mode = "bicubic" if plain else rng.choice(("bicubic", "bilinear", "area"))
    if mode == "area":
        return F.interpolate(image[None], size, mode="area")[0]
    return F.interpolate(image[None], size, mode=mode, antialias=True, align_corners=False)[0]


def _noisy(image: Tensor, rng: Random) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    grey = 1 if rng.random() < 0.4 else 3
    noise = torch.randn(grey, *image.shape[-2:], generator=generator)
    return (image + rng.uniform(0, 8) / 255 * noise).clamp(0, 1)


def _compressed(image: Tensor, rng: Random) -> Tensor:
    """Through JPEG and back."""
    levels = image.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "JPEG", quality=rng.randint(50, 95))
    return torch.from_numpy(np.asarray(Image.open(buffer)).copy()).permute(2, 0, 1).float() / 255


def degraded(image: Tensor, rng: Random) -> Tensor:
    """The low-res version of an image [3, h, w] in [0, 1], sides multiples of 4: [3, h / 4, w / 4], 8-bit levels."""
    if rng.random() < 0.2:
        small = _reduced(image, rng, plain=True)
    else:
        small = _reduced(_blurred(image, rng) if rng.random() < 0.7 else image, rng, plain=False)
        for change in rng.sample((_noisy, _compressed), 2):
            if rng.random() < 0.4:
                small = change(small, rng)
    return small.clamp(0, 1).mul(255).round() / 255


def _crops(photos: Tensor, recipe: SuperResolutionRecipe, rng: Random) -> tuple[Tensor, Tensor]:
    """(low-res, high-res) batches in [0, 1] of random crops, turned and mirrored at random."""
    edge = recipe.crop_px * SHAPE.scale
    low, high = [], []
    for _ in range(recipe.batch):
        y, x = (rng.randint(0, side - edge) for side in photos.shape[-2:])
        crop = photos[rng.randrange(len(photos)), :, y : y + edge, x : x + edge].float() / 255
        crop = torch.rot90(crop, rng.choice((0, 0, 0, 1, 2, 3)), (1, 2))
        if rng.random() < 0.5:
            crop = crop.flip(-1)
        low.append(degraded(crop, rng))
        high.append(crop)
    return torch.stack(low), torch.stack(high)


# ----------------------------------------------------------------------------------------------------------------------
# training


def loss_of(output: Tensor, target: Tensor, recipe: SuperResolutionRecipe) -> Tensor:
    """L1 of colours and of gradients, and how much detail there is around each place."""
    loss = F.l1_loss(output, target)
    for axis in (2, 3):
        a, b = output.diff(dim=axis), target.diff(dim=axis)
        energy = F.l1_loss(F.avg_pool2d(a.abs(), 7, 3), F.avg_pool2d(b.abs(), 7, 3))
        loss = loss + recipe.gradient_weight * F.l1_loss(a, b) + recipe.energy_weight * energy
    return loss


def load(work: Path) -> RRDBNet:
    """The network with averaged weights."""
    network = RRDBNet(SHAPE)
    network.load_state_dict(torch.load(work / "super_resolution.pt", map_location="cpu", weights_only=True)["ema"])
    return network.eval().requires_grad_(False)


def keep(work: Path, pack: Path) -> None:
    """Write an earlier pack's network as this stage's checkpoint, for trainings of other stages."""
    from safetensors.torch import load_file

    weights = load_file(pack / FOLDER / "model.safetensors")
    course.keep(work / "super_resolution.pt", {"ema": {name: value.float() for name, value in weights.items()}})


@torch.no_grad()
def psnr(network: Callable[[Tensor], Tensor], photos: Tensor, seed: int = 0) -> tuple[float, float]:
    """Mean PSNR in dB (network, bicubic) of enlarged degraded photos against the photos, uint8 [N, 3, 512, 512]."""
    rng, found = Random(seed), []
    for photo in photos:
        truth = photo.float() / 255
        low = degraded(truth, rng)[None]
        plain = F.interpolate(low, scale_factor=SHAPE.scale, mode="bicubic", align_corners=False)
        made = network(low)
        errors = [(each[0].clamp(0, 1) - truth).square().mean().clamp_min(1e-10) for each in (made, plain)]
        found.append([-10 * float(error.log10()) for error in errors])
    ours, theirs = np.mean(found, axis=0)
    return float(ours), float(theirs)


def export(work: Path, folder: Path) -> None:
    """Write the network to `folder`, float16."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.half().contiguous() for name, value in load(work).state_dict().items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(
        json.dumps({"architecture": "RRDBNet", "scale": SHAPE.scale, **asdict(SHAPE)}, indent=2) + "\n"
    )


def train(
    work: Path, budget: Budget, recipe: SuperResolutionRecipe | None = None, device: str = "cpu", processes: int = 1
) -> None:
    """Train until the budget is spent; photos in `work`/large, checkpoint in `work`/super_resolution.pt."""
    recipe = recipe or SuperResolutionRecipe()
    torch.manual_seed(6)
    photos = draw_photos(work / "large", recipe.photos, data.TRAIN_SEED, processes)
    held_out = draw_photos(work / "large", recipe.held_out, data.HELD_OUT_SEED, processes)
    network = RRDBNet(SHAPE).to(device)
    optim = optimiser([network], recipe.rate, 0.0)

    def losses(rng: Random) -> dict[str, Tensor]:
        low, high = (each.to(device) for each in _crops(photos, recipe, rng))
        with torch.autocast(device, torch.bfloat16):
            output = network(low)
        return {"loss": loss_of(output.float(), high, recipe)}

    course = Course(budget, work / "super_resolution.pt", work / "STOP-SUPER-RESOLUTION")
    for step in fit(network, optim, Ema(network, recipe.ema), losses, course, seed=11_000):
        ours, theirs = psnr(load(work), held_out)
        print(f"super_resolution: step {step} held-out PSNR {ours:.2f} dB, bicubic {theirs:.2f} dB", flush=True)
