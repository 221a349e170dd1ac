"""Fine-tune the captioner (GIT) that the CLIP stage left: cross-entropy on captions of degraded photos."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import GitForCausalLM

from resmaster_stages.picturebook.training import course, train_clip, warm_start
from resmaster_stages.picturebook.training.course import Budget, Course, Ema, fit, optimiser
from resmaster_stages.picturebook.training.data import PhotoSet, to_float
from resmaster_stages.picturebook.training.tokens import make_tokenizer
from resmaster_stages.picturebook.training.train_clip import (
    caption_loss,
    captioner_config,
    degrade_small,
    small_pixels,
    tokenize,
)

MAX_NEW_TOKENS = 60


@dataclass(frozen=True)
class CaptionerRecipe:
    batch: int = 96
    rate: float = 6e-4
    ema: float = 0.998


def load(work: Path) -> GitForCausalLM:
    """The captioner with averaged weights, or as the CLIP stage left it when this stage has not run."""
    path = work / "captioner.pt"
    if not path.exists():
        return train_clip.load_captioner(work).requires_grad_(False)
    git = GitForCausalLM(captioner_config())
    git.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["ema"])
    return git.eval().requires_grad_(False)


def keep(work: Path, pack: Path) -> None:
    """Write an earlier pack's captioner as this stage's checkpoint, for trainings of other stages."""
    git = GitForCausalLM(captioner_config())
    warm_start.captioner(git, pack)
    course.keep(work / "captioner.pt", {"ema": git.state_dict()})


@torch.no_grad()
def describe(captioner: GitForCausalLM, pixels: Tensor) -> list[str]:
    """Greedy captions of a float batch [B, 3, 64, 64] in [-1, 1]."""
    tokenizer = make_tokenizer()
    start = torch.full((len(pixels), 1), tokenizer.bos_token_id, device=pixels.device)
    # the attention mask is given because padding and end are one token
    out = captioner.generate(
        pixel_values=pixels.to(captioner.dtype),
        input_ids=start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
    )
    return [str(s).strip() for s in tokenizer.batch_decode(out, skip_special_tokens=True)]


def train(work: Path, budget: Budget, recipe: CaptionerRecipe | None = None, device: str = "cpu") -> None:
    """Train until the budget is spent, from where the CLIP stage ended; checkpoint in `work`/captioner.pt."""
    recipe = recipe or CaptionerRecipe()
    torch.manual_seed(4)
    photos = PhotoSet.load(work / "photos")
    small = small_pixels(photos.pixels)
    ids, lengths = tokenize(photos.captions)
    captioner = train_clip.load_captioner(work).to(device).train()
    optim = optimiser([captioner], recipe.rate, 0.02)

    def losses(rng: Random) -> dict[str, Tensor]:
        pick = torch.tensor(rng.sample(range(len(ids)), recipe.batch))
        x = degrade_small(to_float(small[pick]), rng).to(device)
        with torch.autocast(device, torch.bfloat16):
            return {"loss": caption_loss(captioner, x, ids[pick].to(device), lengths[pick].to(device))}

    course = Course(budget, work / "captioner.pt", work / "STOP-CAPTIONER")
    for step in fit(captioner, optim, Ema(captioner, recipe.ema), losses, course, seed=7000):
        print(f"captioner: step {step} saved", flush=True)
