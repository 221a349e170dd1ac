"""Train picturebook-flow, a second base: a FLUX transformer on a flow-matching path, taught by the pack's UNet.

`python -m resmaster_stages.picturebook.training.train_flow --work train_flow`. Everything follows diffusers' FLUX
pipeline: 2 x 2 latents are one token, the T5 states and the pads after them are read without a mask, the pooled text of
CLIP joins the time, the output is the velocity noise - latents. Latents, pooled text and image embeddings are the
pack's; the T5 encoder and a plain IP-Adapter train together with the transformer.

The pack's UNet says the velocity at any point of the path: it sees the same latents at the signal-to-noise ratio that
it knows. Its guidance is folded into the targets, so one branch without guidance gives a guided image, as with FLUX.
Where the path is noisier than the UNet knows, the photo itself is the target. The prompt is dropped by an empty
sentence and the image prompt by a black image, because the pipeline knows no zeros.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from resmaster_stages.picturebook.training import data, train_clip, train_unet, warm_start
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
from resmaster_stages.picturebook.training.data import PhotoSet
from resmaster_stages.picturebook.training.export import PACK
from resmaster_stages.picturebook.training.tokens import MAX_LENGTH
from resmaster_stages.picturebook.training.train_clip import IMAGE_PX, PROJECTION, WIDTH
from resmaster_stages.picturebook.training.train_unet import IP_TOKENS, Painter

PATCH = 2
CONFIG: dict[str, Any] = {
    "in_channels": PATCH * PATCH * train_unet.CONFIG["in_channels"],
    "num_layers": 3,
    "num_single_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "axes_dims_rope": (8, 12, 12),
    "guidance_embeds": False,
}
SHIFT = 1.5
"""The static time shift of the sampler."""
RECIPE = Budget(seconds=16_000, decay=0.3, decay_seconds_on_stop=1500)
"""How long it trains: wall-clock seconds, on a CPU core of its own."""


def text_config() -> T5Config:
    """Three layers of width 128 over the ids of CLIP's tokenizer."""
    clip = train_clip.text_config()
    return T5Config(
        vocab_size=clip.vocab_size,
        d_model=WIDTH,
        d_kv=32,
        num_heads=4,
        d_ff=384,
        num_layers=3,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=clip.pad_token_id,
        eos_token_id=clip.eos_token_id,
    )


@dataclass(frozen=True)
class FlowRecipe:
    """Shares of texts and images are probabilities per sample, `adapter_share` and `short_share` per step."""

    batch: int = 32
    rate: float = 2e-3
    vector_rate: float = 1e-3  # of biases and norms
    text_rate: float = 5e-4
    ema: float = 0.9985
    adapter_share: float = 0.4
    text_dropped: float = 0.1
    text_dropped_with_adapter: float = 0.3
    image_dropped: float = 0.1
    guidance: float = 2.5
    """Of the UNet, folded into the targets. 1 is none."""
    sigma_mean: float = 0.5
    sigma_spread: float = 1.2
    """The noise level is a normal number of this mean and spread, through the logistic function."""
    short_tokens: int = 32
    short_share: float = 0.8
    """Steps that read captions of at most `short_tokens` tokens, padded to that; the others pad to 77."""
    text_steps: int = 300
    """Steps in which the T5 encoder first learns to say what the pack's text encoders say."""


class FlowPainter(nn.Module):
    """The transformer with its IP-Adapter, and the T5 encoder: everything this stage trains."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = FluxTransformer2DModel(**CONFIG)
        _silence(self.transformer)
        attach_adapter(self.transformer)
        self.text = T5EncoderModel(text_config())


def _silence(transformer: FluxTransformer2DModel) -> None:
    """Blocks start as the identity and the output as zero: modulations and the last layer are zero."""
    last = [transformer.norm_out.linear, transformer.proj_out]
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    modulations = [m.linear for b in blocks for n, m in b.named_children() if n in ("norm", "norm1", "norm1_context")]
    for layer in [*last, *modulations]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def attach_adapter(transformer: FluxTransformer2DModel) -> None:
    """Give a transformer fresh IP-Adapter processors in its double blocks (keys start as the text's, values as zero,
    so that it says what it said) and an image projection."""
    width, context = transformer.inner_dim, transformer.config.joint_attention_dim
    for block in transformer.transformer_blocks:
        processor = FluxIPAdapterAttnProcessor(width, context, num_tokens=(IP_TOKENS,), scale=1.0)
        keys, values = processor.to_k_ip[0], processor.to_v_ip[0]
        keys.weight.data.copy_(block.attn.add_k_proj.weight @ transformer.context_embedder.weight)
        for silent in (keys.bias, values.weight, values.bias):
            nn.init.zeros_(silent)
        block.attn.set_processor(processor)
    transformer.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(PROJECTION, context, IP_TOKENS)])
    transformer.config.encoder_hid_dim_type = "ip_image_proj"


def pack(latents: Tensor) -> Tensor:
    """[N, C, h, w] as the transformer's tokens [N, h/2 * w/2, 4C], in the pipeline's order."""
    n, channels, h, w = latents.shape
    cells = latents.view(n, channels, h // PATCH, PATCH, w // PATCH, PATCH)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, channels * PATCH * PATCH)


def image_ids(h: int, w: int) -> Tensor:
    """(0, row, column) of every token of latents of h x w: [h/2 * w/2, 3]."""
    rows, columns = torch.meshgrid(torch.arange(h // PATCH), torch.arange(w // PATCH), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()


# --- what the pack says -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """What the pack's frozen parts say about the photos that are sharp. latents [N, C, 16, 16] as the transformer
    reads them; `context` [N, 77, 256] and `vector` [N, 128] are the UNet's text, `pooled` [N, 128] the transformer's;
    images [2, N, 128] (sharp, degraded). `empty_*` belong to the empty sentence and to a black image."""

    latents: Tensor
    context: Tensor
    vector: Tensor
    pooled: Tensor
    images: Tensor
    ids: Tensor
    lengths: Tensor
    time_ids: Tensor
    empty_ids: Tensor
    empty_pooled: Tensor
    empty_image: Tensor


def seed_work(work: Path, pack_folder: Path) -> None:
    """The pack's CLIP and VAE as checkpoints in `work`, where the caches of photos look for them."""
    if not (work / "clip.pt").exists():
        train_clip.keep(work, pack_folder)
    if not (work / "vae-final.pt").exists():
        vae = AutoencoderKL.from_pretrained(pack_folder, subfolder="vae").float()
        torch.save(vae.state_dict(), work / "vae-final.pt")


@torch.no_grad()
def _cache_text(work: Path, ids: Tensor, painter: Painter, device: str) -> dict[str, Tensor]:
    """Text encoder 1's states, and the pooled output of encoder 2's tower; read from `work`/cache-flow.pt if there."""
    path = work / "cache-flow.pt"
    if not fresh(path, work / "cache-clip.pt"):
        tower = pooled_tower(work).to(device)
        states, pooled = [], []
        for part in ids.to(device).split(250):
            states.append(painter.text(part, output_hidden_states=True).hidden_states[-2].half().cpu())
            pooled.append(tower(part).pooler_output.half().cpu())
        torch.save({"states": torch.cat(states), "pooled": torch.cat(pooled)}, path)
    fields: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return fields


def pooled_tower(work: Path) -> CLIPTextModel:
    """Text encoder 2's tower as the encoder of FLUX's pooled text."""
    tower = CLIPTextModel(train_clip.text_config())
    source = train_clip.load(work)[0].state_dict()
    tower.load_state_dict({k: source[k] if k in source else source[f"text_model.{k}"] for k in tower.state_dict()})
    return tower.eval().requires_grad_(False)


def make_cache(work: Path, teacher: Painter, scaling: float, device: str = "cpu") -> Cache:
    """Compute or read what the pack says about the photos in `work`; enlarged photos are left out, for a flow base has
    no condition that tells them apart."""
    photos = PhotoSet.load(work / "photos")
    ids, lengths = train_clip.tokenize([*photos.captions, ""])
    known = train_unet.make_cache(work, photos, Team(), device)
    said = _cache_text(work, ids, teacher, device)
    sharp = photos.time_ids[:, :2].min(1).values >= data.NATIVE_PX
    return Cache(
        latents=known.latents[sharp] * scaling,
        context=torch.cat([said["states"][:-1][sharp], known.states[sharp]], -1),
        vector=known.pooled[sharp],
        pooled=said["pooled"][:-1][sharp],
        images=known.images[:, sharp],
        ids=ids[:-1][sharp],
        lengths=lengths[:-1][sharp],
        time_ids=photos.time_ids[sharp],
        empty_ids=ids[-1:],
        empty_pooled=said["pooled"][-1:],
        empty_image=train_clip.load(work)[1](pixel_values=-torch.ones(1, 3, IMAGE_PX, IMAGE_PX)).image_embeds,
    )


# --- one step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Noised latents z [N, C, h, w] at `sigma` [N] with the velocity of their photos, what the transformer reads
    (`words` [N, L], `pooled`, `image` [N, 128] or None: no adapter), and what the UNet reads (`view` is its image)."""

    z: Tensor
    sigma: Tensor
    velocity: Tensor
    words: Tensor
    pooled: Tensor
    image: Tensor | None
    context: Tensor
    vector: Tensor
    view: Tensor
    time_ids: Tensor


def noise_levels(count: int, recipe: FlowRecipe) -> Tensor:
    """`count` noise levels, one from each n-th of their distribution, in random order."""
    share = (torch.randperm(count) + torch.rand(count)) / count
    normal = torch.special.ndtri(share.double().clamp(1e-6, 1 - 1e-6))
    return torch.sigmoid(recipe.sigma_mean + recipe.sigma_spread * normal).float()


def draw_batch(cache: Cache, recipe: FlowRecipe, rng: Random, device: str = "cpu") -> Batch:
    """The photos, texts, image prompts and noise of one step."""
    adapter, short = rng.random() < recipe.adapter_share, rng.random() < recipe.short_share
    length = recipe.short_tokens if short else MAX_LENGTH
    rows = (cache.lengths <= length).nonzero()[:, 0].tolist()
    pick = torch.tensor(rng.sample(rows, recipe.batch))
    n = len(pick)

    def chosen(share: float) -> Tensor:
        return torch.tensor([rng.random() < share for _ in range(n)])

    no_image = chosen(recipe.image_dropped)
    dropped = chosen(recipe.text_dropped_with_adapter if adapter else recipe.text_dropped)
    dropped |= no_image & chosen(0.5) & torch.tensor(adapter)  # the fully unconditional branch of guidance
    views = torch.where(chosen(0.5)[:, None], cache.images[0][pick], cache.images[1][pick]).float()
    x0 = cache.latents[pick].float()
    noise, sigma = torch.randn(x0.shape), noise_levels(n, recipe)
    level = sigma[:, None, None, None]
    keep = (~dropped).float()
    batch = Batch(
        z=(1 - level) * x0 + level * noise,
        sigma=sigma,
        velocity=noise - x0,
        words=torch.where(dropped[:, None], cache.empty_ids, cache.ids[pick])[:, :length],
        pooled=torch.where(dropped[:, None], cache.empty_pooled, cache.pooled[pick]).float(),
        image=torch.where(no_image[:, None], cache.empty_image, views) if adapter else None,
        context=cache.context[pick].float() * keep[:, None, None],
        vector=cache.vector[pick].float() * keep[:, None],
        view=views.masked_fill(no_image[:, None], 0.0),
        time_ids=cache.time_ids[pick],
    )
    moved: dict[str, Any] = {name: value if value is None else value.to(device) for name, value in vars(batch).items()}
    return Batch(**moved)


def vp_levels() -> np.ndarray:
    """The flow noise level of equal signal-to-noise ratio for each of the UNet's 1000 times, rising."""
    alpha = DDPMScheduler(**train_unet.SCHEDULE).alphas_cumprod.double().sqrt().numpy()
    noise = np.sqrt(1 - alpha**2)
    return np.asarray(noise / (alpha + noise))


def vp_times(sigma: Tensor) -> Tensor:
    """The UNet's times (fractional) of the same signal-to-noise ratio as flow noise levels."""
    levels = vp_levels()
    return torch.from_numpy(np.interp(sigma.cpu().double().numpy(), levels, np.arange(len(levels)))).float()


@torch.no_grad()
def taught(unet: UNet2DConditionModel, batch: Batch, guidance: float) -> Tensor:
    """The velocity that the UNet says at z, guided; where it knows no such noise, the velocity of the photo.

    With a = 1 - sigma and b = sigma, z / sqrt(a² + b²) is the UNet's input, and z = a x0 + b e gives e - x0 =
    (e - z) / a for its noise e.
    """
    level = batch.sigma[:, None, None, None]
    branches = 1 if guidance == 1 else 2
    z = (batch.z / (level.square() + (1 - level).square()).sqrt()).repeat(branches, 1, 1, 1)
    times = vp_times(batch.sigma).to(z.device).repeat(branches)

    def rows(values: Tensor) -> Tensor:
        """A condition, and zeros for the unconditional branch."""
        return values if branches == 1 else torch.cat([values, torch.zeros_like(values)])

    added: dict[str, Any] = {"text_embeds": rows(batch.vector), "time_ids": batch.time_ids.repeat(branches, 1)}
    added["image_embeds"] = [rows(batch.view)[:, None]]
    train_unet.set_adapter_scale(unet, 0.0 if batch.image is None else 1.0)
    with torch.autocast(z.device.type, torch.bfloat16):
        noise = unet(z, times, rows(batch.context), added_cond_kwargs=added).sample.float()
    if branches == 2:
        said, without = noise.chunk(2)
        noise = without + guidance * (said - without)
    known = level <= float(vp_levels()[-1])
    return torch.where(known, (noise - batch.z) / (1 - level), batch.velocity)


def said_velocity(painter: FlowPainter, batch: Batch) -> Tensor:
    """The transformer's velocity as tokens [N, h/2 * w/2, 4C]."""
    image: dict[str, Any] = {"ip_hidden_states": []}  # none: the processors then add nothing
    if batch.image is not None:
        image = {"ip_adapter_image_embeds": [batch.image[:, None]]}
    device = batch.z.device
    out: Tensor = painter.transformer(
        hidden_states=pack(batch.z),
        encoder_hidden_states=painter.text(batch.words).last_hidden_state,
        pooled_projections=batch.pooled,
        timestep=batch.sigma,
        img_ids=image_ids(*batch.z.shape[2:]).to(device),
        txt_ids=torch.zeros(batch.words.shape[1], 3, device=device),
        joint_attention_kwargs=image,
        return_dict=False,
    )[0]
    return out.float()


def flow_loss(painter: FlowPainter, unet: UNet2DConditionModel, batch: Batch, recipe: FlowRecipe) -> Tensor:
    """The mean squared error of the velocity."""
    target = pack(taught(unet, batch, recipe.guidance))
    with torch.autocast(batch.z.device.type, torch.bfloat16):
        out = said_velocity(painter, batch)
    return (out - target).square().mean()


# --- training ---------------------------------------------------------------------------------------------------------


def learn_text(text: T5EncoderModel, cache: Cache, steps: int, batch: int = 64) -> None:
    """Teach a fresh T5 encoder what the pack's text encoders say of every token, read by a linear layer that is thrown
    away: it then knows which colour belongs to which object before it meets an image."""
    device = next(text.parameters()).device
    known = cache.context[: 8 * batch].float()
    mean, spread = known.mean((0, 1)), known.std((0, 1))
    head = nn.Linear(WIDTH, cache.context.shape[-1]).to(device)
    optim = optimiser([text, head], 2e-3)
    for step in range(steps):
        set_rate(optim, 2e-3 * (1 - step / steps))
        pick = torch.randint(len(cache.ids), (batch,))
        wanted = ((cache.context[pick].float() - mean) / spread).to(device)
        with attention(device.type), torch.autocast(device.type, torch.bfloat16):
            said = head(text(cache.ids[pick].to(device)).last_hidden_state)
        loss = (said.float() - wanted).square().mean()
        with attention(device.type):
            loss.backward()
        nn.utils.clip_grad_norm_(text.parameters(), 1.0)
        optim.step()
        optim.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            print(f"flow: text step {step} loss {loss.item():.3f}", flush=True)


def load_teacher(pack_folder: Path) -> tuple[Painter, float]:
    """The pack's UNet with its IP-Adapter and text encoder 1, frozen, and the scaling factor of its latents."""
    teacher = Painter()
    warm_start.painter(teacher.unet, teacher.text, pack_folder)
    scaling = AutoencoderKL.load_config(pack_folder, subfolder="vae")["scaling_factor"]
    return teacher.eval().requires_grad_(False), float(scaling)


def load(work: Path, averaged: bool = True) -> FlowPainter:
    """The painter of the last checkpoint, by default its moving average."""
    state = torch.load(work / "flow.pt", map_location="cpu", weights_only=True)
    painter = FlowPainter()
    painter.load_state_dict(state["ema" if averaged else "model"])
    return painter.eval().requires_grad_(False)


def _quicken(painter: FlowPainter, unet: UNet2DConditionModel) -> None:
    """Compile both networks: a minute first, then twice as fast."""
    painter.transformer.compile_repeated_blocks(dynamic=False)
    unet.compile(dynamic=False)


class Training:
    """The painter, its optimisers and its moving average: what a checkpoint holds."""

    def __init__(self, painter: FlowPainter, recipe: FlowRecipe) -> None:
        self.painter, self.recipe = painter, recipe
        self.rates = (recipe.rate, recipe.vector_rate, recipe.text_rate)
        trained: list[nn.Module] = [painter.transformer]
        texts: list[nn.Module] = [painter.text]
        self.optims = (
            muon(trained, self.rates[0]),
            vectors(trained, self.rates[1]),
            optimiser(texts, self.rates[2]),
        )
        self.ema = Ema(painter, recipe.ema)

    def state(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        optims = [optim.state_dict() for optim in self.optims]
        return {"model": self.painter.state_dict(), "ema": self.ema.shadow, "optims": optims}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        device = next(self.painter.parameters()).device
        self.painter.load_state_dict(state["model"])
        self.ema.shadow = {k: v.to(device) for k, v in state["ema"].items()}
        for optim, kept in zip(self.optims, state["optims"]):
            optim.load_state_dict(kept)

    def step(self, unet: UNet2DConditionModel, batch: Batch, course: Course) -> float:
        """Descend by one batch. Returns its loss."""
        for optim, full in zip(self.optims, self.rates):
            set_rate(optim, full * course.rate())
        with attention(batch.z.device.type):
            loss = flow_loss(self.painter, unet, batch, self.recipe)
            loss.backward()
        descend(Team(), self.painter, self.optims)
        self.ema.update(self.painter, course.step + 1)
        return loss.item()


def train(
    work: Path,
    budget: Budget,
    recipe: FlowRecipe | None = None,
    device: str = "cpu",
    pack_folder: Path = PACK,
    compiled: bool = False,
) -> None:
    """Train until the budget is spent, or decay early once `work`/STOP-FLOW exists; checkpoint in `work`/flow.pt. A
    larger budget later goes on from there. Randomness depends on the step only, so with a budget of steps an
    interrupted training ends with the bytes of one that was not."""
    recipe = recipe or FlowRecipe()
    seed_work(work, pack_folder)
    teacher, scaling = load_teacher(pack_folder)
    teacher.to(device)
    cache = make_cache(work, teacher, scaling, device)
    course = Course(budget, work / "flow.pt", work / "STOP-FLOW", save_every_seconds=240.0)
    state = course.resume("model", "ema", "optims")
    torch.manual_seed(7)
    painter = FlowPainter().to(device).train()
    if not state:
        learn_text(painter.text, cache, recipe.text_steps)
    training = Training(painter, recipe)
    if state:
        training.restore(state)
    if compiled:
        _quicken(painter, teacher.unet)
    print(f"flow: {parameters_m(painter):.2f} M, {len(cache.ids)} photos, from step {course.step}", flush=True)
    running, going = 0.0, True
    before = (course.step, course.elapsed)
    course.start()
    while going:
        torch.manual_seed(2000 + course.step)
        batch = draw_batch(cache, recipe, Random(2000 + course.step), device)
        loss = training.step(teacher.unet, batch, course)
        going = course.advance()
        running = loss if running == 0 else 0.98 * running + 0.02 * loss
        if course.step % 25 == 0:
            speed = recipe.batch * (course.step - before[0]) / max(course.elapsed - before[1], 1e-9)
            before = (course.step, course.elapsed)
            shown = f"loss {running:.4f} rate {course.rate():.2f} {speed:.1f} samples/s {course.elapsed:.0f} s"
            print(f"flow: step {course.step} {shown}", flush=True)
        if course.due() or not going:
            course.save(training.state())


def main() -> None:
    """Train the flow base; with more seconds or steps than before, go on where it ended."""
    parser = argparse.ArgumentParser(
        prog="python -m resmaster_stages.picturebook.training.train_flow", description=__doc__
    )
    parser.add_argument("--work", type=Path, default=Path("train_flow"), help="photos, caches and checkpoints")
    parser.add_argument("--pack", type=Path, default=PACK, help="the pack whose UNet teaches")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--photos", type=int, default=24_000)
    parser.add_argument("--processes", type=int, default=2, help="for drawing photos")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument("--seconds", type=float, default=RECIPE.seconds, help="of training, over all runs")
    parser.add_argument("--steps", type=int, default=None, help="instead of seconds")
    parser.add_argument("--compile", action="store_true", help="torch.compile: a minute first, then twice as fast")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    data.draw_photos(args.work / "photos", args.photos, args.processes)
    budget = replace(RECIPE, seconds=args.seconds, steps=args.steps)
    train(args.work, budget, device=args.device, pack_folder=args.pack, compiled=args.compile)


if __name__ == "__main__":
    main()
