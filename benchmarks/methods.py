"""What each upscaling method costs, side by side, in one run: seconds, UNet work, memory.

    python benchmarks/methods.py                                      # picturebook on the CPU, 2x and 4x
    python benchmarks/methods.py --model sdxl --device cuda --flops   # an SDXL with random weights, 2048 and 4096 px

`sdxl` needs no download: the UNet and the VAE are SDXL's in shape, with random weights, so seconds and memory are real
and images are noise; its text encoders are one layer each. `--shrink` divides its channels.

Columns: seconds of one image (of a warm process, decoding included); on CPUs, seconds of processor time too, which
other programs on the machine disturb less; the UNet's share of them; UNet calls; rows through the UNet in native views;
peak memory (CUDA: allocated; Linux: resident, of the whole process with its models). With `--flops` every image is
made once more to count its operations, and the rate stands beside that of a plain matrix product on the same device.
With `--parts` a second table says where the rest goes: VAE, text and image encoders, and what is none of these.

A method may be written with a preset, as `resmaster:exact`.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from resmaster_stages.config.method import Method, methods, with_method
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.diffusion.cost import UnetCost, counting
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases.base import network_of
from resmaster_stages.models.identity import pack_folder
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from resmaster_stages.models.places import resolve_device, resolve_dtype

STEPS = 20
"""Where neither the command line nor a preset says how many."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def random_vae(shrink: int, latent_channels: int = 4, **values: Any) -> AutoencoderKL:
    """Stable Diffusion's VAE (also SDXL's) with random weights, its channels divided by `shrink`."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(channels // shrink for channels in (128, 256, 512, 512)),
        layers_per_block=2,
        latent_channels=latent_channels,
        norm_num_groups=max(1, 32 // shrink),
        **values,
    )


def text_config(tokenizer: Any, hidden: int) -> CLIPTextConfig:
    """A text encoder of one layer for `tokenizer`."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=hidden,
        projection_dim=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
    )


def sdxl_shape(shrink: int = 1) -> dict[str, Any]:
    """The UNet's configuration of SDXL, its channels and its native size divided by `shrink`."""
    return {
        "sample_size": 128 // shrink,
        "block_out_channels": tuple(channels // shrink for channels in (320, 640, 1280)),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10 if shrink == 1 else 1),
        "attention_head_dim": [5, 10, 20] if shrink == 1 else [1, 2, 4],
        "cross_attention_dim": 2048 // shrink,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 1280 // shrink,
        "norm_num_groups": max(1, 32 // shrink),
    }


def sdxl(device: torch.device, dtype: torch.dtype, shrink: int = 1) -> Models:
    """An SDXL with random weights, its channels divided by `shrink`."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**sdxl_shape(shrink))
        vae = random_vae(shrink, scaling_factor=0.13025, force_upcast=False)
    tokenizer = AutoTokenizer.from_pretrained(pack_folder() / "tokenizer")
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(tokenizer, 768 // shrink)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, 1280 // shrink)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )
    pipe.to(device, dtype)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        module.eval().requires_grad_(False)
    if device.type == "cuda":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    return Models.from_pipeline(pipe)


@dataclass
class Peak:
    """Greatest memory of a block, in bytes; None where the platform does not tell."""

    found: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """The block's peak: allocated on a CUDA device, resident elsewhere (Linux only)."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text("5")  # resets the high-water mark of this process
    yield peak
    if device.type == "cuda":
        peak.found = torch.cuda.max_memory_allocated(device)
    elif CLEAR.exists():
        found = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        peak.found = int(found[0].split()[1]) * 1024 if found else None


def settle(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        settle(device)
        start = time.perf_counter()
        a @ a
        settle(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


class Clock:
    """Seconds of parts of a model, by name: of the processor on CPUs, of the device between two events on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def watching(self, parts: Mapping[str, Sequence[Any]]) -> Iterator[None]:
        """Within the block the calls of `parts` (name -> modules) are timed."""
        begun: list[Any] = []
        hooks = []
        for name, modules in parts.items():
            for module in modules:
                hooks.append(module.register_forward_pre_hook(lambda *_: begun.append(self._now())))
                hooks.append(
                    module.register_forward_hook(
                        lambda *_, name=name: self._spans.append((name, begun.pop(), self._now()))
                    )
                )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def seconds(self) -> dict[str, float]:
        """Name -> seconds. Waits for the device."""
        settle(self.device)
        found: dict[str, float] = {}
        for name, start, end in self._spans:
            took = end - start if self.device.type != "cuda" else start.elapsed_time(end) / 1000
            found[name] = found.get(name, 0.0) + took
        return found


def parts_of(models: Models) -> dict[str, list[Any]]:
    """What is timed of a model."""
    return {
        "UNet": [network_of(models.base.denoiser)],
        "VAE encoder": [models.base.vae.encoder],
        "VAE decoder": [models.base.vae.decoder],
        "text": list(models.base.text_encoders),
        "image prompts": [models.base.image_encoder] if models.base.image_encoder is not None else [],
    }


@dataclass
class Row:
    """What one image of one method took."""

    method: str
    scale: float
    seconds: float
    processor_seconds: float | None
    cost: UnetCost
    peak: int | None
    operations: int | None
    parts: dict[str, float]
    """Seconds by part: of the processor on CPUs, of the device on CUDA."""

    @property
    def whole(self) -> float:
        """What `parts` are shares of."""
        return self.seconds if self.processor_seconds is None else self.processor_seconds

    def share(self, part: str) -> float:
        """Of the whole image."""
        return self.parts.get(part, 0.0) / self.whole


def measure(
    models: Models, image: Image.Image, method: str, scale: float, steps: int | None, count_operations: bool
) -> Row:
    """One image, timed; and once more, counted, if wanted. Without `steps` it takes its preset's, or 20."""
    name, _, preset = method.partition(":")
    preset = preset or "default"
    values: dict[str, Any] = {"scale": scale, "micro_conditioning": "native"}
    if steps is not None or "steps" not in methods()[name].presets.get(preset, {}):
        values["steps"] = steps or STEPS
    values = {**with_method(values, name), "preset": preset}
    if name == "resmaster" and models.base.image_adapter() is None:
        values["image_prompt"] = {"enabled": False}
    config = Method.model_validate(values)

    def draw() -> None:
        upscale_image(models, image, "a red house on a green meadow", config=config)
        settle(models.device)

    clock = Clock(models.device)
    with counting() as cost, peak_memory(models.device) as peak, clock.watching(parts_of(models)):
        start, began = time.perf_counter(), time.process_time()
        draw()
        seconds, worked = time.perf_counter() - start, time.process_time() - began
    operations = None
    if count_operations:
        with FlopCounterMode(display=False) as counter:
            draw()
        operations = counter.get_total_flops()
    processor = worked if models.device.type == "cpu" else None
    return Row(method, scale, seconds, processor, cost, peak.found, operations, clock.seconds())


COLUMNS: dict[str, Callable[[Row], str]] = {
    "seconds": lambda row: f"{row.seconds:.1f}",
    "CPU s": lambda row: "" if row.processor_seconds is None else f"{row.processor_seconds:.1f}",
    "UNet share": lambda row: f"{row.share('UNet'):.0%}",
    "UNet calls": lambda row: str(row.cost.calls),
    "native rows": lambda row: f"{row.cost.native_rows:.0f}",
    "peak GB": lambda row: "" if row.peak is None else f"{row.peak / 1e9:.2f}",
    "Tflop/s": lambda row: "" if row.operations is None else f"{row.operations / row.seconds / 1e12:.3f}",
}


def table(rows: list[Row]) -> str:
    """Markdown: a line per method, the columns of every scale side by side."""
    scales = list(dict.fromkeys(row.scale for row in rows))
    columns = [name for name, show in COLUMNS.items() if any(show(row) for row in rows)]
    lines = [
        "| method | " + " | ".join(f"{name}, {scale:g}x" for scale in scales for name in columns) + " |",
        "| --- |" + " ---: |" * (len(scales) * len(columns)),
    ]
    for method in dict.fromkeys(row.method for row in rows):
        own = {row.scale: row for row in rows if row.method == method}
        cells = [COLUMNS[name](own[scale]) for scale in scales for name in columns]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parts_table(rows: list[Row]) -> str:
    """Markdown: a line per method and scale, each part's share of the image."""
    names = list(dict.fromkeys(name for row in rows for name in row.parts))
    lines = ["| method | scale | " + " | ".join([*names, "rest"]) + " |", "| --- |" + " ---: |" * (len(names) + 2)]
    for row in rows:
        shares = [row.share(name) for name in names]
        cells = [f"{share:.1%}" for share in (*shares, 1 - sum(shares))]
        lines.append(f"| {row.method} | {row.scale:g}x | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def device_name(device: torch.device) -> str:
    """The card's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = Path("/proc/cpuinfo")
    found = (
        [line.split(":")[1].strip() for line in names.read_text().splitlines() if line.startswith("model name")]
        if names.exists()
        else []
    )
    return f"{found[0] if found else platform.processor()}, {torch.get_num_threads()} threads"


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=("picturebook", "sdxl"), default="picturebook")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--methods", default=",".join(methods()))
    parser.add_argument("--scales", default="2,4", help="target size over the model's native size")
    parser.add_argument("--steps", type=int, help="default: those that a method's preset names, or 20")
    parser.add_argument(
        "--shrink", type=int, default=1, help="of --model sdxl: divide its channels and its native size"
    )
    parser.add_argument("--flops", action="store_true", help="count operations too")
    parser.add_argument("--parts", action="store_true", help="say where the time goes")
    return parser


def main(words: list[str] | None = None) -> None:
    args = options().parse_args(words)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    if args.model == "picturebook":
        models = load_models(ModelConfig(device=args.device, dtype=args.dtype))
    else:
        models = sdxl(device, dtype, args.shrink)
    native = models.geometry.native_px
    image = Image.effect_noise((8, 8), 80).convert("RGB").resize((native, native), Image.Resampling.BICUBIC)
    measure(models, image, "direct", 1.0, 2, False)  # warm: kernels are chosen and memory is taken here

    rows = []
    for scale in (float(each) for each in args.scales.split(",")):
        for method in args.methods.split(","):
            rows.append(measure(models, image, method, scale, args.steps, args.flops))
            print(f"{method} at {scale:g}x: {rows[-1].seconds:.1f} s", flush=True)
    name = args.model if args.model == "picturebook" else f"SDXL's shape / {args.shrink}, random weights"
    steps = f"{args.steps} steps" if args.steps else f"{STEPS} steps, or a preset's own"
    print(f"\n{name}, native {native} px, {steps}, {str(dtype).removeprefix('torch.')}")
    print(f"{device_name(device)}; torch {torch.__version__}")
    if args.flops:
        print(f"a matrix product on it: {product_rate(device, dtype) / 1e12:.3f} Tflop/s")
    print("\n" + table(rows))
    if args.parts:
        print("\n" + parts_table(rows))


if __name__ == "__main__":
    main()
