"""Runs a script as if only the packages of the base install were there: `python -m tests.base_install SCRIPT WORD...`.

All modules are hidden that belong to no package of `dependencies` in pyproject.toml and to none that these bring.
"""

import re
import sys
import tomllib
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from typing import Any

from packaging.requirements import Requirement

from tests.checkout import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def brought(requirements: list[str]) -> set[str]:
    """The names of the installed packages that pip would bring for `requirements`, these themselves included."""
    left = [Requirement(each) for each in requirements]
    done: set[tuple[str, str]] = set()
    while left:
        requirement = left.pop()
        name = normal(requirement.name)
        try:
            needs = [Requirement(each) for each in distribution(name).requires or ()]
        except PackageNotFoundError:  # of another build of PyTorch, or of another platform
            continue
        for extra in {"", *requirement.extras} - {extra for package, extra in done if package == name}:
            done.add((name, extra))
            left += [each for each in needs if each.marker is None or each.marker.evaluate({"extra": extra})]
    return {name for name, _ in done}


def normal(name: str) -> str:
    """A package's name as registries compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def other_modules() -> set[str]:
    """The installed top-level modules that the base install does not bring."""
    base = brought(PROJECT["dependencies"]) | {PROJECT["name"]}
    return {module for module, names in packages_distributions().items() if base.isdisjoint(map(normal, names))}


def hide(modules: set[str]) -> None:
    """From now on, `modules` are not found in this process."""

    class Finder(PathFinder):
        @classmethod
        def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
            return None if fullname.partition(".")[0] in modules else super().find_spec(fullname, path, target)

    sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]


if __name__ == "__main__":
    hide(other_modules())
    del sys.argv[0]
    exec(compile(sys.argv[0], "<script>", "exec"), {"__name__": "__main__"})
