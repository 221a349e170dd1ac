"""Whole images by the engine, on an SDXL of full size with random weights: seconds of each part, memory, rows.

Seconds and memory are real; the image is noise. What was measured over few steps says so (`steps_measured`), and what
is reckoned from it stands apart from what was measured.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from PIL import Image

from benchmarks.gpu import models as shapes
from benchmarks.gpu.record import Run
from benchmarks.methods import peak_memory, settle
from resmaster_stages.config.method import Method, methods
from resmaster_stages.diffusion import autoencoder, image_prompts
from resmaster_stages.diffusion.cost import counting
from resmaster_stages.diffusion.loop import batch_size
from resmaster_stages.diffusion.memory import weights_bytes
from resmaster_stages.diffusion.views import view_grid
from resmaster_stages.errors import ConfigError, SampleError
from resmaster_stages.methods import render
from resmaster_stages.methods.settings import Diffusion
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.acceleration import compile_blocks, quantise_fp8, require_fp8
from resmaster_stages.models.faults import release_memory
from resmaster_stages.models.occupancy import occupy
from resmaster_stages.models.parts import Models
from resmaster_stages.storage.images import encode_image

PROMPT = "a red house on a green meadow"
PARTS: tuple[tuple[str, Any, str], ...] = (
    ("denoise", render, "denoise"),
    ("encode", autoencoder, "encode"),
    ("decode", autoencoder, "decode"),
    ("image_prompts", image_prompts, "embed_crops"),
)
"""Part of an image, and where the engine looks its function up."""
STEPS, SHORT_STEPS = 50, 3
CAPTIONER_BYTES = 8 * 2**30
"""Weights of a captioner of four billion parameters in 16 bits."""


@contextmanager
def timed_parts(device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds of each part of what the block draws; the device is waited for at the borders of parts."""
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            settle(device)
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                settle(device)
                spent[name] += time.perf_counter() - start

        return wrapped

    with ExitStack() as stack:
        for name, place, attribute in PARTS:
            stack.enter_context(mock.patch.object(place, attribute, timed(name, getattr(place, attribute))))
        yield spent


@dataclass(frozen=True)
class Canvas:
    """A low-res image and the models that enlarge it."""

    models: Models
    image: Image.Image

    @property
    def device(self) -> torch.device:
        return self.models.device

    def draw(self, config: Diffusion) -> dict[str, Any]:
        """One image: seconds of each part, peak memory, rows. The image may be no image, for weights are
        random."""
        fault = None
        with counting() as cost, peak_memory(self.device) as peak, timed_parts(self.device) as parts:
            start = time.perf_counter()
            try:
                upscale_image(self.models, self.image, PROMPT, config=config)
            except SampleError as error:
                fault = str(error)
            settle(self.device)
            seconds = time.perf_counter() - start
        return {
            "pixels": round(self.image.width * config.scale),
            "steps_measured": config.steps,
            "seconds": seconds,
            "parts": dict(parts),
            "calls": cost.calls,
            "rows": cost.rows,
            "native_rows": cost.native_rows,
            "peak_bytes": peak.found,
            "no_image": fault,
        }


def estimated_bytes(canvas: Canvas, config: Diffusion) -> int:
    """What the engine expects ResMaster to need at `config.scale`, both guidance branches in one call."""
    models, side = canvas.models, round(canvas.image.width * config.scale)
    grid = view_grid(models.geometry, side, side, config.view_stride)
    views = batch_size(len(grid), config.view_batch or len(grid))
    return weights_bytes(models) + 2 * views * models.base.row_bytes(*grid.window_size)


def saving(side: int) -> dict[str, Any]:
    """Seconds of encoding files of an image of `side` px, on one core: soft shapes under a little noise, as
    photographs are."""
    soft = Image.effect_noise((64, 64), 80).resize((side, side), Image.Resampling.BICUBIC)
    image = Image.blend(soft, Image.effect_noise((side, side), 16), 0.3).convert("RGB")
    found: dict[str, Any] = {"pixels": side}
    for image_format in ("webp", "png"):
        start = time.perf_counter()
        size = len(encode_image(image, image_format))
        found |= {f"{image_format}_seconds": time.perf_counter() - start, f"{image_format}_bytes": size}
    return found


def reckoned(entry: dict[str, Any], steps: int) -> dict[str, Any]:
    """`entry` with what `steps` steps would take, if each took what the measured ones took on average."""
    if entry["steps_measured"] == steps:
        return entry
    denoising = entry["parts"]["denoise"]
    whole = entry["seconds"] - denoising + denoising * steps / entry["steps_measured"]
    return {**entry, "reckoned": {"steps": steps, "seconds": whole}}


def configured(method: str, scale: float, steps: int | None = None, **values: Any) -> Diffusion:
    """A method's configuration for a model that has learnt native sizes alone."""
    own = {} if steps is None else {"steps": steps}
    config = Method.model_validate({"method": method, "scale": scale, **own, **values})
    assert isinstance(config, Diffusion)
    return config


def compiled(models: Models, fp8: bool = False) -> Models:
    """`models` with a UNet of its own whose blocks are compiled, convolutions raced (`exactness: fast`)."""
    unet = copy.deepcopy(models.base.denoiser)
    if fp8:
        require_fp8(models.device, compiled=True)
        quantise_fp8(unet)
    compile_blocks(unet)
    return replace(models, base=replace(models.base, denoiser=unet), same_bytes=False)


def _warmed(canvas: Canvas, config: Diffusion, steps: int) -> dict[str, Any]:
    """An image of `config` after one of few steps, which chose kernels, took memory and compiled."""
    start = time.perf_counter()
    canvas.draw(config.model_copy(update={"steps": min(steps, config.steps)}))
    first = time.perf_counter() - start
    return {"warm_up_seconds": first, **canvas.draw(config), "estimated_bytes": estimated_bytes(canvas, config)}


def largest(run: Run, canvas: Canvas, scale: float) -> None:
    """ResMaster at 4096 px: the exact path eager for a few steps, then compiled to the end, and the default path."""
    short, whole = (2, 3) if run.rehearse else (SHORT_STEPS, STEPS)
    attempt, views = run.record.attempt, {"view_batch": 49}
    exact = configured("resmaster", scale, whole, preset="exact", **views)
    attempt(
        "images",
        lambda: reckoned(_warmed(canvas, exact.model_copy(update={"steps": short}), 1), whole),
        what="exact, eager",
    )
    fast = Canvas(compiled(canvas.models), canvas.image)
    if not run.skip("images", 115.0, what="exact, compiled blocks"):
        attempt("images", lambda: _warmed(fast, exact, 1), what="exact, compiled blocks")
    if not run.skip("images", 50.0, what="default"):
        default = configured("resmaster", scale, 3 if run.rehearse else None)
        attempt("images", lambda: _warmed(fast, default, 8), what="default")  # eight steps have all shapes


def eight_bits(canvas: Canvas, config: Diffusion) -> dict[str, Any]:
    """`config`'s image with the wide linear layers in 8 bits; where they cannot run, why."""
    try:
        models = compiled(canvas.models, fp8=True)
    except ConfigError as error:
        return {"left_out": str(error)}
    return _warmed(Canvas(models, canvas.image), config, 1)


def by_method(run: Run, canvas: Canvas, scale: float) -> None:
    """Every method that uses the diffusion model, at 2048 px, eager, over few steps."""
    short, whole = (2, 3) if run.rehearse else (SHORT_STEPS, STEPS)
    for method in (name for name, each in methods().items() if each.base_model):
        if not run.skip("methods", 8.0, what=method):
            config = configured(method, scale, short)
            run.record.attempt("methods", lambda config=config: reckoned(canvas.draw(config), whole), what=method)
            release_memory()


def turns(models: Models, captioner_bytes: int) -> dict[str, Any]:
    """Seconds of the captioner's turn between two passes, which computes nothing here, and the peak over it."""
    device, captioner = models.device, torch.nn.Module()
    captioner.register_buffer("weights", torch.empty(captioner_bytes, dtype=torch.uint8))
    occupy(device, *models.parts)
    seconds = {}
    with peak_memory(device) as peak:
        for name, modules in (("captioner_comes", (captioner,)), ("base_model_comes", models.parts)):
            settle(device)
            start = time.perf_counter()
            occupy(device, *modules)
            settle(device)
            seconds[f"{name}_seconds"] = time.perf_counter() - start
    sizes = {"base_model_bytes": weights_bytes(models), "captioner_bytes": captioner_bytes}
    return {**seconds, **sizes, "peak_bytes": peak.found}


def measure(run: Run) -> None:
    """The largest image first, then every method, then what stands beside them."""
    device = torch.device(run.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    models = shapes.whole(device, dtype, run.rehearse)
    run.record.put("dtype", str(dtype).removeprefix("torch."))
    run.record.put("image_encoder", shapes.TOY_ENCODER if run.rehearse else shapes.ENCODER)
    native = models.geometry.native_px
    image = Image.effect_noise((8, 8), 80).convert("RGB").resize((native, native), Image.Resampling.BICUBIC)
    canvas = Canvas(models, image)
    scales = (1.5, 2.0) if run.rehearse else (4.0, 2.0)
    largest(run, canvas, scales[0])
    release_memory()
    by_method(run, canvas, scales[1])
    side = round(native * scales[0])
    if not run.skip("saving", 25.0, what="files"):
        run.record.attempt("saving", lambda: saving(side), what="files of an image")
    if not run.skip("turns", 30.0, what="captioner, then base model"):
        size = 2**20 if run.rehearse else CAPTIONER_BYTES
        run.record.attempt("turns", lambda: turns(models, size), what="captioner, then base model")
    exact = configured("resmaster", scales[0], 3 if run.rehearse else STEPS, view_batch=49)
    if not run.skip("images", 105.0, what="exact, compiled blocks, fp8 linears"):
        run.record.attempt("images", lambda: eight_bits(canvas, exact), what="exact, compiled blocks, fp8 linears")
    if not run.skip("images", 150.0, what="exact, eager, to the end"):
        run.record.attempt("images", lambda: canvas.draw(exact), what="exact, eager, to the end")
