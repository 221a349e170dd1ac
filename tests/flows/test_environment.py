"""What libraries read when they are loaded is set before torch is loaded, in every process of the pipeline."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from resmaster_tasks import ENVIRONMENT
from tests.checkout import PYTHONPATH, ROOT

PROBE = """
import os, sys
from importlib.abc import MetaPathFinder


class AtTorch(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            found = map(os.environ.get, ("OMP_WAIT_POLICY", "PREFECT_SERVER_ANALYTICS_ENABLED", "DO_NOT_TRACK"))
            os.write(2, f"torch: {' '.join(map(str, found))}\\n".encode())
            os._exit(0)


sys.meta_path.insert(0, AtTorch())
"""
"""Says what the environment is at the moment at which somebody imports torch, and ends the process."""

ENTRYPOINTS = sorted(
    {entry["entrypoint"] for entry in yaml.safe_load((ROOT / "deployments/prefect.yaml").read_text())["deployments"]}
)


def at_torch(folder: Path, *command: str, **environment: str) -> str:
    """What a Python process says when it imports torch."""
    (folder / "sitecustomize.py").write_text(PROBE)
    inherited = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**inherited, "PYTHONPATH": os.pathsep.join([str(folder), PYTHONPATH]), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("environment", "value"),
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"RESMASTER_PLUGINS": "torch"}, "PASSIVE")],
    ids=["", "the user's own", "a plugin that imports torch"],
)
def test_the_command(environment: dict[str, str], value: str, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    words = ("-m", "resmaster_flows.cli.main", "upscale", "photo.png", "out.png", "--model", "picturebook")
    assert at_torch(tmp_path, *words, **environment) == f"torch: {value} false 1"


@pytest.mark.parametrize("entrypoint", ENTRYPOINTS)
def test_a_run_of_a_deployment(entrypoint: str, tmp_path: Path) -> None:
    """Loaded as a worker's process loads it."""
    load = f"from prefect.flows import load_flow_from_entrypoint as load; load({entrypoint!r}); import torch"
    assert at_torch(tmp_path, "-c", load) == "torch: PASSIVE false 1"


def test_a_worker_of_a_cluster(tmp_path: Path) -> None:
    """It gets the task by value, with references to what the task uses."""
    import cloudpickle

    from resmaster_tasks.shards import process_shard

    (tmp_path / "task").write_bytes(cloudpickle.dumps(process_shard))
    load = "import cloudpickle, pathlib; cloudpickle.loads(pathlib.Path('task').read_bytes()); import torch"
    assert at_torch(tmp_path, "-c", load) == "torch: PASSIVE false 1"


def test_the_library_leaves_the_environment_of_other_programs_alone(tmp_path: Path) -> None:
    assert at_torch(tmp_path, "-c", "import resmaster_stages as rm; rm.generate('a house')") == "torch: None None None"
