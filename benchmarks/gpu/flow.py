"""Flow-matching transformers of full size with random weights: milliseconds and memory per view, and whole images.

Their cost is counted in rows as that of a UNet: FLUX.1-dev and Z-Image-Turbo take one guidance branch, so a row is a
view. What is most worth knowing of each model is measured first; what the step's time does not allow is listed as
skipped. Images are noise, as are all of random weights.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from benchmarks.gpu import flow_models as shapes
from benchmarks.gpu.image import Canvas, configured, reckoned
from benchmarks.gpu.record import Run, trace
from benchmarks.gpu.rows import NEEDED, matmul_ceiling
from benchmarks.gpu.timing import first_seconds, timed
from benchmarks.methods import peak_memory, settle
from resmaster_stages.diffusion.memory import weights_bytes
from resmaster_stages.methods.settings import Diffusion
from resmaster_stages.models.acceleration import compile_blocks
from resmaster_stages.models.faults import release_memory
from resmaster_stages.models.parts import Models

VIEWS = (4, 1, 8, 2)
"""Views per call, in order of worth."""
VIEW_SECONDS = 1.5
"""Seconds that a view takes at most in all of a measurement's calls."""
BUILDING_SECONDS, IMAGE_SECONDS = 15.0, 30.0
"""Seconds that a model, and an image, are not begun without."""
SHORT_STEPS = 3
VIEW_BATCH = 4


@dataclass(frozen=True)
class Bench:
    """A model under test."""

    run: Run
    shape: shapes.Shape

    @property
    def operations(self) -> int:
        """Of one view."""
        return shapes.operations_per_view(self.shape, self.run.rehearse)

    def made(self) -> Models:
        """The model on the device."""
        return shapes.whole(self.shape, torch.device(self.run.device), self.run.rehearse)

    def size(self, models: Models, seconds: float) -> dict[str, Any]:
        """How large the model is, and how long it took to make."""
        return {
            "parameters": sum(p.numel() for p in models.parts[0].parameters()),
            "bytes": weights_bytes(models),
            "tflop_per_view": self.operations / 1e12,
            "seconds": seconds,
        }

    def measured(self, models: Models, views: int) -> dict[str, Any]:
        """Milliseconds per view, the rate that this is, and the memory of a view."""
        device, native = models.device, models.geometry.native
        call = shapes.forward(models, views)
        first = first_seconds(call, device)
        timing = timed(call, device, seconds=2.0, most=10)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
        with peak_memory(device) as peak:
            call()
            settle(device)
        rate = self.operations * views / timing.median / 1e12
        ceiling = matmul_ceiling(self.run, "bfloat16")
        return {
            "ms_per_view": 1000 * timing.median / views,
            "tflops": rate,
            "share_of_matmul_ceiling": rate / ceiling if ceiling else None,
            "first_call_seconds": first,
            "peak_bytes": peak.found,
            "row_bytes": None if before is None or peak.found is None else (peak.found - before) / views,
            "row_bytes_expected": models.base.row_bytes(native, native),
            **timing.facts(),
        }

    def by_views(self, models: Models, variant: str, starting: float) -> None:
        """Every number of views per call. starting: seconds that a first call may take."""
        for views in VIEWS:
            labels = {"what": self.shape.name, "variant": variant, "views": views}
            if not self.run.skip("views", starting + VIEW_SECONDS * views, **labels):
                self.run.record.attempt("views", lambda views=views: self.measured(models, views), **labels)
                release_memory()

    def image(self, models: Models) -> dict[str, Any]:
        """One image of twice the native size, over few steps after one of a single step; and what all would take."""
        native, steps = models.geometry.native_px, models.base.sampling.steps
        low_res = Image.effect_noise((8, 8), 80).convert("RGB").resize((native, native), Image.Resampling.BICUBIC)
        canvas, start = Canvas(models, low_res), time.perf_counter()
        canvas.draw(settings(models, 1))
        warm_up = time.perf_counter() - start
        drawn = canvas.draw(settings(models, min(steps, SHORT_STEPS)))
        return reckoned({"warm_up_seconds": warm_up, **drawn}, steps)

    def eager(self) -> None:
        """The model as it is: its size, views, an image."""
        start = time.perf_counter()
        models = self.made()
        settle(models.device)
        self.run.record.add("models", {"what": self.shape.name, **self.size(models, time.perf_counter() - start)})
        self.by_views(models, "eager", NEEDED["no"])
        if not self.run.skip("images", IMAGE_SECONDS, what=self.shape.name):
            self.run.record.attempt("images", lambda: self.image(models), what=self.shape.name)

    def compiled(self) -> None:
        """The model with compiled blocks: views."""
        models = self.made()
        compile_blocks(models.base.denoiser)
        self.by_views(models, "compiled blocks", NEEDED["blocks"])


def settings(models: Models, steps: int) -> Diffusion:
    """ResMaster's exact path at twice the native size, without image prompts."""
    return configured(
        "resmaster",
        2.0,
        steps,
        preset="exact",
        guidance_scale=models.base.sampling.guidance_scale,
        image_prompt={"enabled": False},
        view_batch=VIEW_BATCH,
    )


def measure(run: Run) -> None:
    """Both models eager, then both compiled. A model that cannot be made costs itself alone."""
    run.record.put("dtype", str(shapes.DTYPE).removeprefix("torch."))
    run.record.put("text_tokens", {shape.name: shape.states[0] for shape in shapes.SHAPES})
    for part in (Bench.eager, Bench.compiled):
        for shape in shapes.SHAPES:
            labels = {"what": shape.name, "variant": part.__name__}
            if run.skip("models", BUILDING_SECONDS, **labels):
                continue
            try:
                part(Bench(run, shape))
            except Exception as error:
                run.record.add("models", {**labels, "error": trace(error)})
            torch.compiler.reset()
            release_memory()
