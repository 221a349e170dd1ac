"""Train the VAE's decoder further, with the encoder fixed: images get sharper, and the UNet's latents stay as they
are.

The loss is the VAE's own. The decoder sees the latents of photos with a little noise, each photo's of its own strength,
as it will see latents that a UNet made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from resmaster_stages.picturebook.training import train_unet, train_vae
from resmaster_stages.picturebook.training.course import (
    Budget,
    Course,
    Ema,
    Team,
    descend,
    fresh,
    muon,
    parameters_m,
    set_rate,
    vectors,
)
from resmaster_stages.picturebook.training.data import PhotoSet, to_float

CELL_PX = 8
"""One latent's."""


@dataclass(frozen=True)
class DecoderRecipe:
    """`photos` limits memory; `noise` is the greatest standard deviation beside latents of 1; `loss` has the
    weights."""

    photos: int = 20_000
    batch: int = 16
    crop_cells: int = 8
    rate: float = 2e-3
    vector_rate: float = 5e-4  # of biases and norms
    noise: float = 0.15
    ema: float = 0.999
    loss: train_vae.VaeRecipe = field(default_factory=train_vae.VaeRecipe)


class Decoder(nn.Module):
    """What this stage trains: latents [B, C, h, w] -> pixels [B, 3, 8 h, 8 w] in [-1, 1]."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.post_quant_conv(latents))
        return out


def _crops(latents: Tensor, pixels: Tensor, recipe: DecoderRecipe, rng: Random, count: int) -> tuple[Tensor, Tensor]:
    """Random crops of latents [count, C, cells, cells] and of the photos that they are of, as floats."""
    cells = recipe.crop_cells
    room = latents.shape[-1] - cells
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for _ in range(count):
        n, y, x = rng.randrange(len(pixels)), rng.randint(0, room), rng.randint(0, room)
        found[0].append(latents[n, :, y : y + cells, x : x + cells].float())
        rows, columns = (slice(CELL_PX * start, CELL_PX * (start + cells)) for start in (y, x))
        found[1].append(pixels[n, :, rows, columns])
    return torch.stack(found[0]), to_float(torch.stack(found[1]))


def _state(work: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(work / "decoder.pt", map_location="cpu", weights_only=True)
    return state


def load(work: Path) -> AutoencoderKL:
    """The finished VAE, with the further trained decoder where there is one that belongs to it."""
    vae = train_vae.load(work)
    if fresh(work / "decoder.pt", work / "vae-final.pt"):
        Decoder(vae).load_state_dict(_state(work)["ema"])
    return vae


def train(
    work: Path, budget: Budget, recipe: DecoderRecipe | None = None, device: str = "cpu", compiled: bool = False
) -> None:
    """Train until the budget is spent; checkpoint in `work`/decoder.pt."""
    recipe = recipe or DecoderRecipe()
    team = Team()
    torch.manual_seed(7)
    photos = PhotoSet.load(work / "photos")
    latents = train_unet.cache_latents(work, photos, team, device)[: recipe.photos]
    pixels = photos.pixels[: recipe.photos].clone()
    del photos
    held_out = PhotoSet.load(work / "held-out", 64).pixels
    decoder = Decoder(train_vae.load(work).to(device, memory_format=torch.channels_last)).requires_grad_(True).train()
    if (work / "decoder.pt").exists() and not fresh(work / "decoder.pt", work / "vae-final.pt"):
        raise SystemExit(f"{work / 'decoder.pt'} belongs to an earlier VAE: remove it first.")
    course = Course(budget, work / "decoder.pt", work / "STOP-DECODER")
    state = course.resume("model", "ema", "optims")
    optims = (muon([decoder], recipe.rate), vectors([decoder], recipe.vector_rate))
    ema = Ema(decoder, recipe.ema)
    if state:
        decoder.load_state_dict(state["model"])
        ema.shadow = {k: v.to(device) for k, v in state["ema"].items()}
        for optim, kept in zip(optims, state["optims"]):
            optim.load_state_dict(kept)
    if team.leads:
        print(f"decoder: {parameters_m(decoder):.2f} M parameters, from step {course.step}", flush=True)
    rng = Random(17_000 + course.step * 100 + team.rank)
    torch.manual_seed(17_000 + course.step * 100 + team.rank)
    if compiled:
        for block in decoder.decoder.up_blocks:
            block.compile(dynamic=False)
    going, rate = team.decide(True, course.rate())
    course.start()
    while going:
        for optim, full in zip(optims, (recipe.rate, recipe.vector_rate)):
            set_rate(optim, full * rate)
        z, target = _crops(latents, pixels, recipe, rng, team.share(recipe.batch))
        z = z + recipe.noise * torch.rand(len(z), 1, 1, 1) * torch.randn(z.shape)
        z, target = (each.to(device, memory_format=torch.channels_last) for each in (z, target))
        with torch.autocast(device, torch.bfloat16):
            output = decoder(z)
        loss = train_vae.reconstruction_loss(output.float(), target, recipe.loss)
        loss.backward()
        descend(team, decoder, optims)
        going, rate = team.decide(course.advance(), course.rate())
        if not team.leads:
            continue
        ema.update(decoder, course.step)
        if course.step % 100 == 0:
            print(f"decoder: step {course.step} loss {loss.item():.4f} {course.elapsed:.0f} s", flush=True)
        if course.due() or not going:
            optimisers = [optim.state_dict() for optim in optims]
            course.save({"model": decoder.state_dict(), "ema": ema.shadow, "optims": optimisers})
            shown = train_vae.psnr(load(work).to(device), held_out)
            print(f"decoder: step {course.step} held-out PSNR {shown:.2f} dB", flush=True)
