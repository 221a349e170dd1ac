"""What a failing device means: lost for good, too small for the batch, or nothing. Loads no torch to find out.

Torch reports both as RuntimeErrors of many wordings; here is the one list of them.
"""

from __future__ import annotations

import errno
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from resmaster_stages.errors import GpuLost, OutOfMemory, ResMasterError

_LOST = (
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "uncorrectable ecc",
    "cuda error: unknown",
    "misaligned address",
    "illegal instruction",
    "device is lost",
    "no cuda-capable device",
    "launch timed out",
    "can't initialize nvml",
)
_FULL = ("out of memory", "allocate memory", "alloc_failed")
"""CUDA's and Metal's allocators; the CPU's ("can't allocate memory: you tried to allocate..."); cuBLAS and cuDNN."""


def fault_of(error: Exception, advice: str) -> GpuLost | OutOfMemory | None:
    """What `error` says about the device or the memory, as an error of this project; None if it says nothing."""
    text = " ".join(str(error).split())
    signs = text.lower() if isinstance(error, RuntimeError) else ""
    if any(sign in signs for sign in _LOST):
        return GpuLost(f"the GPU is lost: {text}")
    full = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if full or any(sign in signs for sign in _FULL):
        return OutOfMemory(f"out of memory; {advice}")
    return None


@contextmanager
def device_faults(advice: str, batch: int | None = None) -> Iterator[None]:
    """Raises GpuLost where the device context is poisoned, and OutOfMemory with `advice` where memory ran out.

    batch: how much goes to the device at once.
    """
    try:
        yield
    except ResMasterError:
        raise
    except Exception as error:
        fault = fault_of(error, advice)
        if isinstance(fault, OutOfMemory):
            fault.batch = batch
        if fault:
            raise fault from error
        raise


def release_memory() -> None:
    """Give back what nothing refers to any more, so that a smaller batch finds the room."""
    gc.collect()  # a caught error's frames held tensors
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
