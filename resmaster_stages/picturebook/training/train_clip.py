"""Train the picturebook's CLIP: text encoder 2 and the image encoder, contrastively, on (degraded photo, caption).

Two helpers make the image tower learn fast: a captioning loss through the captioner that reads the same patch tokens
(GIT's vision tower is CLIP's), and temporary heads that name the (kind, colour) pairs. The captioner that comes out is
the start of the stage `captioner`. Image prompts and captions are used on blurry crops, so inputs are degraded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    GitConfig,
    GitForCausalLM,
)

from resmaster_stages.picturebook.scenes import COLOURS, KINDS
from resmaster_stages.picturebook.training import course, warm_start
from resmaster_stages.picturebook.training.course import Budget, Course, attention, optimiser, parameters_m, set_rate
from resmaster_stages.picturebook.training.data import PhotoSet, degrade, to_float
from resmaster_stages.picturebook.training.tokens import MAX_LENGTH, make_tokenizer

IMAGE_PX, PATCH_PX, WIDTH, PROJECTION = 64, 8, 128, 128
PAIRS = [(k, c) for k in KINDS for c in COLOURS]


def text_config(**more: Any) -> CLIPTextConfig:
    """Three layers of width 128; the end token marks the pooled position."""
    tokenizer = make_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=384,
        projection_dim=PROJECTION,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


_VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": IMAGE_PX,
    "patch_size": PATCH_PX,
}


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(**_VISION, projection_dim=PROJECTION)


def captioner_config() -> GitConfig:
    """GIT with CLIP's own vision tower and two text layers."""
    tokenizer = make_tokenizer()
    return GitConfig(
        vision_config=_VISION,
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class _Towers(nn.Module):
    """Everything that trains in this stage."""

    def __init__(self) -> None:
        super().__init__()
        self.text = CLIPTextModelWithProjection(text_config())
        self.image = CLIPVisionModelWithProjection(vision_config())
        self.captioner = GitForCausalLM(captioner_config())
        self.captioner.git.image_encoder = _GivenFeatures()
        self.image_head = nn.Linear(PROJECTION, len(PAIRS))
        self.text_head = nn.Linear(PROJECTION, len(PAIRS))
        self.log_scale = nn.Parameter(torch.tensor(2.66))


class _GivenFeatures(nn.Module):
    """Stands in for GIT's vision tower: the patch tokens [B, 1, T, C] come in ready-made."""

    def forward(self, features: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=features[:, 0])


@dataclass(frozen=True)
class ClipRecipe:
    batch: int = 96
    rate: float = 1.2e-3
    pair_weight: float = 1.0
    caption_weight: float = 1.0


def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids int64 [N, 77] padded with the end token, and lengths [N] that count start and end."""
    tokenizer = make_tokenizer()
    out = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
    return out.input_ids, out.attention_mask.sum(1)


def small_pixels(pixels: Tensor, batch: int = 500) -> Tensor:
    """Photos uint8 [N, 3, 128, 128] at the image encoder's size, uint8 [N, 3, 64, 64]."""
    parts = [
        F.interpolate(p.float(), (IMAGE_PX, IMAGE_PX), mode="bicubic", antialias=True).round().clamp(0, 255).byte()
        for p in pixels.split(batch)
    ]
    return torch.cat(parts)


def degrade_small(small: Tensor, rng: Random, share: float = 0.6) -> Tensor:
    """Degrade 64 px images as their 128 px originals are: a blur factor f at 128 px is f / 2 at 64 px."""
    return degrade(small, rng, share, (1.0, 2.2))


def pair_targets(found: list[frozenset[tuple[str, str]]]) -> Tensor:
    """A multi-hot float [N, pairs]."""
    out = torch.zeros(len(found), len(PAIRS))
    for i, pairs in enumerate(found):
        for pair in pairs:
            out[i, PAIRS.index(pair)] = 1.0
    return out


def patch_tokens(image: CLIPVisionModelWithProjection, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The image embedding [B, 128] and the normed tokens [B, 65, 128] that the captioner reads."""
    hidden = image.vision_model(pixel_values=pixels).last_hidden_state
    tokens = image.vision_model.post_layernorm(hidden)
    return image.visual_projection(tokens[:, 0]), tokens


def caption_loss(captioner: GitForCausalLM, pixels: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """Next-token cross-entropy over captions, padding ignored."""
    longest = int(lengths.max())
    ids = ids[:, :longest]
    inside = torch.arange(longest, device=ids.device)[None] < lengths[:, None]
    out = captioner(input_ids=ids, pixel_values=pixels, attention_mask=inside.long(), use_cache=False)
    logits = out.logits[:, -longest:-1].float()
    target = ids[:, 1:].masked_fill(~inside[:, 1:], -100)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1), ignore_index=-100)


@torch.no_grad()
def retrieval(
    text: CLIPTextModelWithProjection, image: CLIPVisionModelWithProjection, photos: PhotoSet, size: int = 64
) -> float:
    """Share of photos whose caption ranks first among `size` captions (photos in groups of `size`)."""
    device = next(image.parameters()).device
    right, total = 0, 0
    for start in range(0, len(photos) - size + 1, size):
        ids, _ = tokenize(photos.captions[start : start + size])
        words = F.normalize(text(ids.to(device)).text_embeds, dim=-1)
        small = to_float(small_pixels(photos.pixels[start : start + size])).to(device)
        views = F.normalize(image(pixel_values=small).image_embeds, dim=-1)
        best = (views @ words.T).argmax(1).cpu()
        same = [photos.captions[start + i] == photos.captions[start + int(j)] for i, j in enumerate(best)]
        right, total = right + sum(same), total + size
    return right / total


def load(folder: Path) -> tuple[CLIPTextModelWithProjection, CLIPVisionModelWithProjection, float]:
    """Text encoder 2, the image encoder and CLIP's log scale from the checkpoint."""
    state = torch.load(folder / "clip.pt", map_location="cpu", weights_only=True)
    towers = _Towers()
    towers.load_state_dict(state["model"])
    towers.eval().requires_grad_(False)
    return towers.text, towers.image, float(towers.log_scale)


def keep(work: Path, pack: Path) -> None:
    """Write an earlier pack's CLIP as this stage's checkpoint, for trainings of other stages."""
    towers = _Towers()
    towers.log_scale.data.fill_(warm_start.clip(towers.text, towers.image, pack))
    warm_start.captioner(towers.captioner, pack)
    course.keep(work / "clip.pt", {"model": towers.state_dict()})


def load_captioner(folder: Path) -> GitForCausalLM:
    """The captioner as it leaves this stage: the shared vision tower and the text layers in one GIT model."""
    state = torch.load(folder / "clip.pt", map_location="cpu", weights_only=True)
    towers = _Towers()
    towers.load_state_dict(state["model"])
    git = GitForCausalLM(captioner_config())
    weights = dict(towers.captioner.state_dict().items())
    vision = towers.image.vision_model.state_dict()
    for key in git.state_dict():
        if ".image_encoder." in key:
            weights[key] = vision[key.split(".image_encoder.")[1].removeprefix("vision_model.")]
    git.load_state_dict(weights)
    return git.eval()


def train(
    work: Path, budget: Budget, recipe: ClipRecipe | None = None, device: str = "cpu", pack: Path | None = None
) -> None:
    """Train until the budget is spent, from scratch or from an earlier pack; checkpoint in `work`/clip.pt."""
    recipe = recipe or ClipRecipe()
    torch.manual_seed(1)
    photos = PhotoSet.load(work / "photos")
    held_out = PhotoSet.load(work / "held-out", 256)
    small = small_pixels(photos.pixels)
    ids, lengths = tokenize(photos.captions)
    targets = pair_targets(photos.pairs)
    towers = _Towers()
    if pack:
        towers.log_scale.data.fill_(warm_start.clip(towers.text, towers.image, pack))
        warm_start.captioner(towers.captioner, pack)
    towers.to(device)
    optim = optimiser([towers], recipe.rate, 0.05)
    course = Course(budget, work / "clip.pt", work / "STOP-CLIP")
    state = course.resume("model", "optim")
    if state:
        towers.load_state_dict(state["model"])
        optim.load_state_dict(state["optim"])
    print(
        f"clip: text {parameters_m(towers.text):.2f} M, image {parameters_m(towers.image):.2f} M, captioner "
        f"{parameters_m(towers.captioner):.2f} M without its vision tower, {len(photos)} photos, from step "
        f"{course.step}",
        flush=True,
    )
    rng = Random(course.step)
    going = True
    course.start()
    while going:
        set_rate(optim, recipe.rate * course.rate())
        pick = torch.tensor(rng.sample(range(len(photos)), recipe.batch))
        x = degrade_small(to_float(small[pick]), rng).to(device)
        length = lengths[pick].to(device)
        token = ids[pick].to(device)[:, : int(length.max())]
        with attention(device), torch.autocast(device, torch.bfloat16):
            view, tokens = patch_tokens(towers.image, x)
            words = towers.text(token).text_embeds
            pair_image, pair_text = towers.image_head(view), towers.text_head(words)
            captioning = caption_loss(towers.captioner, tokens[:, None], token, length)
        scale = towers.log_scale.clamp(max=4.6).exp()
        logits = scale * F.normalize(view.float(), dim=-1) @ F.normalize(words.float(), dim=-1).T
        label = torch.arange(recipe.batch, device=device)
        contrast = 0.5 * (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label))
        wanted = targets[pick].to(device)
        naming = sum(
            F.binary_cross_entropy_with_logits(p.float(), wanted, reduction="none").sum(1).mean()
            for p in (pair_image, pair_text)
        )
        loss = contrast + 0.5 * recipe.pair_weight * naming + recipe.caption_weight * captioning
        with attention(device):
            loss.backward()
        nn.utils.clip_grad_norm_(towers.parameters(), 1.0)
        optim.step()
        optim.zero_grad(set_to_none=True)
        going = course.advance()
        if course.step % 25 == 0:
            print(
                f"clip: step {course.step} contrast {contrast.item():.3f} naming {float(naming):.3f} caption "
                f"{captioning.item():.3f} {course.elapsed:.0f} s",
                flush=True,
            )
        if course.due() or not going:
            course.save({"model": towers.state_dict(), "optim": optim.state_dict()})
            towers.eval()
            print(
                f"clip: step {course.step} held-out top-1 of 64 {retrieval(towers.text, towers.image, held_out):.3f}",
                flush=True,
            )
            towers.train()
