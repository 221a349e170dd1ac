"""Imports point downwards: flows -> tasks -> resmaster_stages; the stages know nothing about Prefect."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVEL = {"flows": 2, "tasks": 1, "resmaster_stages": 0}


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; this project's imports are absolute"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", LEVEL)
def test_imports_point_downwards(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        for name in imported_packages(path):
            assert LEVEL.get(name, -1) <= LEVEL[package], f"{path.relative_to(ROOT)} imports {name}"


def test_stages_import_no_prefect() -> None:
    for path in (ROOT / "resmaster_stages").rglob("*.py"):
        assert "prefect" not in imported_packages(path), path


def test_status_and_plan_start_without_torch_or_prefect() -> None:
    """The commands that only read the bucket must answer at once."""
    code = (
        "import sys, flows.cli, flows.compare, resmaster_stages.stage, resmaster_stages.standing, resmaster_stages.preview, resmaster_stages.storage.dataset;"
        "heavy = {'torch', 'diffusers', 'transformers', 'prefect'} & set(sys.modules); sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
