"""What this very card can do at best, in this run: matrix products, convolutions, attention, copies. Random data
throughout."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.gpu.record import Run
from benchmarks.gpu.timing import timed

FP8 = torch.float8_e4m3fn


def _rate(operations: float, call: Any, device: torch.device) -> dict[str, Any]:
    timing = timed(call, device)
    return {"tflops": operations / timing.median / 1e12, **timing.facts()}


def product(device: torch.device, dtype: torch.dtype, side: int) -> dict[str, Any]:
    """A square matrix product of `side`."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return _rate(2 * side**3, lambda: a @ b, device)


def product_fp8(device: torch.device, side: int, per_row: bool) -> dict[str, Any]:
    """A square product of 8-bit floats with bfloat16 results; `per_row`: a scale per row and column, else one per
    matrix."""
    a = torch.randn(side, side, device=device).to(FP8)
    b = torch.randn(side, side, device=device).to(FP8).t()  # the kernel wants columns
    shapes = ((side, 1), (1, side)) if per_row else ((), ())
    scales = [torch.ones(shape, device=device) for shape in shapes]

    def call() -> torch.Tensor:
        return torch._scaled_mm(
            a, b, scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16, use_fast_accum=device.type == "cuda"
        )

    return _rate(2 * side**3, call, device)


def convolution(device: torch.device, dtype: torch.dtype, rows: int, edge: int) -> dict[str, Any]:
    """SDXL's widest common convolution, 3x3 over 640 channels, in channels-last order."""
    channels = 640
    x = torch.randn(rows, channels, edge, edge, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    return _rate(2 * rows * edge**2 * channels**2 * 9, lambda: F.conv2d(x, weight, padding=1), device)


def attention(device: torch.device, dtype: torch.dtype, rows: int, tokens: int) -> dict[str, Any]:
    """SDXL's costliest self-attention: 10 heads of 64."""
    heads, width = 10, 64
    q, k, v = (torch.randn(rows, heads, tokens, width, device=device, dtype=dtype) for _ in range(3))
    return _rate(4 * rows * heads * tokens**2 * width, lambda: F.scaled_dot_product_attention(q, k, v), device)


def copy(device: torch.device, size: int) -> dict[str, Any]:
    """A copy of `size` bytes within the device; bytes read and written both count."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    timing = timed(lambda: target.copy_(source), device)
    return {"terabytes_per_second": 2 * size / timing.median / 1e12, **timing.facts()}


def measure(run: Run) -> None:
    """The ceilings, matrix products first."""
    device, toy = torch.device(run.device), run.rehearse
    side, rows, edge, tokens = (128, 1, 8, 64) if toy else (8192, 26, 64, 4096)
    attempt = run.record.attempt
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        attempt("ceilings", lambda dtype=dtype: product(device, dtype, side), what="matrix product", dtype=name)
    for per_row, scale in ((False, "one scale"), (True, "a scale per row")):
        attempt(
            "ceilings",
            lambda per_row=per_row: product_fp8(device, side, per_row),
            what=f"matrix product, {scale}",
            dtype="float8_e4m3fn",
        )
    attempt("ceilings", lambda: copy(device, 2**20 if toy else 2**32), what="copy", dtype="float32")
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for what, call in (
            ("convolution", lambda dtype=dtype: convolution(device, dtype, rows, edge)),
            ("attention", lambda dtype=dtype: attention(device, dtype, rows, tokens)),
        ):
            attempt("ceilings", call, what=what, dtype=name)
