"""Train the picturebook's VAE: AutoencoderKL, 8x down, 16 latent channels, no attention (so tiled decoding is
near-exact).

Loss: L1 + MSE + MSE of gradients + local gradient energy + L1 at half and quarter size + a small KL term, on random
64 px crops of photos. Two habits keep latents easy to learn for the UNet. Channels beyond four are ordered: in a part
of the batches the decoder sees the first four or eight alone, so these hold what matters most (DC-AE 1.5,
arXiv:2508.00413, section 3). The latents are scale-equivariant: in a part of the batches the decoder gets latents at
half the size and must draw the photo at half the size (EQ-VAE, arXiv:2502.09509).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from resmaster_stages.picturebook.training import warm_start
from resmaster_stages.picturebook.training.course import (
    Budget,
    Course,
    Ema,
    Team,
    descend,
    muon,
    parameters_m,
    set_rate,
    vectors,
)
from resmaster_stages.picturebook.training.data import PhotoSet, to_float

CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 128),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 128,
    "mid_block_add_attention": False,
    "force_upcast": False,
}


FIRST_LOG_VARIANCE = -6.0
"""Of the latents' noise, before training."""


@dataclass(frozen=True)
class VaeRecipe:
    """`photos` limits memory; `crop_px` is the training crop; weights are those of the loss terms."""

    photos: int = 8000
    batch: int = 16
    crop_px: int = 64
    rate: float = 3e-3
    vector_rate: float = 1e-3  # of biases and norms
    kl_weight: float = 2e-4
    absolute_weight: float = 0.5
    square_weight: float = 5.0
    gradient_weight: float = 2.5
    scale_weight: float = 0.25
    energy_weight: float = 0.3
    few_share: float = 0.15  # of the batches: the decoder sees the first channels alone
    few: tuple[int, ...] = (4, 8)
    half_share: float = 0.2  # of the batches: latents and photo at half the size


def _gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def reconstruction_loss(output: Tensor, target: Tensor, recipe: VaeRecipe) -> Tensor:
    """L1 and MSE, MSE of spatial gradients (L1 alone flattens fine texture), and L1 at two coarser scales."""
    loss = recipe.absolute_weight * F.l1_loss(output, target) + recipe.square_weight * F.mse_loss(output, target)
    for a, b in zip(_gradients(output), _gradients(target)):
        loss = loss + recipe.gradient_weight * F.mse_loss(a, b)
        # how much detail there is, wherever it lies: keeps texture from being averaged away
        loss = loss + recipe.energy_weight * F.l1_loss(F.avg_pool2d(a.abs(), 5, 2), F.avg_pool2d(b.abs(), 5, 2))
    for scale in (2, 4):
        loss = loss + recipe.scale_weight * F.l1_loss(F.avg_pool2d(output, scale), F.avg_pool2d(target, scale))
    return loss


def _crops(pixels: Tensor, recipe: VaeRecipe, rng: Random, count: int) -> Tensor:
    """A float batch [count, 3, crop, crop] of random crops, half of them mirrored."""
    out = []
    room = pixels.shape[-1] - recipe.crop_px
    for _ in range(count):
        y, x = rng.randint(0, room), rng.randint(0, room)
        crop = pixels[rng.randrange(len(pixels)), :, y : y + recipe.crop_px, x : x + recipe.crop_px]
        out.append(crop.flip(-1) if rng.random() < 0.5 else crop)
    return to_float(torch.stack(out))


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: Tensor, channels: int | None = None, batch: int = 32) -> float:
    """Mean PSNR in dB of round trips of uint8 photos [N, 3, h, w] (latent mode, clamped to the pixel range), by the
    first `channels` alone where given."""
    found = []
    device = next(vae.parameters()).device
    for part in pixels.split(batch):
        x = to_float(part).to(device)
        latents = vae.encode(x).latent_dist.mode()
        latents = first_channels(latents, channels) if channels else latents
        y = vae.decode(latents).sample.float().clamp(-1, 1)
        mse = ((x - y) / 2).square().mean((1, 2, 3)).clamp_min(1e-10)
        found.append(-10 * mse.log10())
    return float(torch.cat(found).mean())


def first_channels(latents: Tensor, count: int) -> Tensor:
    """Latents [B, C, h, w] with zeros beyond the first `count` channels."""
    return F.pad(latents[:, :count], (0, 0, 0, 0, 0, latents.shape[1] - count))


def _averaged(work: Path) -> AutoencoderKL:
    vae = AutoencoderKL(**CONFIG)
    vae.load_state_dict(torch.load(work / "vae.pt", map_location="cpu", weights_only=True)["ema"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def normalise(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Fold a whitening into the 1x1 convolutions around the latents: over `pixels` (uint8 photos) the latent channels
    get mean 0, standard deviation 1 and no correlation, as the noise of diffusion has. Reconstructions do not change.

    The matrix is the symmetric (ZCA) one, which changes every channel as little as can be, so that their order stays.
    Log-variances get the matching row norms, which is exact without correlation.
    """
    device = next(vae.parameters()).device
    found = torch.cat([vae.encode(to_float(part).to(device)).latent_dist.mode() for part in pixels.split(64)])
    flat: Tensor = found.permute(1, 0, 2, 3).flatten(1).double()
    mean = flat.mean(1)
    values, axes = torch.linalg.eigh(torch.cov(flat))
    whiten = (axes @ torch.diag(values.rsqrt()) @ axes.T).float()
    colour = (axes @ torch.diag(values.sqrt()) @ axes.T).float()
    n = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    after.bias += after.weight[:, :, 0, 0] @ mean.float()
    after.weight[:, :, 0, 0] = after.weight[:, :, 0, 0] @ colour
    before.weight[:n, :, 0, 0] = whiten @ before.weight[:n, :, 0, 0]
    before.bias[:n] = whiten @ (before.bias[:n] - mean.float())
    before.bias[n:] += 2 * whiten.norm(dim=1).log()


def finish(work: Path, device: str = "cpu") -> None:
    """Write the averaged, normalised VAE to `work`/vae-final.pt."""
    vae = _averaged(work).to(device)
    normalise(vae, PhotoSet.load(work / "photos", 1000).pixels)
    torch.save(vae.state_dict(), work / "vae-final.pt")


def load(work: Path) -> AutoencoderKL:
    """The finished VAE."""
    vae = AutoencoderKL(**CONFIG)
    vae.load_state_dict(torch.load(work / "vae-final.pt", map_location="cpu", weights_only=True))
    return vae.eval().requires_grad_(False)


def train(
    work: Path,
    budget: Budget,
    recipe: VaeRecipe | None = None,
    device: str = "cpu",
    pack: Path | None = None,
    compiled: bool = False,
) -> None:
    """Train until the budget is spent, from scratch or from an earlier pack; checkpoint in `work`/vae.pt, a sample grid
    in `work`/vae.png."""
    recipe = recipe or VaeRecipe()
    team = Team()
    torch.manual_seed(0)
    pixels = PhotoSet.load(work / "photos", recipe.photos).pixels
    held_out = PhotoSet.load(work / "held-out", 64).pixels
    vae = AutoencoderKL(**CONFIG)
    if pack:
        warm_start.vae(vae, pack)
    else:  # little noise at first: otherwise the decoder learns to ignore its latents
        vae.quant_conv.bias.data[CONFIG["latent_channels"] :] = FIRST_LOG_VARIANCE
    vae.to(device, memory_format=torch.channels_last)
    optims = (muon([vae], recipe.rate), vectors([vae], recipe.vector_rate))
    ema = Ema(vae, 0.998)
    course = Course(budget, work / "vae.pt", work / "STOP-VAE")
    state = course.resume("model", "ema", "optims")
    if state:
        vae.load_state_dict(state["model"])
        ema.shadow = {k: v.to(device) for k, v in state["ema"].items()}
        for optim, kept in zip(optims, state["optims"]):
            optim.load_state_dict(kept)
    if team.leads:
        print(f"vae: {parameters_m(vae):.2f} M parameters, from step {course.step}", flush=True)
    rng = Random(course.step * 100 + team.rank)
    torch.manual_seed(course.step * 100 + team.rank)
    few = [count for count in recipe.few if count < CONFIG["latent_channels"]]
    if compiled:  # block by block: compiled whole, the decoder gave no gradients (torch 2.13, CPU)
        for block in (*vae.encoder.down_blocks, *vae.decoder.up_blocks):
            block.compile(dynamic=False)
    going, rate = team.decide(True, course.rate())
    course.start()
    while going:
        for optim, full in zip(optims, (recipe.rate, recipe.vector_rate)):
            set_rate(optim, full * rate)
        x = _crops(pixels, recipe, rng, team.share(recipe.batch)).to(device, memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            dist = vae.encode(x).latent_dist
            latents = dist.sample()
            if few and rng.random() < recipe.few_share:
                latents = first_channels(latents, rng.choice(few))
            target = x
            if rng.random() < recipe.half_share:
                latents, target = F.avg_pool2d(latents, 2), F.avg_pool2d(x, 2)
            output = vae.decode(latents).sample
        loss = reconstruction_loss(output.float(), target, recipe)
        kl = 0.5 * (dist.mean.float().square() + dist.var.float() - 1 - dist.logvar.float()).sum() / x.numel()
        (loss + recipe.kl_weight * kl).backward()
        descend(team, vae, optims)
        going, rate = team.decide(course.advance(), course.rate())
        if not team.leads:
            continue
        ema.update(vae, course.step)
        if course.step % 50 == 0:
            print(
                f"vae: step {course.step} loss {loss.item():.4f} kl {kl.item():.3f} {course.elapsed:.0f} s", flush=True
            )
        if course.due() or not going:
            course.save(
                {
                    "model": vae.state_dict(),
                    "ema": ema.shadow,
                    "optims": [optim.state_dict() for optim in optims],
                }
            )
            averaged = _averaged(work).to(device)
            shown = to_float(held_out[:8]).to(device)
            with torch.no_grad():
                y = averaged.decode(averaged.encode(shown).latent_dist.mode()).sample
            _grid(shown.cpu(), y.cpu(), work / "vae.png")
            print(
                f"vae: step {course.step} held-out PSNR {psnr(averaged, held_out):.2f} dB, "
                + ", ".join(f"{count} channels {psnr(averaged, held_out, count):.2f}" for count in few),
                flush=True,
            )
    if team.leads:
        finish(work, device)


def _grid(x: Tensor, y: Tensor, path: Path) -> None:
    from PIL import Image

    rows = torch.cat([torch.cat(list(x), -1), torch.cat(list(y.clamp(-1, 1)), -1)], -2)
    array = rows.add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(path)
