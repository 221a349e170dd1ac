"""Scenes that have one true answer: drawn small, enlarged by a method, and held against the same scene drawn large.

Vectors have detail at every resolution, so the drawing at 512 px is what a perfect method would make of the drawing at
128 px: its detail is known pixel by pixel, and no set, layout or judge's taste stands between. Methods run with the
settings of docs/evaluation-protocol.md. Knows no captioner of its own for judging: who reads the pairs is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from resmaster_stages.config.dataset import CaptionsConfig, DatasetConfig
from resmaster_stages.config.method import Method
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.diffusion import autoencoder
from resmaster_stages.diffusion.reference import to_image, to_tensor
from resmaster_stages.diffusion.views import target_size
from resmaster_stages.high_res import caption_views
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.metrics.agreement import agreement, psnr
from resmaster_stages.metrics.crops import crops, tile_boxes
from resmaster_stages.metrics.features import ClassifierFeatures
from resmaster_stages.metrics.fid import FeatureStatistics, frechet_distance
from resmaster_stages.metrics.perceptual import perceptual_distance
from resmaster_stages.models.bases.unet_files import PACK_ADAPTER
from resmaster_stages.models.parts import Models
from resmaster_stages.picturebook import captions, scenes
from resmaster_stages.picturebook.training.data import NATIVE_PX

SCALE = 4
"""Side of a true drawing over that of the small one."""

_SHARED: dict[str, Any] = {
    "scale": float(SCALE),
    "steps": 20,
    "guidance_scale": 4.0,
    "negative_prompt": "",
    "micro_conditioning": "native",
}

METHODS: dict[str, dict[str, Any]] = {
    "lanczos": {"method": "lanczos", "scale": float(SCALE)},
    "super_resolution": {"method": "super_resolution", "scale": float(SCALE)},
    "tiled img2img": {
        **_SHARED,
        "method": "multidiffusion",
        "init": "noised_lr",
        "start": 0.65,
        "stride": 0.75,
        "fuse": "linear",
    },
    "c_upscale": {**_SHARED, "method": "c_upscale"},
    "resmaster": {**_SHARED, "method": "resmaster", "steps": 25},
}
"""What is measured: name -> fields of the method."""

Pairs = frozenset[tuple[str, str]]
"""(kind, colour) of objects."""


@dataclass(frozen=True)
class TrueScenes:
    """Scenes of the world, drawn twice."""

    prompts: list[str]
    pairs: list[Pairs]
    """What each scene shows."""
    low_res: list[Image.Image]
    """At the native size."""
    drawings: list[Image.Image]
    """At `SCALE` times the native size."""


@dataclass(frozen=True)
class Judge:
    """What looks at images."""

    extractor: ClassifierFeatures
    read_pairs: Callable[[Sequence[Image.Image]], Sequence[Pairs]]
    """The pairs that images of the native size show."""


@dataclass(frozen=True)
class Judged:
    """Means over the scenes, but for the two that are of all scenes together."""

    distance: float
    """Perceptual distance from the true drawing."""
    psnr: float
    """Of the image against the true drawing, in dB."""
    agreement: float
    """PSNR in dB of the image, averaged down, against the low-res image."""
    fid: float
    """Of the native-size squares of all images against those of the drawings of the same scenes."""
    pairs: float
    """Share of the scenes' pairs that are read in the images, averaged down to the native size."""


def draw(found: Sequence[scenes.Scene]) -> TrueScenes:
    """Square scenes, drawn at both sizes."""
    from resmaster_stages.picturebook.render import render

    large = SCALE * NATIVE_PX
    return TrueScenes(
        [captions.caption(scene) for scene in found],
        [captions.pairs_in(scene) for scene in found],
        [render(scene, NATIVE_PX, NATIVE_PX) for scene in found],
        [render(scene, large, large) for scene in found],
    )


def config_of(pack: Path, device: str) -> ModelConfig:
    """`pack`, which need not be the embedded one, with its IP-Adapter, in float32."""
    adapter = PACK_ADAPTER.model_copy(update={"id": str(pack)})
    return ModelConfig(id=str(pack), ip_adapter=adapter, device=device, dtype="float32")


def dataset_of(pack: Path, device: str, upscale: dict[str, Any]) -> DatasetConfig:
    """What a dataset with `pack`'s own networks would be configured as."""
    values = dict(upscale)
    if values["method"] == "super_resolution":
        values["model"] = str(pack / "super_resolution" / "model.safetensors")
    return DatasetConfig(
        name="paired",
        model=config_of(pack, device),
        captions=CaptionsConfig(model=str(pack / "captioner"), max_new_tokens=40),
        upscale=Method.model_validate(values),
    )


def enlarged(models: Models, config: DatasetConfig, image: Image.Image, prompt: str, seed: int) -> Image.Image:
    """`image` by the method of `config`; where it reads captions, they are written as the captions stage writes
    them."""
    caption = partial(caption_views, config, prompt)
    size = target_size(image.height, image.width, config.upscale.way()[0].scale)
    texts = caption(image, *size) if config.upscale.uses("captions") else None
    return upscale_image(models, image, prompt, config=config.upscale, captions=texts, caption=caption, seed=seed)


def round_trip(models: Models, image: Image.Image) -> Image.Image:
    """A drawing through the VAE and back: what a latent method can hardly beat. Sides are multiples of the latent
    factor."""
    return to_image(autoencoder.decode(models, autoencoder.encode(models, to_tensor(image)))[0])


def distances(images: Sequence[Image.Image], shown: TrueScenes, by: Judge) -> list[float]:
    """The perceptual distance of every image from its scene's drawing."""
    return [perceptual_distance(a, b, by.extractor) for a, b in zip(images, shown.drawings, strict=True)]


def judge(images: Sequence[Image.Image], shown: TrueScenes, by: Judge) -> Judged:
    """How near images, one per scene and of the drawings' size, come to the drawings."""
    small = [image.reduce(SCALE) for image in images]
    hits = sum(len(read & wanted) for read, wanted in zip(by.read_pairs(small), shown.pairs))
    pairs = list(zip(images, shown.drawings, strict=True))
    return Judged(
        float(np.mean(distances(images, shown, by))),
        float(np.mean([psnr(a, b) for a, b in pairs])),
        float(np.mean([agreement(a, b)[0] for a, b in zip(images, shown.low_res)])),
        frechet_distance(_squares(images, by.extractor), _squares(shown.drawings, by.extractor)),
        hits / max(1, sum(map(len, shown.pairs))),
    )


def square_features(images: Sequence[Image.Image], extractor: ClassifierFeatures) -> list[np.ndarray]:
    """Of every image the features [squares, D] of the squares that `perceptual_distance` compares."""
    return [
        extractor.extract(crops(image, tile_boxes(image.height, image.width, extractor.input_px))).features
        for image in images
    ]


def _squares(images: Sequence[Image.Image], extractor: ClassifierFeatures) -> FeatureStatistics:
    """Of all images together."""
    return FeatureStatistics.of(np.concatenate(square_features(images, extractor)))
