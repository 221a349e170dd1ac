"""Train a tile ControlNet for the picturebook: a view of a large image follows what the enlarged low-res image shows.

Scenes are drawn at 512 px, reduced to a quarter and enlarged again. A training view is a square of 128 px of the
drawing, and its condition is the same square of the enlarged image. Half of the captions are of the whole drawing, as
MultiDiffusion gives them to its views, and half of the view alone. The UNet is frozen; its encoder's convolutions are
what the net starts from. The net has no attention and reads no text, so it is half the size of a copy of the
encoder, and diffusers loads it as any ControlNet.

`python -m resmaster_stages.picturebook.training.train_control --work WORK` trains, and goes on from WORK/control.pt;
`--export FOLDER` writes what was trained. `touch WORK/STOP-CONTROL` starts the final decay early.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from resmaster_stages.picturebook import captions
from resmaster_stages.picturebook.training import data, train_unet
from resmaster_stages.picturebook.training.course import Budget, Course, Ema, fit, fresh, optimiser
from resmaster_stages.picturebook.training.export import PACK
from resmaster_stages.picturebook.training.train_super_resolution import LARGE_PX, SHAPE, draw_large

CONFIG: dict[str, Any] = {
    **{
        name: train_unet.CONFIG[name]
        for name in ("in_channels", "block_out_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim")
    },
    "down_block_types": ("DownBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2D",
    "conditioning_embedding_out_channels": (16, 32, 48, 64),
}
SIZES = (data.NATIVE_PX, data.NATIVE_PX, 0, 0, data.NATIVE_PX, data.NATIVE_PX)
"""SDXL's six numbers of a native-size image."""


@dataclass(frozen=True)
class ControlRecipe:
    """`views` are cut from each of `photos` drawings; `text_dropped` is the share of views without text."""

    photos: int = 1200
    held_out: int = 16
    views: int = 4
    batch: int = 16
    rate: float = 1e-3
    text_dropped: float = 0.1
    min_snr: float = 5.0
    ema: float = 0.998


@dataclass(frozen=True)
class ViewSet:
    """Views with what the frozen parts say about them: latents [N, C, 16, 16] in the UNet's scale, conditions uint8
    [N, 3, 128, 128], text states [N, 77, D] and pooled text [N, P]."""

    latents: Tensor
    conditions: Tensor
    states: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.latents)


# ----------------------------------------------------------------------------------------------------------------------
# views


def enlarged_again(drawing: Tensor) -> Tensor:
    """A drawing [3, H, W] in [0, 1] reduced to a quarter and enlarged bicubically, 8-bit levels each time."""
    small = [side // SHAPE.scale for side in drawing.shape[-2:]]
    low = F.interpolate(drawing[None], small, mode="bicubic", antialias=True, align_corners=False)
    low = low.clamp(0, 1).mul(255).round() / 255
    return F.interpolate(low, drawing.shape[-2:], mode="bicubic", align_corners=False)[0].clamp(0, 1)


def cut_views(seed: int, count: int) -> list[tuple[Tensor, Tensor, str]]:
    """`count` views of the drawing of a seed: (pixels uint8 [3, 128, 128], condition of the same kind, caption)."""
    rng, photo, edge = Random(seed + 1), data.make_photo(seed), data.NATIVE_PX
    drawing = torch.from_numpy(draw_large(seed).copy()).permute(2, 0, 1)
    condition = enlarged_again(drawing.float() / 255).mul(255).round().byte()
    left, top, right, bottom = photo.box
    views = []
    for number in range(count):
        y, x = (rng.randint(0, LARGE_PX - edge) for _ in range(2))
        unit_x, unit_y = (right - left) / LARGE_PX, (bottom - top) / LARGE_PX
        corner = left + x * unit_x, top + y * unit_y
        box = (*corner, corner[0] + edge * unit_x, corner[1] + edge * unit_y)
        text = photo.caption if number % 2 else captions.caption(photo.scene, box, rng)
        place = (..., slice(y, y + edge), slice(x, x + edge))
        views.append((drawing[place], condition[place], text))
    return views


@torch.no_grad()
def make_views(path: Path, first_seed: int, photos: int, views: int) -> ViewSet:
    """Views of `photos` drawings, as the pack's VAE and text encoders see them; read from `path` if it is there."""
    from resmaster_stages.config.model import ModelConfig
    from resmaster_stages.diffusion import autoencoder
    from resmaster_stages.models.load import load_models

    if not fresh(path, PACK / "model_index.json"):
        models = load_models(ModelConfig(device="cpu"))
        parts: dict[str, list[Tensor]] = {"latents": [], "conditions": [], "states": [], "pooled": []}
        for number in range(photos):
            pixels, conditions, texts = zip(*cut_views(first_seed + number, views))
            encoded = models.base.encode(list(texts), False, models.device)
            parts["latents"].append(autoencoder.encode(models, data.to_float(torch.stack(pixels))).half())
            parts["conditions"].append(torch.stack(conditions))
            parts["states"].append(encoded.states.half())
            parts["pooled"].append(encoded.pooled.half())
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save({name: torch.cat(each) for name, each in parts.items()}, partial)
        partial.rename(path)
    return ViewSet(**torch.load(path, map_location="cpu", weights_only=True))


# ----------------------------------------------------------------------------------------------------------------------
# training


def new_net(unet: UNet2DConditionModel) -> ControlNetModel:
    """A fresh net with those weights of the UNet's encoder that it has a place for."""
    net = ControlNetModel(**CONFIG)
    own, theirs = net.state_dict(), unet.state_dict()
    net.load_state_dict({**own, **{name: theirs[name] for name in own if name in theirs}})
    return net


def loss_of(
    unet: UNet2DConditionModel, net: ControlNetModel | None, views: ViewSet, pick: Tensor, recipe: ControlRecipe
) -> Callable[[torch.Generator], Tensor]:
    """The weighted epsilon loss of the views `pick` [n], with noise, times and dropped texts from a generator.

    net: None predicts without control.
    """
    schedule, n = DDPMScheduler(**train_unet.SCHEDULE), len(pick)

    def loss(generator: torch.Generator) -> Tensor:
        x0 = views.latents[pick].float()
        noise = torch.randn(x0.shape, generator=generator)
        t = ((torch.arange(n) + torch.rand(n, generator=generator)) * (1000 / n)).long().clamp(max=999)
        keep = (torch.rand(n, generator=generator) >= recipe.text_dropped).float()[:, None]
        noisy, states = schedule.add_noise(x0, noise, t), views.states[pick].float() * keep[..., None]
        added = {"text_embeds": views.pooled[pick].float() * keep, "time_ids": torch.tensor([SIZES] * n)}
        more: dict[str, Any] = {}
        with torch.autocast("cpu", torch.bfloat16):
            if net is not None:
                down, mid = net(noisy, t, states, views.conditions[pick].float() / 255, return_dict=False)
                more = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            out = unet(noisy, t, states, added_cond_kwargs=added, **more).sample
        alpha = schedule.alphas_cumprod[t]
        snr = alpha / (1 - alpha)
        weight = snr.clamp(max=recipe.min_snr) / snr
        return (weight * (out.float() - noise).square().mean((1, 2, 3))).mean()

    return loss


def frozen_unet() -> UNet2DConditionModel:
    """The pack's UNet."""
    unet: UNet2DConditionModel = UNet2DConditionModel.from_pretrained(PACK / "unet", torch_dtype=torch.float32)
    return unet.eval().requires_grad_(False)


def load(work: Path) -> ControlNetModel:
    """The net with averaged weights."""
    net = ControlNetModel(**CONFIG)
    net.load_state_dict(torch.load(work / "control.pt", map_location="cpu", weights_only=True)["ema"])
    return net.eval().requires_grad_(False)


@torch.no_grad()
def held_out_losses(
    unet: UNet2DConditionModel, net: ControlNetModel, views: ViewSet, recipe: ControlRecipe
) -> tuple[float, float]:
    """The loss of views that were not trained on, with and without control, by the same draws."""
    pick = torch.arange(len(views))
    with_net, without = (
        float(loss_of(unet, each, views, pick, recipe)(torch.Generator().manual_seed(5))) for each in (net, None)
    )
    return with_net, without


def export(work: Path, folder: Path) -> int:
    """Write the net to `folder` in diffusers' format, float16. Returns the size of its weights in bytes."""
    load(work).half().save_pretrained(folder)
    return (folder / "diffusion_pytorch_model.safetensors").stat().st_size


def train(work: Path, budget: Budget, recipe: ControlRecipe | None = None) -> None:
    """Train until the budget is spent; views in `work`/views-*.pt, checkpoint in `work`/control.pt."""
    recipe = recipe or ControlRecipe()
    torch.manual_seed(8)
    views = make_views(work / f"views-{recipe.photos}.pt", data.TRAIN_SEED, recipe.photos, recipe.views)
    held_out = make_views(work / "views-held-out.pt", data.HELD_OUT_SEED, recipe.held_out, recipe.views)
    unet = frozen_unet()
    net = new_net(unet)

    def losses(rng: Random) -> dict[str, Tensor]:
        pick = torch.tensor(rng.sample(range(len(views)), recipe.batch))
        generator = torch.Generator().manual_seed(rng.getrandbits(40))
        return {"loss": loss_of(unet, net, views, pick, recipe)(generator)}

    course = Course(budget, work / "control.pt", work / "STOP-CONTROL", save_every_seconds=600.0)
    optim = optimiser([net], recipe.rate)
    for step in fit(net, optim, Ema(net, recipe.ema), losses, course, seed=13_000):
        ours, plain = held_out_losses(unet, load(work), held_out, recipe)
        print(f"control: step {step} held-out loss {ours:.4f}, without control {plain:.4f}", flush=True)


def main() -> None:
    """Train, or export what was trained."""
    parser = argparse.ArgumentParser(prog="python -m resmaster_stages.picturebook.training.train_control")
    parser.add_argument("--work", type=Path, default=Path("train-control"), help="views and checkpoint")
    parser.add_argument("--seconds", type=float, default=5400.0)
    parser.add_argument("--steps", type=int, default=None, help="instead of seconds")
    parser.add_argument("--export", type=Path, default=None, help="write the trained net to this folder, and end")
    args = parser.parse_args()
    if args.export:
        print(f"control: {export(args.work, args.export) / 1e6:.1f} MB in {args.export}", flush=True)
        return
    torch.set_num_threads(1)
    train(args.work, Budget(seconds=args.seconds, steps=args.steps, decay=0.3))


if __name__ == "__main__":
    main()
