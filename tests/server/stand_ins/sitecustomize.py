"""Loaded by every Python process of the server tests (it is on their PYTHONPATH).

The table of stages gets stand-ins, for the stages would load models. So the real deployments, with their real
entrypoints, run in real worker processes, but cheaply.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TABLE = "resmaster_stages.dataset.stages"


class Finder(MetaPathFinder):
    """Finds the table as usual, and has it changed once it is loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == TABLE else None
        if spec is not None and spec.loader is not None:
            spec.loader = Changed(spec.loader)
        return spec


class Changed(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        for name, stage in module.STAGES.items():
            module.STAGES[name] = replace(stage, process=f"tests.server.stages:{name}")


sys.meta_path.insert(0, Finder())
