"""Train the picturebook's VAE: AutoencoderKL, 8x down, 4 latent channels, no attention (so tiled decoding is near-exact).

Loss: L1 + MSE + MSE of gradients + local gradient energy + L1 at half and quarter size + a small KL term, on random
64 px crops of photos. Part of the way through, the latents are whitened, which
revives channels that training let die (three channels of plain colour are an easy trap).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from resmaster_stages.picturebook import warm_start
from resmaster_stages.picturebook.data import PhotoSet, to_float
from resmaster_stages.picturebook.training import Budget, Course, Ema, Team, optimiser, parameters_m, set_rate

CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 128),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 128,
    "mid_block_add_attention": False,
    "force_upcast": False,
}


@dataclass(frozen=True)
class VaeRecipe:
    """`photos` limits memory; `crop_px` is the training crop; weights are those of the loss terms."""

    photos: int = 8000
    batch: int = 32
    crop_px: int = 64
    rate: float = 1.5e-3
    kl_weight: float = 2e-3
    absolute_weight: float = 0.5
    square_weight: float = 5.0
    gradient_weight: float = 2.5
    scale_weight: float = 0.25
    energy_weight: float = 0.3
    whiten_at: float = 0.65  # progress


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
def psnr(vae: AutoencoderKL, pixels: Tensor, batch: int = 32) -> float:
    """Mean PSNR in dB of round trips of uint8 photos [N, 3, h, w] (latent mode, clamped to the pixel range)."""
    found = []
    device = next(vae.parameters()).device
    for part in pixels.split(batch):
        x = to_float(part).to(device)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.float().clamp(-1, 1)
        mse = ((x - y) / 2).square().mean((1, 2, 3)).clamp_min(1e-10)
        found.append(-10 * mse.log10())
    return float(torch.cat(found).mean())


def _averaged(work: Path) -> AutoencoderKL:
    vae = AutoencoderKL(**CONFIG)
    vae.load_state_dict(torch.load(work / "vae.pt", map_location="cpu", weights_only=True)["ema"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def normalise(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Fold a whitening into the 1x1 convolutions around the latents: over `pixels` (uint8 photos) the latent channels
    get mean 0, standard deviation 1 and no correlation, as the noise of diffusion has. Reconstructions do not change.

    The matrix is the symmetric (ZCA) one. Log-variances get the matching row norms, which is exact without correlation.
    """
    device = next(vae.parameters()).device
    found = torch.cat([vae.encode(to_float(part).to(device)).latent_dist.mode() for part in pixels.split(64)])
    flat: Tensor = found.permute(1, 0, 2, 3).flatten(1).double()
    mean = flat.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(flat))
    whiten = (vectors @ torch.diag(values.rsqrt()) @ vectors.T).float()
    colour = (vectors @ torch.diag(values.sqrt()) @ vectors.T).float()
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
    work: Path, budget: Budget, recipe: VaeRecipe | None = None, device: str = "cpu", pack: Path | None = None
) -> None:
    """Train until the budget is spent, from scratch or from an earlier pack; checkpoint in `work`/vae.pt, a sample grid in
    `work`/vae.png."""
    recipe = recipe or VaeRecipe()
    team = Team()
    torch.manual_seed(0)
    pixels = PhotoSet.load(work / "photos", recipe.photos).pixels
    held_out = PhotoSet.load(work / "held-out", 64).pixels
    vae = AutoencoderKL(**CONFIG)
    if pack:
        warm_start.vae(vae, pack)
    vae.to(device, memory_format=torch.channels_last)
    optim = optimiser([vae], recipe.rate)
    ema = Ema(vae, 0.998)
    course = Course(budget, work / "vae.pt", work / "STOP-VAE")
    state = course.resume()
    whitened_at: int | None = 0 if pack else None  # a pack's latents are white
    if state:
        vae.load_state_dict(state["model"])
        ema.shadow = {k: v.to(device) for k, v in state["ema"].items()}
        whitened_at = state["whitened_at"]
        optim.load_state_dict(state["optim"])
    if team.leads:
        print(f"vae: {parameters_m(vae):.2f} M parameters, from step {course.step}", flush=True)
    rng = Random(course.step * 100 + team.rank)
    torch.manual_seed(course.step * 100 + team.rank)
    going, rate = team.decide(True, course.rate())
    course.start()
    while going:
        if whitened_at is None and rate == 1.0 and team.decide(course.progress() >= recipe.whiten_at, 0.0)[0]:
            whitened_at = course.step
            normalise(vae, pixels[:1000])
            optim = optimiser([vae], recipe.rate)
            ema = Ema(vae, 0.998)
        if whitened_at is not None:
            rate *= min(1.0, (course.step - whitened_at + 1) / budget.warmup_steps)
        set_rate(optim, recipe.rate * rate)
        x = _crops(pixels, recipe, rng, team.share(recipe.batch)).to(device, memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            dist = vae.encode(x).latent_dist
            output = vae.decode(dist.sample()).sample
        loss = reconstruction_loss(output.float(), x, recipe)
        kl = 0.5 * (dist.mean.float().square() + dist.var.float() - 1 - dist.logvar.float()).sum() / x.numel()
        (loss + recipe.kl_weight * kl).backward()
        team.average_gradients(vae)
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optim.step()
        optim.zero_grad(set_to_none=True)
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
                    "optim": optim.state_dict(),
                    "whitened_at": whitened_at,
                }
            )
            averaged = _averaged(work).to(device)
            shown = to_float(held_out[:8]).to(device)
            with torch.no_grad():
                y = averaged.decode(averaged.encode(shown).latent_dist.mode()).sample
            _grid(shown.cpu(), y.cpu(), work / "vae.png")
            print(f"vae: step {course.step} held-out PSNR {psnr(averaged, held_out):.2f} dB", flush=True)
    if team.leads:
        finish(work, device)


def _grid(x: Tensor, y: Tensor, path: Path) -> None:
    from PIL import Image

    rows = torch.cat([torch.cat(list(x), -1), torch.cat(list(y.clamp(-1, 1)), -1)], -2)
    array = rows.add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(path)
