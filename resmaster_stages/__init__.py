"""The pipeline's stages: prompts -> low-resolution images -> patch captions -> high-resolution images -> quality.

This package does not use Prefect: every stage is a plain function over samples and can be called from a script.

The names in `_HOMES` are for scripts and notebooks (docs/library.md). Each is imported at its first use, so that
importing the package stays fast. `open` is not in `__all__`: `from resmaster_stages import *` leaves the builtin alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resmaster_stages.config.load import load_config
    from resmaster_stages.errors import ResMasterError
    from resmaster_stages.library.building import BuildIncomplete, build
    from resmaster_stages.library.drawing import generate, upscale
    from resmaster_stages.library.measuring import measure
    from resmaster_stages.library.models import load
    from resmaster_stages.library.opened import open as open
    from resmaster_stages.planning.preview import preview

__version__ = "0.1.0"

__all__ = [
    "BuildIncomplete",
    "ResMasterError",
    "build",
    "generate",
    "load",
    "load_config",
    "measure",
    "preview",
    "upscale",
]

_HOMES = {
    "BuildIncomplete": "library.building",
    "ResMasterError": "errors",
    "build": "library.building",
    "generate": "library.drawing",
    "load": "library.models",
    "load_config": "config.load",
    "measure": "library.measuring",
    "open": "library.opened",
    "preview": "planning.preview",
    "upscale": "library.drawing",
}
"""Public name -> the module that defines it."""

_PIPELINE = frozenset({"BuildIncomplete", "build", "measure", "open", "preview"})
"""The public names that need the extra `pipeline`."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(_HOMES)}")
    if name in _PIPELINE:
        import_module(f"{__name__}.errors").require_extra("pipeline", f"{__name__}.{name}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
