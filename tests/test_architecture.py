"""Imports point downwards, floor by floor; what starts without heavy libraries."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkout import PYTHONPATH, ROOT

PACKAGES = {
    "resmaster_flows": ROOT / "flows" / "resmaster_flows",
    "resmaster_tasks": ROOT / "tasks" / "resmaster_tasks",
    "resmaster_stages": ROOT / "resmaster_stages",
}
FLOORS = (
    ("resmaster_flows.cli",),
    ("resmaster_flows",),
    ("resmaster_flows.watch",),
    ("resmaster_tasks",),
    ("resmaster_stages.picturebook.training",),
    ("resmaster_stages.evaluation",),
    # the stages
    (
        "resmaster_stages.prompts",
        "resmaster_stages.low_res",
        "resmaster_stages.captions",
        "resmaster_stages.high_res",
        "resmaster_stages.quality",
        "resmaster_stages.recaptions",
    ),
    ("resmaster_stages.gallery",),
    ("resmaster_stages.publish",),
    ("resmaster_stages.planning",),
    ("resmaster_stages.inspection",),
    ("resmaster_stages.runner",),
    ("resmaster_stages.methods",),
    ("resmaster_stages.diffusion",),
    ("resmaster_stages.dataset",),
    ("resmaster_stages.metrics",),
    ("resmaster_stages.models",),
    ("resmaster_stages.storage",),
    ("resmaster_stages.config",),
    ("resmaster_stages.picturebook",),
    # the ground
    (
        "resmaster_stages.keys",
        "resmaster_stages.redaction",
        "resmaster_stages.progress",
        "resmaster_stages.errors",
    ),
)
"""From the top down. A module belongs to the longest name that is its own or a folder above it."""


def module_name(path: Path, top: str) -> str:
    parts = path.relative_to(PACKAGES[top]).with_suffix("").parts
    return ".".join((top, *parts)).removesuffix(".__init__")


def modules() -> Iterator[tuple[str, Path]]:
    for top, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            yield module_name(path, top), path


KNOWN = dict(modules())

FACES = {"resmaster_stages", *(name for name in KNOWN if f"{name}.".startswith("resmaster_stages.library."))}
"""Modules without a floor: a package's face may name anything below it, and no room of the package names the face."""


def floor_of(module: str) -> int:
    rooms = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    while module not in rooms:
        above, _, _ = module.rpartition(".")
        assert above, f"{module} stands on no floor; give it a room of those in FLOORS"
        module = above
    return rooms[module]


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it, ours by their full names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; this project's imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in KNOWN else str(node.module)


def upward(known: dict[str, Path]) -> list[str]:
    """Imports that point upwards, as `importer -> imported`."""
    return [
        f"{module} -> {name}"
        for module, path in known.items()
        if module not in FACES
        for name in imported(path)
        if name in known and name not in FACES and floor_of(name) < floor_of(module)
    ]


def test_imports_point_downwards() -> None:
    assert not upward(KNOWN)


def test_an_upward_import_is_found(tmp_path: Path) -> None:
    path = tmp_path / "folder.py"
    path.write_text("def late():\n    from resmaster_stages.runner import run\n")
    assert upward({**KNOWN, "resmaster_stages.storage.folder": path}) == [
        "resmaster_stages.storage.folder -> resmaster_stages.runner.run"
    ]


def test_no_room_of_the_stages_imports_their_face() -> None:
    rooms = {module: path for module, path in KNOWN.items() if module.startswith("resmaster_stages.")}
    assert not [module for module, path in rooms.items() if module not in FACES and FACES & set(imported(path))]


def test_the_root_holds_the_stages_and_the_ground() -> None:
    at_root = {path.stem for path in PACKAGES["resmaster_stages"].glob("*.py")} - {"__init__"}
    named = {room.removeprefix("resmaster_stages.") for floor in FLOORS for room in floor if room.count(".") == 1}
    assert at_root == {name for name in named if (PACKAGES["resmaster_stages"] / f"{name}.py").is_file()}
    assert len(at_root) == 10


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_the_file_map_has_every_room(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    folders = {path.parent for _, path in modules()} - {PACKAGES["resmaster_stages"]}
    for folder in folders:
        assert f"{folder.name.removeprefix('resmaster_')}/" in text, f"{page} lacks {folder.relative_to(ROOT)}"


def test_stages_import_no_prefect() -> None:
    for module, path in KNOWN.items():
        if module.startswith("resmaster_stages"):
            assert not any(name.split(".")[0] == "prefect" for name in imported(path)), module


def test_status_and_plan_start_without_torch_or_prefect() -> None:
    """The commands that only read the bucket must answer at once."""
    code = (
        "import sys, resmaster_flows.cli.main, resmaster_flows.cli.status, resmaster_flows.cli.plan, "
        "resmaster_stages.runner.run, resmaster_stages.inspection.status, resmaster_stages.planning.preview, "
        "resmaster_flows.cli.publish, resmaster_flows.cli.view, resmaster_stages.gallery.serve;"
        "[verb.module() for verb in resmaster_flows.cli.main.VERBS];"
        "from resmaster_stages.config.load import parse_config; parse_config({'name': 'demo'}).model_json_schema();"
        "heavy = {'torch', 'diffusers', 'transformers', 'scipy', 'prefect'} & set(sys.modules); sys.exit(repr(heavy) "
        "if heavy else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
