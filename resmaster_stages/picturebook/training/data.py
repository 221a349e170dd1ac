"""Photos of the picturebook: which view of which scene, at which resolution, with which sentence.

A photo is a 128 px square: 45 % whole scenes (wide ones cropped to a square, as SDXL's training crops them) and 55 %
close-ups with a zoom of 1.5 to 5, each drawn sharply from vectors. `PhotoSet` is a folder of numpy arrays, written by
several processes and read by every training stage. Micro-conditioning has SDXL's meaning and (height, width) order.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from resmaster_stages.picturebook import captions, scenes

NATIVE_PX = 128
TRAIN_SEED, HELD_OUT_SEED = 1_000_000, 900_000_000


@dataclass(frozen=True)
class Photo:
    """One training view. `box` is what the 128 px square shows; sizes are (height, width) in pixels."""

    scene: scenes.Scene
    box: scenes.Box
    caption: str
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]
    render_px: int  # below 128 the photo is drawn at this size and enlarged: a really blurry photo

    @property
    def time_ids(self) -> tuple[int, ...]:
        return (*self.original_size, *self.crop_top_left, *self.target_size)


def make_photo(seed: int) -> Photo:
    """The photo of a seed."""
    rng = Random(seed)
    scene = scenes.make_scene(rng.getrandbits(40))
    h = scenes.HEIGHT
    if rng.random() < 0.45:
        left_px = rng.randint(0, round(NATIVE_PX * scene.width / h) - NATIVE_PX)
        left = left_px * h / NATIVE_PX
        box, aspect, crop = (left, 0.0, left + h, h), scene.width / h, (0, left_px)
    else:
        zoom = math.exp(rng.uniform(math.log(1.5), math.log(5.0)))
        side = h / zoom
        if scene.things and rng.random() < 0.75:
            # aim at an object, anywhere on it
            b = scenes.drawing(rng.choice(scene.things)).box
            cx, cy = rng.uniform(b[0], b[2]), rng.uniform(b[1], b[3])
        else:
            cx, cy = rng.uniform(0, scene.width), rng.uniform(0, h)
        left = min(max(cx - side / 2, 0.0), scene.width - side)
        top = min(max(cy - side / 2, 0.0), h - side)
        box, aspect, crop = (left, top, left + side, top + side), 1.0, (0, 0)
        if rng.random() < 0.3:  # a close-up cut from a close photo that was not square
            aspect = rng.uniform(1.0, 2.0)
            offset = rng.randint(0, round(NATIVE_PX * (aspect - 1)))
            crop = (0, offset) if rng.random() < 0.7 else (offset, 0)
            if crop[0]:
                aspect = 1 / aspect
    blurry = rng.random() < 0.12
    low, high = (40, 127) if blurry else (128, 1024)
    short = round(math.exp(rng.uniform(math.log(low), math.log(high))))
    original = (short, round(short * aspect)) if aspect >= 1 else (round(short / aspect), short)
    target = (NATIVE_PX, NATIVE_PX) if rng.random() < 0.7 else original
    text = captions.caption(scene, box, rng)
    return Photo(scene, box, text, original, crop, target, short if blurry else NATIVE_PX)


def draw(photo: Photo) -> np.ndarray:
    """The photo's pixels, uint8 [128, 128, 3]."""
    from resmaster_stages.picturebook.render import render

    image = render(photo.scene, photo.render_px, photo.render_px, photo.box)
    if photo.render_px != NATIVE_PX:
        image = image.resize((NATIVE_PX, NATIVE_PX), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _draw_shard(folder: Path, first: int, count: int, base_seed: int) -> None:
    target = folder / f"photos-{first:06d}.npz"
    if target.exists():
        return
    photos = [make_photo(base_seed + first + i) for i in range(count)]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        pixels=np.stack([draw(p) for p in photos]),
        time_ids=np.asarray([p.time_ids for p in photos], np.int32),
    )
    rows = [
        {
            "caption": p.caption,
            "pairs": sorted(captions.pairs_in(p.scene, p.box)),
            "subject": captions.subject(p.scene, p.box),
            "whole": captions.is_whole(p.scene, p.box),
        }
        for p in photos
    ]
    (folder / f"photos-{first:06d}.json").write_text(json.dumps(rows))
    partial = target.with_suffix(".partial")
    partial.write_bytes(buffer.getvalue())
    partial.rename(target)


def draw_photos(folder: Path, count: int, processes: int = 2, base_seed: int = TRAIN_SEED, shard: int = 500) -> None:
    """Draw `count` photos into `folder` as shards of `shard` photos; existing shards are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(processes) as pool:
        jobs = [pool.submit(_draw_shard, folder, i, min(shard, count - i), base_seed) for i in range(0, count, shard)]
        for done, job in enumerate(jobs):
            job.result()
            if done % 10 == 9 or done == len(jobs) - 1:
                print(f"render: {min((done + 1) * shard, count)} of {count} photos", flush=True)


@dataclass(frozen=True)
class PhotoSet:
    """Drawn photos in memory. pixels uint8 [N, 3, 128, 128] (torch), time_ids int64 [N, 6]."""

    pixels: Tensor
    time_ids: Tensor
    captions: list[str]
    pairs: list[frozenset[tuple[str, str]]]
    subjects: list[str]
    whole: Tensor

    def __len__(self) -> int:
        return len(self.captions)

    @staticmethod
    def load(folder: Path, limit: int | None = None) -> PhotoSet:
        """Read every finished shard of a folder, in order, up to `limit` photos."""
        pixels, ids, texts, found, subjects, whole = [], [], [], [], [], []
        for path in sorted(folder.glob("photos-*.npz")):
            with np.load(path) as arrays:
                pixels.append(torch.from_numpy(arrays["pixels"]).permute(0, 3, 1, 2).contiguous())
                ids.append(torch.from_numpy(arrays["time_ids"]).long())
            for row in json.loads(path.with_suffix(".json").read_text()):
                texts.append(row["caption"])
                found.append(frozenset((k, c) for k, c in row["pairs"]))
                subjects.append(row["subject"])
                whole.append(row["whole"])
            if limit and len(texts) >= limit:
                break
        if not texts:
            raise FileNotFoundError(f"No drawn photos in {folder}; run the stage 'render' first.")
        n = limit or len(texts)
        return PhotoSet(
            torch.cat(pixels)[:n], torch.cat(ids)[:n], texts[:n], found[:n], subjects[:n], torch.tensor(whole[:n])
        )


def to_float(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, h, w] to float in [-1, 1]."""
    return pixels.float().div(127.5).sub(1.0)


def degrade(images: Tensor, rng: Random, share: float = 0.6, factors: Sequence[float] = (1.0, 4.0)) -> Tensor:
    """Blur a share of a float batch [B, 3, h, w] as an enlarged crop is blurry: down by f in `factors`, bicubic back
    up."""
    out = images.clone()
    h = images.shape[-1]
    for i in range(len(images)):
        if rng.random() < share:
            small = max(8, round(h / math.exp(rng.uniform(math.log(factors[0]), math.log(factors[1])))))
            low = torch.nn.functional.interpolate(
                images[i : i + 1], (small, small), mode="bicubic", antialias=True, align_corners=False
            )
            out[i] = torch.nn.functional.interpolate(low, (h, h), mode="bicubic", align_corners=False)[0].clamp(-1, 1)
    return out
