"""The project as its users have it: a wheel, installed with its dependencies into an environment of its own."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.checkout import ROOT

SOURCE = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
FOLDERS = ("flows", "tasks", "resmaster_stages", "deployments", "infra")


def build(folder: Path) -> Path:
    """The wheel, built in `folder`. Setuptools is what torch needs too, so nothing is downloaded."""
    source = folder / "source"
    source.mkdir()
    for name in (*SOURCE, *FOLDERS):  # a build leaves files beside them
        (source / name).symlink_to(ROOT / name)
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), str(source))
    return next(folder.glob("*.whl"))


def pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *words], check=True, timeout=300)


def install(wheel: Path, folder: Path) -> Path:
    """The Python of a new environment in `folder` that has the wheel. The dependencies are those of this Python.

    Their folder is on the path, but its `.pth` files are not read: they would lead to this checkout.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


def environment() -> dict[str, str]:
    """The environment of a user, who does not point Python at this checkout."""
    left = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PREFECT_API_URL")}
    return {**left, "OMP_NUM_THREADS": "1"}


def project(folder: Path) -> None:
    """A Prefect project of the user's own, as many have it: with a `flows` and a `tasks`."""
    for name in ("flows", "tasks"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise ImportError('the {name} of the user')\n")
