"""Classifies errors of a device: the device is lost, the memory is too small for the batch, or neither.

Torch reports the first two as RuntimeErrors with many different messages. This module has the one list of them. It does
not import torch to classify an error.
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
"""Messages of CUDA's and Metal's allocators, of the CPU's allocator ("can't allocate memory: you tried to
allocate..."), and of cuBLAS and cuDNN."""


def fault_of(error: Exception, advice: str) -> GpuLost | OutOfMemory | None:
    """`error` as GpuLost or OutOfMemory of this project. None if it is neither."""
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
    """Turns errors in the block into GpuLost (the device context is unusable) or OutOfMemory with `advice`.

    batch: how many items go to the device at once; it is noted on the OutOfMemory.
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
    """Frees memory that is no longer referenced, so that a smaller batch fits."""
    gc.collect()  # the frames of a caught error held tensors
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
