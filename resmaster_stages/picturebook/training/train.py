"""One command trains the whole picturebook: `python -m resmaster_stages.picturebook.training.train`.

Stages, in order: render, vae, decoder, clip, captioner, classifier, super_resolution, unet, export. Each resumes from
its last checkpoint in the work folder. The defaults are the recipe of the shipped pack; budgets are wall-clock seconds
on 2 CPU cores (or steps, if given). Where CPU cores are shared, VAE and UNet train faster as one-thread processes:
`torchrun --nproc_per_node 2 -m resmaster_stages.picturebook.training.train --stages vae,decoder,unet --threads 1`.
`touch WORK/STOP-UNET` (or STOP-VAE, STOP-DECODER, STOP-CLIP, STOP-CAPTIONER, STOP-CLASSIFIER, STOP-SUPER-RESOLUTION)
starts that stage's final decay early.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from resmaster_stages.picturebook.training import (
    data,
    train_captioner,
    train_classifier,
    train_clip,
    train_decoder,
    train_super_resolution,
    train_unet,
    train_vae,
    warm_start,
)
from resmaster_stages.picturebook.training.course import Budget

STAGES = ("render", "vae", "decoder", "clip", "captioner", "classifier", "super_resolution", "unet", "export")
KEPT = {
    "clip": train_clip.keep,
    "captioner": train_captioner.keep,
    "classifier": train_classifier.keep,
    "super_resolution": train_super_resolution.keep,
}
"""Stages that an earlier pack can stand in for where they are not trained."""
RECIPE: dict[str, Budget] = {
    "vae": Budget(seconds=3100, decay=0.2),
    "decoder": Budget(seconds=1200, decay=0.7),
    "clip": Budget(seconds=890, decay=0.6),
    "captioner": Budget(seconds=480, decay=0.6),
    "classifier": Budget(seconds=420, decay=0.6),
    "super_resolution": Budget(seconds=1200, decay=0.5),
    "unet": Budget(seconds=3560, decay=0.3),
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m resmaster_stages.picturebook.training.train", description=__doc__)
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated, default all")
    parser.add_argument("--work", type=Path, default=Path("train"), help="photos, caches and checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--from-pack",
        type=Path,
        default=None,
        help="start from an earlier pack's weights (a copy of its folder); stages that are not trained keep them",
    )
    parser.add_argument("--photos", type=int, default=40_000)
    parser.add_argument("--processes", type=int, default=2, help="for drawing photos")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile for VAE, decoder and UNet: minutes first, then a quarter faster",
    )
    for stage, budget in RECIPE.items():
        flag = stage.replace("_", "-")
        parser.add_argument(f"--{flag}-seconds", type=float, default=budget.seconds)
        parser.add_argument(f"--{flag}-steps", type=int, default=None, help="instead of seconds")
    return parser.parse_args()


def budget_of(stage: str, args: argparse.Namespace) -> Budget:
    """The recorded budget of a stage with the command line's seconds or steps."""
    recorded = RECIPE[stage]
    return Budget(
        seconds=getattr(args, f"{stage}_seconds"),
        steps=getattr(args, f"{stage}_steps"),
        warmup_steps=recorded.warmup_steps,
        decay=recorded.decay,
        decay_seconds_on_stop=recorded.decay_seconds_on_stop,
    )


def keep_others(work: Path, pack: Path, stages: Sequence[str]) -> None:
    """Checkpoints of `pack` for what `stages` do not train and `work` does not have."""
    for stage, keep in KEPT.items():
        if stage not in stages and not (work / f"{stage}.pt").exists():
            keep(work, pack)


def main() -> None:
    """Run the chosen stages in order."""
    args = _arguments()
    stages = args.stages.split(",")
    unknown = sorted(set(stages) - set(STAGES))
    if unknown:
        raise SystemExit(f"Unknown stage {', '.join(unknown)}; choose from {', '.join(STAGES)}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not set(stages) <= {"vae", "decoder", "unet"}:
        raise SystemExit("Under torchrun only the stages vae, decoder and unet can run; run the others without it.")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.from_pack:
        warm_start.begin(args.from_pack, args.work)
        keep_others(args.work, args.from_pack, stages)
    for stage in STAGES:
        if stage not in stages:
            continue
        if stage == "render":
            data.draw_photos(args.work / "held-out", 1000, args.processes, data.HELD_OUT_SEED)
            data.draw_photos(args.work / "photos", args.photos, args.processes)
        elif stage == "export":
            from resmaster_stages.picturebook.training.export import assemble, export
            from resmaster_stages.picturebook.training.samples import sheet

            export(args.work)
            pipe, _ = assemble(args.work)
            sheet(pipe).save(args.work / "samples.png")
            print(f"export: look at {args.work / 'samples.png'}", flush=True)
        else:
            budget = budget_of(stage, args)
            if stage == "vae":
                train_vae.train(args.work, budget, device=args.device, pack=args.from_pack, compiled=args.compile)
            elif stage == "decoder":
                train_decoder.train(args.work, budget, device=args.device, compiled=args.compile)
            elif stage == "clip":
                train_clip.train(args.work, budget, device=args.device, pack=args.from_pack)
            elif stage == "captioner":
                train_captioner.train(args.work, budget, device=args.device)
            elif stage == "classifier":
                train_classifier.train(args.work, budget, device=args.device)
            elif stage == "super_resolution":
                train_super_resolution.train(args.work, budget, device=args.device, processes=args.processes)
            else:
                train_unet.train(args.work, budget, device=args.device, pack=args.from_pack, compiled=args.compile)


if __name__ == "__main__":
    main()
