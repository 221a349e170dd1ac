"""Volatile facts of this process for commit records: versions, host, device. Imports no library to find them."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import sys
from functools import cache
from typing import Any

LIBRARIES = ("resmaster-pipeline", "torch", "diffusers", "transformers", "webdataset", "pyarrow", "pillow")


@cache
def _versions() -> dict[str, str]:
    """Library -> version. Cached, because it reads and parses a file per library."""
    versions: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def own_provenance() -> dict[str, Any]:
    """Volatile facts of this process: versions, host, and the GPU if torch already uses one."""
    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": dict(_versions()),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts
