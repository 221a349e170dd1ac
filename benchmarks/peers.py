"""This engine beside another implementation of the same method, MultiDiffusion as diffusers ships it, in one run.

    python -m benchmarks.peers                             # Stable Diffusion's shape, channels divided by 4, on a CPU
    python -m benchmarks.peers --shrink 1 --device cuda    # its full size

Random weights: seconds are real, images are noise. Both get the same views, first latents, steps, guidance, scheduler
and decoder, so they draw the same image, and the greatest difference of a pixel says so. They take turns; each one's
fastest of `--rounds` counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPanoramaPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import AutoTokenizer, CLIPTextModel

from benchmarks.methods import Peak, device_name, peak_memory, random_vae, settle, text_config
from resmaster_stages.diffusion import autoencoder
from resmaster_stages.diffusion.loop import CanvasNoise
from resmaster_stages.diffusion.reference import to_image
from resmaster_stages.diffusion.views import Box, view_grid
from resmaster_stages.methods.multidiffusion import MultiDiffusion
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.identity import pack_folder
from resmaster_stages.models.parts import Models
from resmaster_stages.models.places import resolve_device, resolve_dtype

PROMPT, SEED = "a red house on a green meadow", 0


def stable_diffusion(device: torch.device, dtype: torch.dtype, shrink: int) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 in shape, with random weights; its channels and its native size divided by `shrink`."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=64 // shrink,
            block_out_channels=tuple(channels // shrink for channels in (320, 640, 1280, 1280)),
            attention_head_dim=8,
            cross_attention_dim=768 // shrink,
            norm_num_groups=max(1, 32 // shrink),
        )
        vae = random_vae(shrink)
    tokenizer = AutoTokenizer.from_pretrained(pack_folder() / "tokenizer")
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(tokenizer, 768 // shrink)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(device, dtype)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.eval().requires_grad_(False)
    return pipe


def panorama(pipe: StableDiffusionPipeline, boxes: Sequence[Box]) -> StableDiffusionPanoramaPipeline:
    """diffusers' MultiDiffusion on the models of `pipe`, with views `boxes` (in latents) instead of its own."""

    class Panorama(StableDiffusionPanoramaPipeline):
        def get_views(self, *args: Any, **kwargs: Any) -> list[tuple[int, int, int, int]]:
            return [(y0, y1, x0, x1) for y0, x0, y1, x1 in boxes]

    parts = (pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, pipe.scheduler)
    made = Panorama(*parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@dataclass
class Contender:
    """One implementation: draws the image, and what that took at best."""

    name: str
    draw: Callable[[], Image.Image]
    seconds: float = float("inf")
    peak: Peak | None = None
    calls: int = 0
    image: Image.Image | None = None

    def take_turn(self, unet: torch.nn.Module, device: torch.device) -> None:
        self.calls = 0

        def count(*_: object) -> None:
            self.calls += 1

        hook = unet.register_forward_pre_hook(count)
        try:
            with peak_memory(device) as self.peak:
                start = time.perf_counter()
                self.image = self.draw()
                settle(device)
                self.seconds = min(self.seconds, time.perf_counter() - start)
        finally:
            hook.remove()


def contenders(pipe: StableDiffusionPipeline, scale: float, steps: int, view_batch: int) -> list[Contender]:
    """Both implementations, set to draw the same image; theirs also with all views of a step in as few calls as
    ours."""
    models = Models.from_pipeline(pipe)
    native = models.geometry.native_px
    config = MultiDiffusion(
        scale=scale,
        steps=steps,
        stepper="ddim_implied",
        guidance_scale=7.5,
        negative_prompt="",
        view_batch=view_batch,
    )
    side = round(native * scale)
    grid = view_grid(models.geometry, side, side, config.stride)
    noise = CanvasNoise([SEED], 4, grid.height, grid.width, models.device)
    first, low_res = noise().to(models.dtype), Image.new("RGB", (native, native))
    theirs = panorama(pipe, grid.boxes)

    def with_batch(views: int) -> Callable[[], Image.Image]:
        def draw() -> Image.Image:
            made = theirs(
                PROMPT,
                height=side,
                width=side,
                num_inference_steps=steps,
                guidance_scale=7.5,
                latents=first.clone(),
                view_batch_size=views,
                output_type="latent",
            )
            return to_image(autoencoder.decode(models, made.images)[0])

        return draw

    return [
        Contender("this engine", lambda: upscale_image(models, low_res, PROMPT, config=config, seed=SEED)),
        Contender("diffusers", with_batch(1)),
        Contender(f"diffusers, view_batch_size={view_batch}", with_batch(view_batch)),
    ]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--shrink", type=int, default=4, help="divide the model's channels and its native size")
    parser.add_argument("--scale", type=float, default=4.0, help="target size over the model's native size")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--view-batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(words)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    pipe = stable_diffusion(device, dtype, args.shrink)
    field = contenders(pipe, args.scale, args.steps, args.view_batch)
    for contender in field:
        contender.draw()  # warm: kernels are chosen and memory is taken here
    for _ in range(args.rounds):
        for contender in field:
            contender.take_turn(pipe.unet, device)
    ours = field[0]
    print(f"Stable Diffusion's shape / {args.shrink}, random weights, {args.scale:g}x, {args.steps} steps, ", end="")
    print(f"{str(dtype).removeprefix('torch.')}\n{device_name(device)}; torch {torch.__version__}\n")
    print("| implementation | seconds | ratio | UNet calls | peak GB | greatest difference of a pixel |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for each in field:
        far = int(np.abs(np.asarray(each.image, np.int16) - np.asarray(ours.image, np.int16)).max())
        peak = "" if each.peak is None or each.peak.found is None else f"{each.peak.found / 1e9:.2f}"
        ratio = each.seconds / ours.seconds
        print(f"| {each.name} | {each.seconds:.2f} | {ratio:.2f} | {each.calls} | {peak} | {far} |")


if __name__ == "__main__":
    main()
