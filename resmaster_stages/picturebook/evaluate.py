"""Measure the pack, each number beside its aim, and write them to the pack's card: `python -m resmaster_stages.picturebook.evaluate`.

Held-out photos come from seeds that training never saw, so they are drawn here. Measures:
VAE round trip (PSNR, dB); CLIP retrieval (share of photos whose own caption ranks first of 64); captioner (micro F1 of
(kind, colour) pairs, and of texture words on close-ups, on sharp and on degraded photos); text to image (share of
prompted pairs that the captioner finds in generated scenes, divided by the same share in real drawings of the prompts);
image prompt (the same with the text dropped and a real drawing as image prompt); FID of generated scenes against real
ones, beside that of other real ones; repeated objects at 4x, which direct inference and MultiDiffusion must show.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor
from transformers import GitForCausalLM, ResNetForImageClassification

from resmaster_stages.config import ModelConfig, QualityConfig, SuperResolutionConfig, UpscaleConfig
from resmaster_stages.low_res import generate
from resmaster_stages.metrics.features import load_extractor
from resmaster_stages.metrics.fid import FeatureStatistics, frechet_distance
from resmaster_stages.metrics.repeats import Counts, mentions, repeated_objects
from resmaster_stages.models.enlarger import load_enlarger
from resmaster_stages.models.loading import PACK_ADAPTER, load_models
from resmaster_stages.picturebook import (
    captions,
    data,
    scenes,
    train_captioner,
    train_classifier,
    train_clip,
    train_super_resolution,
    train_vae,
)
from resmaster_stages.picturebook.counting import LEAST, count_objects
from resmaster_stages.picturebook.data import PhotoSet, degrade, to_float
from resmaster_stages.picturebook.export import PACK
from resmaster_stages.picturebook.train_clip import small_pixels
from resmaster_stages.upscale import upscale_image

SCENE_SEED = 950_000_000
"""Where the seeds of evaluation scenes start; training never reaches them."""


PARTS = ("vae", "clip", "captioner", "classifier", "super_resolution", "scenes", "repeats")
"""Groups of measures."""


@dataclass(frozen=True)
class Amounts:
    """How much is measured."""

    photos: int = 512
    """Held-out photos, a multiple of 64."""
    scenes: int = 64
    """Scenes to generate."""
    repeats: int = 16
    """Prompts for the rates of repeated objects at 4x."""
    guidance: float = 5.0


@dataclass(frozen=True)
class Measure:
    """One number and what it should reach; an infinite aim means that the number only stands beside others."""

    name: str
    value: float
    aim: float

    def __str__(self) -> str:
        if math.isinf(self.aim):
            return f"{self.name:<58} {self.value:7.3f}"
        verdict = "met" if self.value >= self.aim else "NOT MET"
        return f"{self.name:<58} {self.value:7.3f}   aim {self.aim:7.3f}   {verdict}"


def held_out(count: int, seed: int = data.HELD_OUT_SEED) -> tuple[PhotoSet, list[data.Photo]]:
    """Draw `count` held-out photos (needs resvg_py)."""
    photos = [data.make_photo(seed + i) for i in range(count)]
    pixels = torch.stack([torch.from_numpy(data.draw(p).copy()).permute(2, 0, 1) for p in photos])
    drawn = PhotoSet(
        pixels,
        torch.tensor([p.time_ids for p in photos]),
        [p.caption for p in photos],
        [captions.pairs_in(p.scene, p.box) for p in photos],
        [captions.subject(p.scene, p.box) for p in photos],
        torch.tensor([captions.is_whole(p.scene, p.box) for p in photos]),
    )
    return drawn, photos


def micro_f1(found: list[frozenset[Any]], wanted: list[frozenset[Any]]) -> float:
    """F1 over all items of all sets."""
    hits = sum(len(a & b) for a, b in zip(found, wanted))
    total = sum(map(len, found)) + sum(map(len, wanted))
    return 2 * hits / total if total else 1.0


def describe_all(captioner: GitForCausalLM, pixels: Tensor, batch: int = 64) -> list[str]:
    """Captions of uint8 [N, 3, 128, 128]."""
    parts = (to_float(small_pixels(part)).to(captioner.device) for part in pixels.split(batch))
    return [text for part in parts for text in train_captioner.describe(captioner, part)]


def _degraded(pixels: Tensor, rng: Random) -> Tensor:
    blurred = degrade(to_float(pixels), rng, share=1.0, factors=(2.0, 4.0))
    return blurred.add(1).mul(127.5).round().clamp(0, 255).byte()


def captioner_measures(captioner: GitForCausalLM, photos: PhotoSet) -> list[Measure]:
    """F1 of pairs on all photos and of texture words on close-ups, sharp and degraded (2x to 4x)."""
    out = []
    close = [i for i in range(len(photos)) if not photos.whole[i]]
    for name, pixels in (("sharp", photos.pixels), ("degraded 2-4x", _degraded(photos.pixels, Random(5)))):
        said = describe_all(captioner, pixels)
        pairs = [captions.pairs(s) for s in said]
        out.append(Measure(f"captioner F1 of (object, colour), {name}", micro_f1(pairs, photos.pairs), 0.85))
        found = [captions.textures(said[i]) for i in close]
        wanted = [captions.textures(photos.captions[i]) for i in close]
        out.append(Measure(f"captioner F1 of texture words on close-ups, {name}", micro_f1(found, wanted), 0.85))
    return out


@torch.no_grad()
def paint(
    pipe: StableDiffusionXLPipeline,
    prompts: list[str],
    seed: int = 0,
    steps: int = 20,
    guidance: float = 5.0,
    batch: int = 16,
    image_prompts: list[Image.Image] | None = None,
) -> list[Image.Image]:
    """Native-size images of prompts; the seed of an image depends on its place in the list only. Image prompts, one per
    prompt, need a loaded IP-Adapter; then pictures are painted one by one, for the pipeline gives every picture of a batch
    all image prompts."""
    images: list[Image.Image] = []
    batch = 1 if image_prompts else batch
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        more: dict[str, Any] = {}
        if image_prompts:
            more["ip_adapter_image"] = image_prompts[start]
        images += pipe(part, num_inference_steps=steps, guidance_scale=guidance, generator=generators, **more).images
    return images


def as_pixels(images: list[Image.Image]) -> Tensor:
    """uint8 [N, 3, h, w]."""
    return torch.stack(
        [
            torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).view(i.height, i.width, 3).permute(2, 0, 1)
            for i in images
        ]
    )


def square_scenes(count: int, first_seed: int) -> list[scenes.Scene]:
    """The first `count` square scenes from a seed on."""
    found: list[scenes.Scene] = []
    while len(found) < count:
        scene = scenes.make_scene(first_seed)
        first_seed += 1
        if scene.width == scenes.HEIGHT:
            found.append(scene)
    return found


def drawn(found: list[scenes.Scene]) -> list[Image.Image]:
    """Scenes at the native size."""
    from resmaster_stages.picturebook.render import render

    return [render(scene, data.NATIVE_PX, data.NATIVE_PX) for scene in found]


def pair_score(
    captioner: GitForCausalLM, images: list[Image.Image], wanted: list[frozenset[tuple[str, str]]]
) -> tuple[float, float]:
    """Share of wanted pairs that the captioner finds, share of found pairs that were wanted."""
    found = [captions.pairs(s) for s in describe_all(captioner, as_pixels(images))]
    hits = sum(len(f & w) for f, w in zip(found, wanted))
    return hits / sum(map(len, wanted)), hits / max(1, sum(map(len, found)))


def scene_measures(
    pack: Path, pipe: StableDiffusionXLPipeline, captioner: GitForCausalLM, count: int, guidance: float
) -> list[Measure]:
    """Generated scenes against real drawings of the same scenes: pairs found by the captioner, and FID. `pipe` is `pack`'s."""
    shown = square_scenes(count, SCENE_SEED)
    prompts = [captions.caption(scene) for scene in shown]
    wanted = [captions.pairs_in(scene) for scene in shown]
    pictures, painted = drawn(shown), paint(pipe, prompts, seed=100, guidance=guidance)
    real, real_precision = pair_score(captioner, pictures, wanted)
    generated, precision = pair_score(captioner, painted, wanted)

    pipe.load_ip_adapter(
        str(pack), subfolder="ip_adapter", weight_name="ip-adapter.safetensors", image_encoder_folder=None
    )
    pipe.set_ip_adapter_scale(1.0)
    prompted = paint(pipe, [""] * count, seed=200, guidance=guidance, image_prompts=pictures)
    pipe.unload_ip_adapter()
    by_image, _ = pair_score(captioner, prompted, wanted)

    extractor = load_extractor(QualityConfig(features="picturebook", device=str(pipe.device)))
    sets = [drawn(square_scenes(4 * count, SCENE_SEED + 1_000_000)), pictures, painted]
    reference, truth, made = (FeatureStatistics.of(extractor.extract(images).features) for images in sets)
    return [
        Measure("image-prompt agreement, text dropped (generated / real)", by_image / max(real, 1e-6), 0.5),
        Measure(
            f"FID of {count} generated scenes against {4 * count} real", frechet_distance(made, reference), math.inf
        ),
        Measure(f"FID of {count} real scenes against {4 * count} real", frechet_distance(truth, reference), math.inf),
        Measure("pairs found in real drawings of the prompts", real, 0.85),
        Measure("pairs found in generated scenes", generated, 0.6),
        Measure("text-to-image agreement (generated / real)", generated / max(real, 1e-6), 0.75),
        Measure("found pairs that were prompted, real drawings", real_precision, 0.85),
        Measure("found pairs that were prompted, generated scenes", precision, 0.6),
    ]


def config_of(pack: Path, device: str) -> ModelConfig:
    """`pack`, which need not be the embedded one, with its IP-Adapter, in float32."""
    adapter = PACK_ADAPTER.model_copy(update={"id": str(pack)})
    return ModelConfig(id=str(pack), ip_adapter=adapter, device=device, dtype="float32")


def repeat_measures(pack: Path, captioner: GitForCausalLM, count: int) -> list[Measure]:
    """The share of 4x pictures in which the captioner counts more objects of a kind than the prompt names."""
    from resmaster_stages.picturebook.render import render

    models = load_models(config_of(pack, str(captioner.device)))
    shown = square_scenes(count, SCENE_SEED + 2_000_000)
    prompts = [captions.caption(scene) for scene in shown]
    native = data.NATIVE_PX
    made = generate(models, prompts, [""] * count, range(count), native, native, 20, 5.0, 8)
    low_res = [image for image in made if isinstance(image, Image.Image)]
    if len(low_res) < count:
        raise ValueError("the model drew nothing for some prompts: it cannot be measured")

    def rate(images: list[Image.Image]) -> float:
        def shown_in(image: Image.Image) -> Counts:
            return count_objects(image, lambda tiles: describe_all(captioner, as_pixels(list(tiles))), native)

        return repeated_objects(
            ((image, mentions(prompt, scenes.KINDS)) for image, prompt in zip(images, prompts)), shown_in, LEAST
        ).rate

    large = [render(scene, 4 * native, 4 * native) for scene in shown]
    out = [Measure("repeated objects, real drawings at 4x (false alarms)", rate(large), math.inf)]
    out.append(Measure("repeated objects, low-res pictures", rate(low_res), math.inf))
    for method in ("direct", "multidiffusion", "resmaster"):
        config = UpscaleConfig(method=method, scale=4.0, steps=20)
        images = [upscale_image(models, i, p, config=config, seed=n) for n, (i, p) in enumerate(zip(low_res, prompts))]
        out.append(Measure(f"repeated objects, {method} at 4x", rate(images), math.inf))
    return out


def super_resolution_measures(pack: Path, count: int) -> list[Measure]:
    """PSNR of degraded held-out photos that the pack's network enlarges 4x, beside bicubic enlargement."""
    weights = pack / train_super_resolution.FOLDER / "model.safetensors"
    enlarger = load_enlarger(SuperResolutionConfig(model=str(weights)), torch.device("cpu"), torch.float32)
    seeds = range(data.HELD_OUT_SEED, data.HELD_OUT_SEED + count)
    pixels = torch.stack(
        [torch.from_numpy(train_super_resolution.draw_large(s).copy()).permute(2, 0, 1) for s in seeds]
    )
    ours, bicubic = train_super_resolution.psnr(enlarger, pixels)
    return [
        Measure("super-resolution of degraded photos, x4, PSNR in dB", ours, bicubic + 0.5),
        Measure("bicubic enlargement of the same, PSNR in dB", bicubic, math.inf),
    ]


def _vae_measures(vae: AutoencoderKL, photos: PhotoSet, crisp: Tensor) -> list[Measure]:
    """PSNR of round trips of the photos that are `crisp` (bool [N])."""
    kinds = (("whole scenes", photos.whole), ("close-ups", ~photos.whole))
    return [
        Measure(f"VAE round trip, {name}, PSNR in dB", train_vae.psnr(vae, photos.pixels[crisp & chosen]), 27.0)
        for name, chosen in kinds
    ]


def evaluate(
    pack: Path = PACK, amounts: Amounts | None = None, device: str = "cpu", parts: Sequence[str] = PARTS
) -> list[Measure]:
    """The measures of a pack on disk, those of `parts`, in float32."""
    amounts = amounts or Amounts()
    pipe = StableDiffusionXLPipeline.from_pretrained(pack, local_files_only=True).to(device, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    captioner = GitForCausalLM.from_pretrained(pack / "captioner", local_files_only=True).to(device).float().eval()
    found, made = held_out(amounts.photos)
    out: list[Measure] = []
    if "vae" in parts:
        out += _vae_measures(pipe.vae, found, torch.tensor([p.render_px == data.NATIVE_PX for p in made]))
    if "clip" in parts:
        right = train_clip.retrieval(pipe.text_encoder_2, pipe.image_encoder, found)
        out.append(Measure("CLIP retrieval, own caption first of 64", right, 0.70))
    if "captioner" in parts:
        out += captioner_measures(captioner, found)
    if "classifier" in parts:
        classifier = ResNetForImageClassification.from_pretrained(pack / "classifier", local_files_only=True)
        right = train_classifier.accuracy(classifier.to(device).float().eval(), found)
        out.append(Measure("classifier, main subject of held-out photos", right, 0.85))
    if "super_resolution" in parts:
        out += super_resolution_measures(pack, min(amounts.photos, 64))
    if "scenes" in parts:
        out += scene_measures(pack, pipe, captioner, amounts.scenes, amounts.guidance)
    if "repeats" in parts:
        out += repeat_measures(pack, captioner, amounts.repeats)
    return out


def main() -> None:
    """Print the measures and record them in the card."""
    parser = argparse.ArgumentParser(prog="python -m resmaster_stages.picturebook.evaluate", description=__doc__)
    parser.add_argument("--pack", type=Path, default=PACK)
    parser.add_argument("--photos", type=int, default=512, help="held-out photos (a multiple of 64)")
    parser.add_argument("--scenes", type=int, default=64, help="scenes to generate")
    parser.add_argument("--repeats", type=int, default=16, help="prompts for the repeated-object rates at 4x")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    amounts = Amounts(args.photos, args.scenes, args.repeats, args.guidance)
    measures = evaluate(args.pack, amounts, args.device)
    for measure in measures:
        print(measure)
    path = args.pack / "card.json"
    card: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    card["measures"] = {
        m.name: {"value": round(m.value, 4), "aim": None if math.isinf(m.aim) else m.aim} for m in measures
    }
    card["measured_on"] = {
        "held_out_photos": args.photos,
        "generated_scenes": args.scenes,
        "repeat_prompts": args.repeats,
        "guidance": args.guidance,
        "steps": 20,
    }
    path.write_text(json.dumps(card, indent=2) + "\n")


if __name__ == "__main__":
    main()
