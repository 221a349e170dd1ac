"""Loaded by every Python process of the server tests (it is on their PYTHONPATH): the driver gets stand-ins for the
stages, which would load models. So the real deployments, with their real entrypoints, run in real worker processes, but
cheaply.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

DRIVER = "resmaster_stages.runner.attempt"


class Finder(MetaPathFinder):
    """Finds the driver as usual, and has it changed once it is loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == DRIVER else None
        if spec is not None and spec.loader is not None:
            spec.loader = Changed(spec.loader)
        return spec


class Changed(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)

        class Importlib:
            @staticmethod
            def import_module(path: str) -> object:
                from tests.server.stages import stand_in

                stage = next(stage for stage, module_path in module.MODULES.items() if module_path == path)

                class Module:
                    process = staticmethod(stand_in(stage))

                return Module

        module.importlib = Importlib  # type: ignore[attr-defined]


sys.meta_path.insert(0, Finder())
