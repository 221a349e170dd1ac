"""Milliseconds per row of SDXL's UNet, the unit that all methods cost: eager and compiled, by number format and by
batch.

A row is one native view of one guidance branch. What is most worth knowing is measured first; what the step's time
does not allow is listed as skipped.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import models
from benchmarks.gpu.record import Run, read, trace
from benchmarks.gpu.timing import convolutions, first_seconds, timed
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.acceleration import compile_blocks, quantise_fp8, require_fp8
from resmaster_stages.models.faults import release_memory

WHOLE_MODE = "max-autotune-no-cudagraphs"
"""How the whole UNet is compiled on a GPU; on a CPU, where tuning takes minutes and tells nothing, plainly."""

KINDS: tuple[tuple[str, str], ...] = (
    ("copies", r"memcpy|memset|copy|nchwtonhwc|nhwctonchw|catarray|aten::(cat|clone|contiguous|_to_copy|fill_)"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("convolution", r"conv|fprop|implicit|wgrad|dgrad|im2col"),
    ("matrix product", r"gemm|nvjet|cublas|cutlass|scaled_mm|matmul|aten::(addmm|mm|bmm|linear)|splitk"),
    ("norms and elementwise", r"norm|elementwise|vectorized|reduce|softmax|silu|gelu|triton|fused|upsample|aten::"),
)
"""Kind of operation and the names of its kernels (CUDA) or operators (CPU); the first that matches counts, others are
`other`."""

MARKS = ("##", "Torch-Compiled Region", "ProfilerStep")
"""How names of a profile begin that are no kernels."""


@dataclass(frozen=True)
class Variant:
    """One way of running the UNet."""

    name: str
    dtype: str = "float16"
    compiled: str = "no"
    """`no`, `blocks` or `whole`."""
    channels_last: bool = True
    fast: bool = False
    """Convolution kernels are raced (cudnn.benchmark) rather than deterministic."""
    fp8: bool = False

    def labels(self, rows: int) -> dict[str, Any]:
        """For the JSON."""
        return {"variant": self.name, "dtype": self.dtype, "rows": rows}

    def built(self, base: Any) -> Any:
        """A UNet of its own, from the weights of `base`."""
        unet = copy.deepcopy(base).to(getattr(torch, self.dtype))
        unet.to(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        if self.fp8:
            require_fp8(unet.device, compiled=self.compiled != "no")
            quantise_fp8(unet)
        if self.compiled == "blocks":
            compile_blocks(unet)
        if self.compiled == "whole":
            unet.compile(mode=WHOLE_MODE if unet.device.type == "cuda" else None, dynamic=False)
        return unet


EAGER = Variant("eager")
BLOCKS = Variant("compiled blocks", compiled="blocks")
PLAN: tuple[tuple[Variant, tuple[int, ...]], ...] = (
    (EAGER, (26, 98, 14, 52)),
    (BLOCKS, (98, 26)),
    (Variant("eager, cudnn.benchmark", fast=True), (26,)),
    (Variant("eager, contiguous", channels_last=False), (26,)),
    (Variant("eager", dtype="bfloat16"), (26,)),
    (Variant("compiled blocks, fp8 linears", dtype="bfloat16", compiled="blocks", fp8=True), (98,)),
    (Variant("compiled blocks", dtype="bfloat16", compiled="blocks"), (98,)),
    (Variant("compiled blocks, cudnn.benchmark", compiled="blocks", fast=True), (98,)),
    (BLOCKS, (14, 52)),
    (Variant("compiled whole, max-autotune", compiled="whole"), (98,)),
)
NEEDED = {"no": 1.0, "blocks": 25.0, "whole": 100.0}
"""Seconds that a measurement is not begun without, besides those of its rows: compilation is not interrupted."""
ROW_SECONDS = 0.12
"""Seconds that a row takes at most in all of a measurement's calls."""


def kind_of(kernel: str) -> str:
    """The kind of operation that a kernel does, by its name."""
    return next((kind for kind, names in KINDS if re.search(names, kernel.lower())), "other")


def where_time_goes(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Shares of the device's time by kind of operation, and the costliest kernels by name."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        call()
        if cuda:
            torch.cuda.synchronize()
    events = found.key_averages()
    if cuda:  # kernels alone: operators and marks of compiled regions stand for kernels that are listed themselves
        kernels = [each for each in events if each.device_type == DeviceType.CUDA and not each.key.startswith(MARKS)]
        spent = {each.key: each.self_device_time_total for each in kernels}
    else:
        spent = {each.key: each.self_cpu_time_total for each in events}
    total = sum(spent.values())
    if not total:
        raise RuntimeError("the profiler saw no kernels")
    kinds: dict[str, float] = {}
    for name, time in spent.items():
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + time
    costliest = sorted(spent, key=lambda name: -spent[name])[:15]
    return {
        "milliseconds": total / 1000,
        "shares": {kind: time / total for kind, time in sorted(kinds.items(), key=lambda item: -item[1])},
        "kernels": {f"{kind_of(name)}: {name[:90]}": spent[name] / total for name in costliest},
    }


@dataclass(frozen=True)
class Bench:
    """What every measurement of this step needs."""

    run: Run
    base: Any
    operations: int
    """Per row."""

    @property
    def device(self) -> torch.device:
        return torch.device(self.run.device)

    def call(self, unet: Any, variant: Variant, rows: int) -> Callable[[], Any]:
        """A forward pass of `rows` random views, as the engine makes it."""
        arguments = models.inputs(unet, rows, self.device, getattr(torch, variant.dtype))

        def forward() -> Any:
            with torch.inference_mode(), convolutions(variant.fast):
                return unet(**arguments, return_dict=False)[0]

        return forward

    def measured(self, unet: Any, variant: Variant, rows: int) -> dict[str, Any]:
        """Milliseconds per row, and the rate that this is."""
        call = self.call(unet, variant, rows)
        first = first_seconds(call, self.device)
        timing = timed(call, self.device, seconds=2.0, most=10)
        rate = self.operations * rows / timing.median / 1e12
        ceiling = matmul_ceiling(self.run, variant.dtype)
        return {
            "ms_per_row": 1000 * timing.median / rows,
            "tflops": rate,
            "share_of_matmul_ceiling": rate / ceiling if ceiling else None,
            "first_call_seconds": first,
            **timing.facts(),
        }


def matmul_ceiling(run: Run, dtype: str) -> float | None:
    """TFLOP/s of the matrix product that the step `ceilings` measured in this run; None if it did not."""
    found = read(run.record.path)["steps"].get("ceilings", {}).get("found", {}).get("ceilings", [])
    rates = [each.get("tflops") for each in found if each["what"] == "matrix product" and each["dtype"] == dtype]
    return rates[0] if rates else None


def _toy_plan() -> tuple[tuple[Variant, tuple[int, ...]], ...]:
    """Every variant once, on two rows, in a number format that any CPU computes in."""
    return tuple((variant, (2,)) for variant, _ in PLAN)


def _built(bench: Bench, variant: Variant, sizes: tuple[int, ...]) -> Any | None:
    """The variant's UNet; None where it cannot be had, which then stands in the record for each size."""
    try:
        return variant.built(bench.base)
    except ConfigError as error:
        why = {"left_out": str(error)}
    except Exception as error:
        why = {"error": trace(error)}
    for rows in sizes:
        bench.run.record.add("rows", {**variant.labels(rows), **why})
    return None


def _of_variant(bench: Bench, variant: Variant, sizes: tuple[int, ...], profiled: bool) -> None:
    """A variant at each of `sizes`; and where its time goes, at the first of them."""
    run = bench.run

    def skipped(rows: int) -> bool:
        return run.skip("rows", NEEDED[variant.compiled] + ROW_SECONDS * rows, **variant.labels(rows))

    due = [rows for rows in sizes if not skipped(rows)]
    unet = _built(bench, variant, tuple(due)) if due else None
    if unet is None:
        return
    for rows in due:
        if rows == due[0] or not skipped(rows):
            run.record.attempt("rows", lambda rows=rows: bench.measured(unet, variant, rows), **variant.labels(rows))
    if profiled and not run.skip("profiles", 8.0, **variant.labels(due[0])):
        call = bench.call(unet, variant, due[0])
        run.record.attempt("profiles", lambda: where_time_goes(call, bench.device), **variant.labels(due[0]))


def measure(run: Run) -> None:
    """All variants, in order of worth."""
    operations = models.operations_per_row(run.rehearse)
    run.record.put("tflop_per_row", operations / 1e12)
    run.record.put("image_prompt_tokens", models.TOKENS)
    bench = Bench(run, models.unet(torch.device(run.device), torch.float16, run.rehearse), operations)
    for number, (variant, sizes) in enumerate(_toy_plan() if run.rehearse else PLAN):
        _of_variant(bench, variant, sizes, profiled=number < 2)
        torch.compiler.reset()
        release_memory()
