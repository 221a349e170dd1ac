"""Train the picturebook's classifier: what an image is mainly of, and the features of FID, KID and the Inception
score.

A small ResNet on native 128 px, where texture is visible (CLIP sees 64 px). Beside the subject (a softmax, the classes
of the Inception score) it learns to name the (kind, colour) pairs and how blurred its input is, so that its features
know content, colour and sharpness; those two heads are dropped afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

from resmaster_stages.picturebook.captions import SUBJECTS
from resmaster_stages.picturebook.training import course
from resmaster_stages.picturebook.training.course import Budget, Course, Ema, fit, optimiser
from resmaster_stages.picturebook.training.data import NATIVE_PX, PhotoSet, to_float
from resmaster_stages.picturebook.training.train_clip import PAIRS, pair_targets

FEATURES = 128


def classifier_config() -> ResNetConfig:
    """Four stages of one basic block, strides 4 to 32."""
    return ResNetConfig(
        embedding_size=24,
        hidden_sizes=[32, 64, 96, FEATURES],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        id2label=dict(enumerate(SUBJECTS)),
        label2id={name: i for i, name in enumerate(SUBJECTS)},
    )


class _Learner(nn.Module):
    """The classifier and the two heads that leave with the training."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = ResNetForImageClassification(classifier_config())
        self.pair_head = nn.Linear(FEATURES, len(PAIRS))
        self.blur_head = nn.Linear(FEATURES, 1)


@dataclass(frozen=True)
class ClassifierRecipe:
    """`blurred` is the share of photos that are blurred, by factors up to `greatest_blur`."""

    batch: int = 64
    rate: float = 2e-3
    blurred: float = 0.4
    greatest_blur: float = 4.0
    ema: float = 0.998


def blur_some(images: Tensor, rng: Random, recipe: ClassifierRecipe) -> tuple[Tensor, Tensor]:
    """Float images [B, 3, h, w], a share of them enlarged from a smaller size; log2 of the factor [B], 0 for
    untouched."""
    out, factors = images.clone(), torch.zeros(len(images))
    edge = images.shape[-1]
    for i in range(len(images)):
        if rng.random() >= recipe.blurred:
            continue
        factors[i] = rng.uniform(0.0, math.log2(recipe.greatest_blur))
        small = round(edge / 2 ** float(factors[i]))
        low = F.interpolate(images[i : i + 1], (small, small), mode="bicubic", antialias=True, align_corners=False)
        out[i] = F.interpolate(low, (edge, edge), mode="bicubic", align_corners=False)[0].clamp(-1, 1)
    return out, factors


def load(work: Path) -> ResNetForImageClassification:
    """The classifier with averaged weights."""
    learner = _Learner()
    learner.load_state_dict(torch.load(work / "classifier.pt", map_location="cpu", weights_only=True)["ema"])
    return learner.classifier.eval().requires_grad_(False)


def keep(work: Path, pack: Path) -> None:
    """Write an earlier pack's classifier as this stage's checkpoint, for trainings of other stages."""
    learner = _Learner()
    earlier = ResNetForImageClassification.from_pretrained(pack / "classifier", local_files_only=True)
    learner.classifier.load_state_dict(earlier.state_dict())
    course.keep(work / "classifier.pt", {"ema": learner.state_dict()})


@torch.no_grad()
def accuracy(classifier: ResNetForImageClassification, photos: PhotoSet, batch: int = 64) -> float:
    """Share of photos whose main subject is the most probable class."""
    device = next(classifier.parameters()).device
    wanted = torch.tensor([SUBJECTS.index(s) for s in photos.subjects])
    found = torch.cat([classifier(to_float(p).to(device)).logits.argmax(1).cpu() for p in photos.pixels.split(batch)])
    return float((found == wanted).float().mean())


def train(work: Path, budget: Budget, recipe: ClassifierRecipe | None = None, device: str = "cpu") -> None:
    """Train until the budget is spent; checkpoint in `work`/classifier.pt."""
    recipe = recipe or ClassifierRecipe()
    torch.manual_seed(5)
    photos = PhotoSet.load(work / "photos")
    held_out = PhotoSet.load(work / "held-out", 500)
    if photos.pixels.shape[-1] != NATIVE_PX:
        raise ValueError(f"photos of {NATIVE_PX} px expected, found {photos.pixels.shape[-1]}: draw them anew")
    subjects = torch.tensor([SUBJECTS.index(s) for s in photos.subjects])
    pairs = pair_targets(photos.pairs)
    learner = _Learner().to(device)
    optim = optimiser([learner], recipe.rate, 0.02)

    def losses(rng: Random) -> dict[str, Tensor]:
        pick = torch.tensor(rng.sample(range(len(photos)), recipe.batch))
        x, factors = blur_some(to_float(photos.pixels[pick]), rng, recipe)
        x = x.to(device, memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            features = learner.classifier.resnet(x).pooler_output.flatten(1)
            logits = learner.classifier.classifier(features)
            pair_logits, blur = learner.pair_head(features), learner.blur_head(features)[:, 0]
        wanted = pairs[pick].to(device)
        pairing = F.binary_cross_entropy_with_logits(pair_logits.float(), wanted, reduction="none").sum(1).mean()
        return {
            "subject": F.cross_entropy(logits.float(), subjects[pick].to(device)),
            "pairs": 0.5 * pairing,
            "blur": F.mse_loss(blur.float(), factors.to(device)),
        }

    course = Course(budget, work / "classifier.pt", work / "STOP-CLASSIFIER")
    for step in fit(learner, optim, Ema(learner, recipe.ema), losses, course, seed=9000):
        print(f"classifier: step {step} held-out accuracy {accuracy(load(work), held_out):.3f}", flush=True)
