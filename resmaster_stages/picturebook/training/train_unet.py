"""Train the picturebook's UNet together with text encoder 1 and a plain IP-Adapter, on cached latents and embeddings.

Everything follows diffusers' SDXL pipeline: cross-attention to concat(text 1, text 2) penultimate states, pooled text
2, six time ids, epsilon prediction, SDXL's scaled-linear schedule. Loss: MSE with min-SNR-5 weights. In 40 % of the
steps the adapter is active at scale 1 (and often the text is missing), in the others it is absent, so the UNet is right
with and without it. Zeros are the unconditional text (`force_zeros_for_empty_prompt`) and the unconditional image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from resmaster_stages.picturebook.training import train_clip, train_vae, warm_start
from resmaster_stages.picturebook.training.course import (
    Budget,
    Course,
    Ema,
    Team,
    attention,
    descend,
    fresh,
    muon,
    optimiser,
    parameters_m,
    set_rate,
    vectors,
)
from resmaster_stages.picturebook.training.data import PhotoSet, to_float
from resmaster_stages.picturebook.training.train_clip import (
    PROJECTION,
    WIDTH,
    degrade_small,
    small_pixels,
    text_config,
    tokenize,
)

CONTEXT = 2 * WIDTH
IP_TOKENS = 4
TIME_ID_WIDTH = 32
CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": train_vae.CONFIG["latent_channels"],
    "out_channels": train_vae.CONFIG["latent_channels"],
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (96, 128, 128),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (3, 4, 4),
    "norm_num_groups": 16,
    "cross_attention_dim": CONTEXT,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_ID_WIDTH,
    "projection_class_embeddings_input_dim": PROJECTION + 6 * TIME_ID_WIDTH,
}
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


@dataclass(frozen=True)
class UnetRecipe:
    """Shares are probabilities per sample, `adapter_share` per step."""

    batch: int = 64
    rate: float = 2e-3
    vector_rate: float = 1e-3  # of biases and norms
    text_rate: float = 2e-4
    adapter_share: float = 0.4
    text_dropped: float = 0.08
    text_empty: float = 0.03
    text_dropped_with_adapter: float = 0.3
    image_dropped: float = 0.1
    min_snr: float = 5.0
    ema: float = 0.9993


class Painter(nn.Module):
    """The UNet with its IP-Adapter, and text encoder 1: everything this stage trains."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(**CONFIG)
        attach_adapter(self.unet)
        self.text = CLIPTextModel(text_config())


def attach_adapter(unet: UNet2DConditionModel, embedding: int = PROJECTION, tokens: int = IP_TOKENS) -> None:
    """Give a UNet fresh IP-Adapter processors (keys and values start as the text's) and an image projection, which
    makes `tokens` tokens of an image embedding of `embedding` numbers."""
    width = unet.config.cross_attention_dim
    processors: dict[str, nn.Module] = {}
    state = unet.state_dict()
    for name in unet.attn_processors:
        if name.endswith("attn1.processor"):
            processors[name] = AttnProcessor2_0()
            continue
        keys = state[name.replace("processor", "to_k.weight")]
        processor = IPAdapterAttnProcessor2_0(keys.shape[0], width, num_tokens=(tokens,), scale=0.0)
        processor.to_k_ip[0].weight.data.copy_(keys)
        processor.to_v_ip[0].weight.data.copy_(state[name.replace("processor", "to_v.weight")])
        processors[name] = processor
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(embedding, width, tokens)])
    unet.config.encoder_hid_dim_type = "ip_image_proj"


def set_adapter_scale(unet: UNet2DConditionModel, scale: float) -> None:
    """0 means absent: the processors then skip the image branch."""
    for processor in unet.attn_processors.values():
        if isinstance(processor, IPAdapterAttnProcessor2_0):
            processor.scale = [scale]


@dataclass(frozen=True)
class Cache:
    """latents [N, C, 16, 16] (unscaled modes), text 2 states [N, 77, 128] and pooled [N, 128], image embeddings
    [2, N, 128] (sharp, degraded); `empty_*` belong to the empty prompt; `latent_std` is a scalar."""

    latents: Tensor
    states: Tensor
    pooled: Tensor
    images: Tensor
    ids: Tensor
    empty_states: Tensor
    empty_pooled: Tensor
    empty_ids: Tensor
    latent_std: float


@torch.no_grad()
def _cache_clip(work: Path, photos: PhotoSet, device: str) -> dict[str, Tensor]:
    """What text encoder 2 and the image encoder say about every photo; read from `work`/cache-clip.pt if there."""
    path = work / "cache-clip.pt"
    if not fresh(path, work / "clip.pt"):
        text, image, _ = train_clip.load(work)
        text.to(device), image.to(device)
        rng = Random(3)
        ids, _ = tokenize(photos.captions)
        empty_ids, _ = tokenize([""])
        empty = text(empty_ids.to(device), output_hidden_states=True)
        states, pooled = [], []
        views: tuple[list[Tensor], list[Tensor]] = ([], [])
        for start in range(0, len(photos), 250):
            part = slice(start, start + 250)
            out = text(ids[part].to(device), output_hidden_states=True)
            states.append(out.hidden_states[-2].half().cpu())
            pooled.append(out.text_embeds.half().cpu())
            small = to_float(small_pixels(photos.pixels[part]))
            for share, found in zip((0.0, 0.8), views):
                pixels = degrade_small(small, rng, share).to(device)
                found.append(image(pixel_values=pixels).image_embeds.half().cpu())
        fields = {
            "states": torch.cat(states),
            "pooled": torch.cat(pooled),
            "images": torch.stack([torch.cat(found) for found in views]),
            "ids": ids,
            "empty_states": empty.hidden_states[-2].half().cpu(),
            "empty_pooled": empty.text_embeds.half().cpu(),
            "empty_ids": empty_ids,
        }
        torch.save(fields, path)
    fields = torch.load(path, map_location="cpu", weights_only=True)
    return fields


@torch.no_grad()
def cache_latents(work: Path, photos: PhotoSet, team: Team, device: str) -> Tensor:
    """Every photo's latents [N, C, 16, 16], unscaled modes; read from `work`/cache-latents.pt if there."""
    path = work / "cache-latents.pt"
    missing = not fresh(path, work / "vae-final.pt")
    team.wait()
    if missing:
        vae = train_vae.load(work).to(device, memory_format=torch.channels_last)
        found = []
        for part in photos.pixels.tensor_split(team.size)[team.rank].split(250):
            with torch.autocast(device, torch.bfloat16):
                x = to_float(part).to(device, memory_format=torch.channels_last)
                found.append(vae.encode(x).latent_dist.mode().half().cpu().contiguous())
        torch.save(torch.cat(found), work / f"latents-{team.rank}.pt")
        team.wait()
        if team.leads:
            parts = [work / f"latents-{rank}.pt" for rank in range(team.size)]
            torch.save(torch.cat([torch.load(p, weights_only=True) for p in parts]), path)
            for part_path in parts:
                part_path.unlink()
        team.wait()
    latents: Tensor = torch.load(path, map_location="cpu", weights_only=True)
    return latents


def make_cache(work: Path, photos: PhotoSet, team: Team, device: str = "cpu") -> Cache:
    """Compute or read what the frozen models say about every photo."""
    if team.leads:
        _cache_clip(work, photos, device)
    latents = cache_latents(work, photos, team, device)
    return Cache(latents=latents, latent_std=latent_std(work), **_cache_clip(work, photos, device))


def latent_std(work: Path) -> float:
    """The standard deviation of the cached latents over all channels: 1 / scaling_factor."""
    latents: Tensor = torch.load(work / "cache-latents.pt", map_location="cpu", weights_only=True)
    return float(latents.float().std())


def _pick(share: float, count: int, rng: Random) -> Tensor:
    return torch.tensor([rng.random() < share for _ in range(count)])


def _loss(
    painter: Painter,
    cache: Cache,
    time_ids: Tensor,
    schedule: DDPMScheduler,
    recipe: UnetRecipe,
    rng: Random,
    count: int,
    adapter_scale: float,
    device: str,
) -> Tensor:
    """The weighted epsilon loss of `count` photos; an adapter scale of 0 means that the adapter is absent."""
    n = count
    pick = torch.tensor(rng.sample(range(len(cache.latents)), n))
    adapter = adapter_scale > 0
    set_adapter_scale(painter.unet, adapter_scale)

    empty = _pick(recipe.text_empty, n, rng)
    zero = _pick(recipe.text_dropped_with_adapter if adapter else recipe.text_dropped, n, rng)
    no_image = _pick(recipe.image_dropped, n, rng)
    zero |= no_image & _pick(0.5, n, rng)  # the fully unconditional branch of guidance
    ids = torch.where(empty[:, None], cache.empty_ids, cache.ids[pick]).to(device)
    states2 = torch.where(empty[:, None, None], cache.empty_states, cache.states[pick]).to(device).float()
    pooled = torch.where(empty[:, None], cache.empty_pooled, cache.pooled[pick]).to(device).float()
    sharp = _pick(0.5, n, rng)
    view = torch.where(sharp[:, None], cache.images[0][pick], cache.images[1][pick]).float()
    view = view.masked_fill(no_image[:, None], 0.0).to(device)

    x0 = cache.latents[pick].float().to(device) / cache.latent_std
    noise = torch.randn(x0.shape).to(device)
    # one time from each n-th of the schedule: less noisy gradients than independent times
    t = ((torch.arange(n) + torch.rand(n)) * (1000 / n)).long().clamp(max=999).to(device)
    noisy = schedule.add_noise(x0, noise, t)
    keep = (~zero).float().to(device)
    with torch.autocast(device, torch.bfloat16):
        states1 = painter.text(ids, output_hidden_states=True).hidden_states[-2]
        context = torch.cat([states1.float(), states2], -1) * keep[:, None, None]
        added = {
            "text_embeds": pooled * keep[:, None],
            "time_ids": time_ids[pick].to(device),
            "image_embeds": [view[:, None]],
        }
        out = painter.unet(noisy, t, context, added_cond_kwargs=added).sample
    alpha = schedule.alphas_cumprod.to(device)[t]
    snr = alpha / (1 - alpha)
    weight = snr.clamp(max=recipe.min_snr) / snr
    return (weight * (out.float() - noise).square().mean((1, 2, 3))).mean()


def new_painter(work: Path) -> Painter:
    """A fresh painter whose text encoder 1 starts as a copy of text encoder 2."""
    painter = Painter()
    text2: CLIPTextModelWithProjection = train_clip.load(work)[0]
    wanted = painter.text.state_dict()
    source = text2.state_dict()
    renamed = {k: source[k] if k in source else source[f"text_model.{k}"] for k in wanted}
    painter.text.load_state_dict(renamed)
    return painter


def load(work: Path, averaged: bool = True) -> Painter:
    """The painter of the last checkpoint, by default its moving average."""
    state = torch.load(work / "unet.pt", map_location="cpu", weights_only=True)
    painter = Painter()
    painter.load_state_dict(state["ema" if averaged else "model"])
    return painter.eval().requires_grad_(False)


def train(
    work: Path,
    budget: Budget,
    recipe: UnetRecipe | None = None,
    device: str = "cpu",
    pack: Path | None = None,
    compiled: bool = False,
) -> None:
    """Train until the budget is spent, from scratch or from an earlier pack, or decay early once `work`/STOP-UNET
    exists; checkpoint in `work`/unet.pt."""
    recipe = recipe or UnetRecipe()
    team = Team()
    torch.manual_seed(2)
    photos = PhotoSet.load(work / "photos")
    cache = make_cache(work, photos, team, device)
    time_ids = photos.time_ids
    del photos
    schedule = DDPMScheduler(**SCHEDULE)
    course = Course(budget, work / "unet.pt", work / "STOP-UNET")
    state = course.resume("model", "ema", "optims")
    painter = Painter() if state else new_painter(work)
    if state:
        painter.load_state_dict(state["model"])
    elif pack:
        warm_start.painter(painter.unet, painter.text, pack)
    painter.to(device).train()
    if compiled:
        painter.unet.compile(dynamic=False)
    rates = (recipe.rate, recipe.vector_rate, recipe.text_rate)
    optims = (muon([painter.unet], rates[0]), vectors([painter.unet], rates[1]), optimiser([painter.text], rates[2]))
    ema = Ema(painter, recipe.ema)
    if state:
        ema.shadow = {k: v.to(device) for k, v in state["ema"].items()}
        for optim, kept in zip(optims, state["optims"]):
            optim.load_state_dict(kept)
    if team.leads:
        size = parameters_m(painter.unet)
        print(f"unet: {size:.2f} M, latent std {cache.latent_std:.3f}, from step {course.step}", flush=True)
    own = Random(1000 + course.step * 100 + team.rank)
    shared = Random(1000 + course.step)  # whether the adapter is active: the same in every process
    torch.manual_seed(1000 + course.step * 100 + team.rank)
    running = 0.0
    going, rate = team.decide(True, course.rate())
    course.start()
    while going:
        for optim, full in zip(optims, rates):
            set_rate(optim, full * rate)
        scale = 1.0 if shared.random() < recipe.adapter_share else 0.0
        with attention(device):
            count = team.share(recipe.batch)
            loss = _loss(painter, cache, time_ids, schedule, recipe, own, count, scale, device)
            loss.backward()
        descend(team, painter, optims)
        going, rate = team.decide(course.advance(), course.rate())
        if not team.leads:
            continue
        ema.update(painter, course.step)
        running = loss.item() if running == 0 else 0.98 * running + 0.02 * loss.item()
        if course.step % 50 == 0:
            print(f"unet: step {course.step} loss {running:.4f} rate {rate:.2f} {course.elapsed:.0f} s", flush=True)
        if course.due() or not going:
            course.save(
                {
                    "model": painter.state_dict(),
                    "ema": ema.shadow,
                    "optims": [optim.state_dict() for optim in optims],
                }
            )
