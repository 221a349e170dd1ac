"""What a failing device means: lost for good, too small for the job, or a plain error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from resmaster_stages.errors import ConfigError, GpuLost

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
)


@contextmanager
def device_faults(advice: str) -> Iterator[None]:
    """Raises GpuLost where the device context is poisoned, and ConfigError with `advice` where memory ran out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise ConfigError(f"out of GPU memory; {advice}") from error
    except RuntimeError as error:
        text = str(error).lower()
        if any(sign in text for sign in _LOST):
            raise GpuLost(f"the GPU is lost: {str(error).splitlines()[0]}") from error
        raise
