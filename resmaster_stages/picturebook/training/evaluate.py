"""Measure the pack, each number beside its aim, and write them to the pack's card: `python -m
resmaster_stages.picturebook.training.evaluate`.

Held-out photos come from seeds that training never saw, so they are drawn here. Measures:
VAE round trip (PSNR, dB); CLIP retrieval (share of photos whose own caption ranks first of 64); captioner (micro F1 of
(kind, colour) pairs, and of texture words on close-ups, on sharp and on degraded photos); classifier (main subject, and
whether it reads the VAE's round trips as sharp); text to image (share of prompted pairs that the captioner finds in
generated scenes, divided by the same share in real drawings of the prompts); image prompt (the same with the text
dropped and a real drawing as image prompt); FID of generated scenes against real ones, over that of other real ones;
repeated objects at 4x, which direct inference and MultiDiffusion must show; and scenes enlarged 4x against the same
scenes drawn large (`paired`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, DDIMScheduler, FluxPipeline, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor
from transformers import GitForCausalLM, ResNetForImageClassification

from resmaster_stages.config.model import FewStepConfig, ModelConfig
from resmaster_stages.methods.generate import generate
from resmaster_stages.metrics.features import load_classifier
from resmaster_stages.metrics.fid import FeatureStatistics, frechet_distance
from resmaster_stages.metrics.repeats import Counts, mentions, repeated_objects
from resmaster_stages.models.bases.few_step_files import fuse_lora
from resmaster_stages.models.enlarger import load_enlarger
from resmaster_stages.models.identity import NetworkFile
from resmaster_stages.models.load import load_models
from resmaster_stages.picturebook import captions, scenes
from resmaster_stages.picturebook.counting import LEAST, count_objects
from resmaster_stages.picturebook.training import (
    data,
    paired,
    train_captioner,
    train_classifier,
    train_clip,
    train_super_resolution,
    train_vae,
)
from resmaster_stages.picturebook.training.data import PhotoSet, degrade, to_float
from resmaster_stages.picturebook.training.export import PACK
from resmaster_stages.picturebook.training.train_clip import small_pixels

SCENE_SEED = 950_000_000
"""Where the seeds of evaluation scenes start; training never reaches them."""


Painting: TypeAlias = StableDiffusionXLPipeline | FluxPipeline
"""Pipelines of the two bases."""

PARTS = ("vae", "clip", "captioner", "classifier", "super_resolution", "scenes", "repeats", "paired")
"""Groups of measures."""

REPEATING = {"direct": "direct", "multidiffusion": "multidiffusion", "resmaster": "resmaster with captions"}
"""Methods whose repeated objects are counted, and what they are called."""

BLURRED = train_classifier.ClassifierRecipe(blurred=1.0)
"""How photos are blurred to fit the reading of blur: all of them, by factors up to the training's."""

SHARP = 0.5
"""log2 of the blur factor below which a photo is read as sharp."""


@dataclass(frozen=True)
class Amounts:
    """How much is measured."""

    photos: int = 512
    """Held-out photos, a multiple of 64."""
    scenes: int = 64
    """Scenes to generate."""
    repeats: int = 16
    """Prompts for the rates of repeated objects at 4x."""
    paired: int = 12
    """Scenes that are enlarged 4x by every method and held against their true drawing."""
    guidance: float = 5.0
    steps: int = 20


@dataclass(frozen=True)
class Measure:
    """One number and what it should reach."""

    name: str
    value: float
    aim: float | None = None
    """None: the number only stands beside others."""
    at_most: bool = False
    """Whether the aim is the greatest value that will do, instead of the least."""

    @property
    def met(self) -> bool | None:
        """Whether the aim is reached; None where there is none. What is not a number reaches nothing."""
        if self.aim is None:
            return None
        return self.value <= self.aim if self.at_most else self.value >= self.aim

    def __str__(self) -> str:
        text = f"{self.name:<66} {self.value:7.3f}"
        if self.aim is None:
            return text
        return f"{text}   aim {'<=' if self.at_most else '>='} {self.aim:7.3f}   {'met' if self.met else 'NOT MET'}"

    def recorded(self) -> dict[str, Any]:
        """As the card keeps it; `at_most` is there only where it is true."""
        kept: dict[str, Any] = {"value": round(self.value, 4), "aim": self.aim}
        return {**kept, "at_most": True} if self.at_most else kept


def measures_table(recorded: Mapping[str, Mapping[str, Any]]) -> str:
    """The card's measures as the Markdown table of docs/picturebook.md. Decibels have one decimal, all else has two."""
    lines = ["| measure | value | aim |", "| --- | --- | --- |"]
    for name, kept in recorded.items():
        value = f"{kept['value']:.1f}" if "dB" in name else f"{kept['value']:.2f}"
        bound = "≤ " if kept.get("at_most") else ""
        aim = "" if kept["aim"] is None else f"{bound}{kept['aim']:.3g}"
        lines.append(f"| {name} | {value} | {aim} |")
    return "\n".join(lines)


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


def _call(pipe: Painting, count: int, guidance: float) -> dict[str, Any]:
    """How a pipeline is told to guide `count` images. FLUX's guides by an empty negative prompt, knows no native size
    in pixels, and reads the tokens that its encoder was trained on."""
    if not isinstance(pipe, FluxPipeline):
        return {"guidance_scale": guidance}
    tokens: int = pipe.tokenizer_2.model_max_length
    size = pipe.vae.config.sample_size
    told = {"negative_prompt": [""] * count, "true_cfg_scale": guidance, "max_sequence_length": tokens}
    return {**told, "height": size, "width": size}


@torch.no_grad()
def paint(
    pipe: Painting,
    prompts: list[str],
    seed: int = 0,
    steps: int = 20,
    guidance: float = 5.0,
    batch: int = 16,
    image_prompts: list[Image.Image] | None = None,
) -> list[Image.Image]:
    """Native-size images of prompts; the seed of an image depends on its place in the list only. Image prompts, one per
    prompt, need a loaded IP-Adapter; then images are painted one by one, for the pipeline gives every image of a
    batch all image prompts."""
    images: list[Image.Image] = []
    batch = 1 if image_prompts else batch
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        more = _call(pipe, len(part), guidance)
        if image_prompts:
            more["ip_adapter_image"] = image_prompts[start]
        images += pipe(part, num_inference_steps=steps, generator=generators, **more).images
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
    pack: Path, pipe: Painting, captioner: GitForCausalLM, judges: Path, amounts: Amounts
) -> list[Measure]:
    """Generated scenes against real drawings of the same scenes: pairs found by the captioner, and FID by the
    classifier of the pack `judges`. `pipe` is `pack`'s."""
    count, steps, guidance = amounts.scenes, amounts.steps, amounts.guidance
    shown = square_scenes(count, SCENE_SEED)
    prompts = [captions.caption(scene) for scene in shown]
    wanted = [captions.pairs_in(scene) for scene in shown]
    truth_drawn, painted = drawn(shown), paint(pipe, prompts, 100, steps, guidance)
    real, real_precision = pair_score(captioner, truth_drawn, wanted)
    generated, precision = pair_score(captioner, painted, wanted)

    pipe.load_ip_adapter(
        str(pack), subfolder="ip_adapter", weight_name="ip-adapter.safetensors", image_encoder_folder=None
    )
    pipe.set_ip_adapter_scale(1.0)
    prompted = paint(pipe, [""] * count, 200, steps, guidance, image_prompts=truth_drawn)
    pipe.unload_ip_adapter()
    by_image, _ = pair_score(captioner, prompted, wanted)

    extractor = load_classifier(judges, str(pipe.device))
    sets = [drawn(square_scenes(4 * count, SCENE_SEED + 1_000_000)), truth_drawn, painted]
    reference, truth, made = (FeatureStatistics.of(extractor.extract(images).features) for images in sets)
    distance, floor = frechet_distance(made, reference), frechet_distance(truth, reference)
    return [
        Measure("image-prompt agreement, text dropped (generated / real)", _over(by_image, real), 0.5),
        Measure(f"FID of {count} generated scenes against {4 * count} real", distance),
        Measure(f"FID of {count} real scenes against {4 * count} real", floor),
        Measure("FID (generated / real)", _over(distance, floor), 1.25, at_most=True),
        Measure("pairs found in real drawings of the prompts", real, 0.85),
        Measure("pairs found in generated scenes", generated),
        Measure("text-to-image agreement (generated / real)", _over(generated, real), 0.97),
        Measure("found pairs that were prompted, real drawings", real_precision, 0.85),
        Measure("found pairs that were prompted, generated scenes", precision),
        Measure("found pairs that were prompted (generated / real)", _over(precision, real_precision), 0.97),
    ]


def _over(value: float, other: float) -> float:
    """A ratio; of nothing it is huge and not an error."""
    return value / max(other, 1e-6)


def repeat_measures(pack: Path, captioner: GitForCausalLM, count: int) -> list[Measure]:
    """The share of 4x images in which the captioner counts more objects of a kind than the prompt names. ResMaster
    has a caption for every view, as in a dataset."""
    from resmaster_stages.picturebook.render import render

    device = str(captioner.device)
    models = load_models(paired.config_of(pack, device))
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
    out = [Measure("repeated objects, real drawings at 4x (false alarms)", rate(large))]
    out.append(Measure("repeated objects, low-res images", rate(low_res)))
    for method, name in REPEATING.items():
        config = paired.dataset_of(pack, device, {"method": method, "scale": 4.0, "steps": 20})
        images = [paired.enlarged(models, config, i, p, n) for n, (i, p) in enumerate(zip(low_res, prompts))]
        out.append(Measure(f"repeated objects, {name} at 4x", rate(images)))
    return out


def paired_measures(pack: Path, captioner: GitForCausalLM, count: int) -> list[Measure]:
    """Scenes drawn at 128 px and enlarged 4x by every method of `paired.METHODS`, against the same scenes drawn at 512
    px; and these drawings through the VAE and back, which a latent method can hardly beat."""
    device = str(captioner.device)
    shown = paired.draw(square_scenes(count, SCENE_SEED + 3_000_000))
    models = load_models(paired.config_of(pack, device))

    def read_pairs(images: Sequence[Image.Image]) -> list[frozenset[tuple[str, str]]]:
        return [captions.pairs(text) for text in describe_all(captioner, as_pixels(list(images)))]

    by = paired.Judge(load_classifier(pack, device), read_pairs)
    found = {"drawing through the VAE": paired.judge([paired.round_trip(models, d) for d in shown.drawings], shown, by)}
    for name, settings in paired.METHODS.items():
        config = paired.dataset_of(pack, device, settings)
        images = [
            paired.enlarged(models, config, image, prompt, seed)
            for seed, (image, prompt) in enumerate(zip(shown.low_res, shown.prompts))
        ]
        found[name] = paired.judge(images, shown, by)
    return paired_aims(found, paired.judge(shown.drawings, shown, by).pairs)


def paired_aims(found: Mapping[str, paired.Judged], pairs_in_drawings: float) -> list[Measure]:
    """What every method reached, and ResMaster's aims: at most half of plain enlargement's distance and 1.5 times that
    of super-resolution, 97 % of the pairs that are read in the drawings, 28 dB of agreement."""
    out = [Measure("paired: pairs found in the true drawings", pairs_in_drawings)]
    for name, each in found.items():
        ours = name == "resmaster"
        out += [
            Measure(f"paired, {name}: perceptual distance", each.distance),
            Measure(f"paired, {name}: PSNR to the true drawing in dB", each.psnr),
            Measure(f"paired, {name}: agreement in dB", each.agreement, 28.0 if ours else None),
            Measure(f"paired, {name}: FID of squares", each.fid),
            Measure(
                f"paired, {name}: pairs found (made / drawn)",
                _over(each.pairs, pairs_in_drawings),
                0.97 if ours else None,
            ),
        ]
    for other, aim in (("lanczos", 0.5), ("super_resolution", 1.5)):
        ratio = _over(found["resmaster"].distance, found[other].distance)
        out.append(Measure(f"paired: perceptual distance (resmaster / {other})", ratio, aim, at_most=True))
    return out


def super_resolution_measures(pack: Path, count: int) -> list[Measure]:
    """PSNR of degraded held-out photos that the pack's network enlarges 4x, beside bicubic enlargement."""
    weights = pack / train_super_resolution.FOLDER / "model.safetensors"
    enlarger = load_enlarger(NetworkFile(model=str(weights)), torch.device("cpu"), torch.float32)
    seeds = range(data.HELD_OUT_SEED, data.HELD_OUT_SEED + count)
    pixels = torch.stack(
        [torch.from_numpy(train_super_resolution.draw_large(s).copy()).permute(2, 0, 1) for s in seeds]
    )
    ours, bicubic = train_super_resolution.psnr(enlarger, pixels)
    return [
        Measure("super-resolution of degraded photos, x4, PSNR in dB", ours, bicubic + 0.5),
        Measure("bicubic enlargement of the same, PSNR in dB", bicubic),
    ]


def _vae_measures(vae: AutoencoderKL, photos: PhotoSet, crisp: Tensor) -> list[Measure]:
    """PSNR of round trips of the photos that are `crisp` (bool [N])."""
    kinds = (("whole scenes", photos.whole), ("close-ups", ~photos.whole))
    return [
        Measure(f"VAE round trip, {name}, PSNR in dB", train_vae.psnr(vae, photos.pixels[crisp & chosen]), 33.0)
        for name, chosen in kinds
    ]


def _with_constant(classifier: ResNetForImageClassification, pixels: Tensor) -> Tensor:
    """Pooled features of float images [N, 3, h, w] in [-1, 1], and a column of ones: [N, D + 1], float64 on the CPU."""
    device = next(classifier.parameters()).device
    parts = (classifier.resnet(part.to(device)).pooler_output.flatten(1).cpu() for part in pixels.split(64))
    features = torch.cat(list(parts)).double()
    return torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], 1)


@torch.no_grad()
def sharpness_measures(vae: AutoencoderKL, classifier: ResNetForImageClassification, pixels: Tensor) -> list[Measure]:
    """Shares of sharp photos (uint8 [N, 3, h, w]) that the classifier reads as sharp: as they are, blurred 2x, and
    through the VAE and back.

    The head that read blur left with the training, and features of the pooled layer are linear in what it read: here it
    is fitted anew by least squares, from the first half of the photos, each as it is and blurred by 1x to 4x. The
    second half is judged. Sharp is a reading below `SHARP`.
    """
    device = next(vae.parameters()).device
    half, rng = len(pixels) // 2, Random(6)
    known, judged = to_float(pixels[:half]), to_float(pixels[half:])
    blurred, factors = train_classifier.blur_some(known.repeat(3, 1, 1, 1), rng, BLURRED)
    rows = _with_constant(classifier, torch.cat([known, blurred]))
    wanted = torch.cat([torch.zeros(half), factors]).double()
    ridge = 1e-3 * rows.square().mean() * torch.eye(rows.shape[1], dtype=torch.float64) * len(rows)
    head = torch.linalg.solve(rows.T @ rows + ridge, rows.T @ wanted)

    def share(images: Tensor) -> float:
        return float((_with_constant(classifier, images) @ head < SHARP).double().mean())

    trips = [vae.decode(vae.encode(part.to(device)).latent_dist.mode()).sample.cpu() for part in judged.split(32)]
    twice = degrade(judged, rng, share=1.0, factors=(2.0, 2.0))
    return [
        Measure("read as sharp, sharp photos", share(judged)),
        Measure("read as sharp, the same blurred 2x", share(twice)),
        Measure("read as sharp, VAE round trips of the same", share(torch.cat(trips).clamp(-1, 1))),
    ]


FLOW_AIMS = {
    "pairs found in generated scenes": (0.6, False),
    "FID of 96 generated scenes against 384 real": (32.7, True),
}
"""What a flow base must reach before it is shipped. The UNet reaches 0.92 and 25.3."""


def flow_measures(pack: Path, amounts: Amounts, device: str = "cpu", judges: Path = PACK) -> list[Measure]:
    """The measures of a flow base's generated scenes, judged by the captioner and the classifier of `judges`."""
    pipe = FluxPipeline.from_pretrained(pack, local_files_only=True).to(device, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    captioner = GitForCausalLM.from_pretrained(judges / "captioner", local_files_only=True).to(device).float().eval()
    found = scene_measures(pack, pipe, captioner, judges, amounts)
    aims = {m.name: FLOW_AIMS.get(m.name, (None, False)) for m in found}
    return [Measure(m.name, m.value, *aims[m.name]) for m in found]


def few_step_measures(lora: Path, amounts: Amounts, device: str = "cpu", pack: Path = PACK) -> list[Measure]:
    """The measures of scenes that a pack generates with a few-step LoRA, in trailing steps. 1 is no guidance."""
    pipe = StableDiffusionXLPipeline.from_pretrained(pack, local_files_only=True).to(device, torch.float32)
    own = FewStepConfig(id=str(lora.parent), weight_name=lora.name, kind="lightning", steps=amounts.steps)
    fuse_lora(pipe.unet, ModelConfig(few_step=own))
    spaced = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **spaced)
    pipe.set_progress_bar_config(disable=True)
    captioner = GitForCausalLM.from_pretrained(pack / "captioner", local_files_only=True).to(device).float().eval()
    return scene_measures(pack, pipe, captioner, pack, amounts)


def evaluate(
    pack: Path = PACK, amounts: Amounts | None = None, device: str = "cpu", parts: Sequence[str] = PARTS
) -> list[Measure]:
    """The measures of a pack on disk, those of `parts`, in float32. Of a flow base the generated scenes only."""
    amounts = amounts or Amounts()
    if json.loads((pack / "model_index.json").read_text())["_class_name"] == "FluxPipeline":
        return flow_measures(pack, amounts, device)
    pipe = StableDiffusionXLPipeline.from_pretrained(pack, local_files_only=True).to(device, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    captioner = GitForCausalLM.from_pretrained(pack / "captioner", local_files_only=True).to(device).float().eval()
    found, made = held_out(amounts.photos)
    crisp = torch.tensor([p.render_px == data.NATIVE_PX for p in made])
    out: list[Measure] = []
    if "vae" in parts:
        out += _vae_measures(pipe.vae, found, crisp)
    if "clip" in parts:
        right = train_clip.retrieval(pipe.text_encoder_2, pipe.image_encoder, found)
        out.append(Measure("CLIP retrieval, own caption first of 64", right, 0.70))
    if "captioner" in parts:
        out += captioner_measures(captioner, found)
    if "classifier" in parts:
        classifier = ResNetForImageClassification.from_pretrained(pack / "classifier", local_files_only=True)
        classifier = classifier.to(device).float().eval()
        right = train_classifier.accuracy(classifier, found)
        out.append(Measure("classifier, main subject of held-out photos", right, 0.85))
        out += sharpness_measures(pipe.vae, classifier, found.pixels[crisp])
    if "super_resolution" in parts:
        out += super_resolution_measures(pack, min(amounts.photos, 64))
    if "scenes" in parts:
        out += scene_measures(pack, pipe, captioner, pack, amounts)
    if "repeats" in parts:
        out += repeat_measures(pack, captioner, amounts.repeats)
    if "paired" in parts:
        out += paired_measures(pack, captioner, amounts.paired)
    return out


def main() -> None:
    """Print the measures, record them in the card, and print the table of docs/picturebook.md."""
    parser = argparse.ArgumentParser(
        prog="python -m resmaster_stages.picturebook.training.evaluate", description=__doc__
    )
    parser.add_argument("--pack", type=Path, default=PACK)
    parser.add_argument("--photos", type=int, default=512, help="held-out photos (a multiple of 64)")
    parser.add_argument("--scenes", type=int, default=64, help="scenes to generate")
    parser.add_argument("--repeats", type=int, default=16, help="prompts for the repeated-object rates at 4x")
    parser.add_argument("--paired", type=int, default=12, help="scenes to enlarge and hold against their true drawing")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=20, help="of generated scenes")
    parser.add_argument("--few-step", type=Path, help="measure scenes of this few-step LoRA, and write nothing")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    amounts = Amounts(args.photos, args.scenes, args.repeats, args.paired, args.guidance, args.steps)
    if args.few_step:
        print(*few_step_measures(args.few_step, amounts, args.device, args.pack), sep="\n")
        return
    measures = evaluate(args.pack, amounts, args.device)
    for measure in measures:
        print(measure)
    path = args.pack / "card.json"
    card: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    card["measures"] = {measure.name: measure.recorded() for measure in measures}
    card["measured_on"] = {
        "held_out_photos": args.photos,
        "generated_scenes": args.scenes,
        "repeat_prompts": args.repeats,
        "paired_scenes": args.paired,
        "guidance": args.guidance,
        "steps": args.steps,
    }
    path.write_text(json.dumps(card, indent=2) + "\n")
    print(f"\n{measures_table(card['measures'])}")


if __name__ == "__main__":
    main()
