"""Trains what the picturebook still lacks: its VAE, the UNet on the VAE's new latents, then a pack with measures of its
own.

Everything else is kept from the shipped pack. The pack comes back as parts of one tar:
`cat pack.tar.* | tar -x` makes the folder `pack`.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from benchmarks.gpu.record import Run
from resmaster_stages.picturebook.training import data, train, train_unet, train_vae, warm_start
from resmaster_stages.picturebook.training.course import Budget
from resmaster_stages.picturebook.training.evaluate import Amounts, Measure, evaluate
from resmaster_stages.picturebook.training.export import PACK, export
from resmaster_stages.picturebook.training.samples import sheet

PART_BYTES = 15 * 2**20
"""Greatest size of a part of the tar."""
SHARD = 500
"""Photos of a shard."""
SHARES = {"photos": 0.18, "vae": 0.3, "unet": 0.3}
"""Of the step's time; the rest is for caches, the pack and its measures."""
LEAST_SECONDS = 45.0
"""Less than this trains nothing worth keeping."""


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    photos: int
    """At most."""
    held_out: int
    shard: int
    vae: train_vae.VaeRecipe
    unet: train_unet.UnetRecipe
    amounts: Amounts
    parts: Sequence[str]
    """Of the evaluation."""


FULL = Plan(
    photos=40_000,
    held_out=500,
    shard=SHARD,
    vae=train_vae.VaeRecipe(photos=40_000, batch=128),
    unet=train_unet.UnetRecipe(batch=192),
    amounts=Amounts(photos=256, scenes=32),
    parts=("vae", "scenes"),
)
TOY = Plan(
    photos=16,
    held_out=8,
    shard=8,
    vae=train_vae.VaeRecipe(photos=16, batch=4),
    unet=train_unet.UnetRecipe(batch=4),
    amounts=Amounts(photos=8, scenes=2),
    parts=("vae",),
)


def draw(folder: Path, plan: Plan, seconds: float) -> int:
    """Photos for training on all cores, in rounds of a shard a core, until `seconds` are over; how many there are.

    A first round is drawn in any case.
    """
    start, cores, count = time.monotonic(), os.cpu_count() or 1, 0
    while count < plan.photos:
        before = time.monotonic()
        count = min(plan.photos, count + cores * plan.shard)
        data.draw_photos(folder, count, cores, shard=plan.shard)
        now = time.monotonic()
        if now - start + (now - before) > seconds:
            break
    return count


def budget(run: Run, stage: str, seconds: float) -> Budget:
    """`seconds` of training; a rehearsal takes two steps."""
    if run.rehearse:
        return Budget(steps=2, warmup_steps=1, decay=0.5)
    return Budget(seconds=seconds, warmup_steps=50, decay=train.RECIPE[stage].decay)


def packed(pack: Path, out: Path) -> list[str]:
    """`pack` as a tar in `out`, cut into parts; their names."""
    with tempfile.TemporaryFile() as whole:
        with tarfile.open(fileobj=whole, mode="w") as tar:
            tar.add(pack, arcname="pack")
        whole.seek(0)
        names: list[str] = []
        while part := whole.read(PART_BYTES):
            names.append(f"pack.tar.{len(names):02d}")
            (out / names[-1]).write_bytes(part)
    return names


def measures(found: Sequence[Measure]) -> dict[str, float]:
    """For the JSON."""
    return {measure.name: round(measure.value, 4) for measure in found}


def _timed(run: Run, what: str, call: Any) -> None:
    """Does one part; the seconds that it took stand in the record. Raises what it raises."""
    start = time.monotonic()
    call()
    run.record.add("parts", {"what": what, "seconds": time.monotonic() - start})


def train_all(run: Run, plan: Plan, work: Path) -> Path:
    """Photos, VAE, UNet, pack; the pack's folder."""
    span = run.left()
    before = work / "shipped"
    shutil.copytree(PACK, before)
    warm_start.begin(before, work)
    _timed(
        run,
        "held-out photos",
        lambda: data.draw_photos(work / "held-out", plan.held_out, os.cpu_count() or 1, data.HELD_OUT_SEED, plan.shard),
    )
    _timed(run, "photos", lambda: run.record.put("photos", draw(work / "photos", plan, SHARES["photos"] * span)))
    train.keep_others(work, before, ("vae", "unet"))
    vae = budget(run, "vae", SHARES["vae"] * span)
    _timed(run, "vae", lambda: train_vae.train(work, vae, plan.vae, run.device, before))
    unet = budget(run, "unet", min(SHARES["unet"] * span, max(5.0, run.left() - 0.2 * span)))
    _timed(run, "unet", lambda: train_unet.train(work, unet, plan.unet, run.device, before))
    _timed(run, "export", lambda: export(work, work / "pack"))
    return work / "pack"


def _compared(run: Run, plan: Plan, pack: Path) -> None:
    """The new pack's measures beside the shipped one's, by the same photos and scenes."""
    run.record.put("measured_on", {"photos": plan.amounts.photos, "scenes": plan.amounts.scenes})
    for name, folder in (("new", pack), ("shipped", PACK)):
        for part in plan.parts:
            if not run.skip("measures", 12.0, pack=name, part=part):
                run.record.attempt(
                    "measures",
                    lambda folder=folder, part=part: measures(evaluate(folder, plan.amounts, run.device, (part,))),
                    pack=name,
                    part=part,
                )


def _samples(run: Run, pack: Path) -> dict[str, Any]:
    """A sheet of images by the new pack, to look at."""
    pipe = StableDiffusionXLPipeline.from_pretrained(pack, local_files_only=True).to(run.device, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    sheet(pipe).save(run.out / "samples.png")
    return {"file": "samples.png"}


def measure(run: Run) -> None:
    """Trains for the time that is left."""
    plan = TOY if run.rehearse else FULL
    if run.skip("parts", LEAST_SECONDS, what="all"):
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pack = train_all(run, plan, work)
        card = json.loads((pack / "card.json").read_text())
        run.record.put("stages", card["stages"])
        run.record.put("files", packed(pack, run.out))
        _compared(run, plan, pack)
        if not run.rehearse and not run.skip("samples", 10.0):
            run.record.attempt("samples", lambda: _samples(run, pack))
