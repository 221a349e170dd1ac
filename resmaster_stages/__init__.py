"""The pipeline's stages: prompts -> low-resolution images -> patch captions -> high-resolution images -> quality.

This package does not use Prefect: every stage is a plain function over samples and can be called from a script.

The functions in `__all__` are for scripts and notebooks (docs/library.md). Each is imported at its first use, so that
importing the package stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resmaster_stages.config.load import load_config
    from resmaster_stages.dataset.dataset import open_dataset
    from resmaster_stages.errors import ResMasterError
    from resmaster_stages.inspection.explain import explain
    from resmaster_stages.inspection.status import status
    from resmaster_stages.library import generate, measure, read_samples, upscale
    from resmaster_stages.models.load import load_models
    from resmaster_stages.planning.preview import preview

__version__ = "0.1.0"

__all__ = [
    "ResMasterError",
    "explain",
    "generate",
    "load_config",
    "load_models",
    "measure",
    "open_dataset",
    "preview",
    "read_samples",
    "status",
    "upscale",
]

_HOMES = {
    "ResMasterError": "errors",
    "explain": "inspection.explain",
    "generate": "library",
    "load_config": "config.load",
    "load_models": "models.load",
    "measure": "library",
    "open_dataset": "dataset.dataset",
    "preview": "planning.preview",
    "read_samples": "library",
    "status": "inspection.status",
    "upscale": "library",
}
"""Public name -> the module that defines it."""

_PIPELINE = frozenset({"explain", "measure", "open_dataset", "preview", "read_samples", "status"})
"""The public names that need the extra `pipeline`."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(__all__)}")
    if name in _PIPELINE:
        import_module(f"{__name__}.errors").require_extra("pipeline", f"{__name__}.{name}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
