"""What a wheel holds, and that it is enough: something to start from, and a build in the folder of another project."""

import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from resmaster_flows.home import HOME
from tests.checkout import ROOT
from tests.test_architecture import KNOWN, PACKAGES
from tests.wheel import build, environment, install, project

pytestmark = pytest.mark.slow

TRAINING = "resmaster_stages/picturebook/training/"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


def test_it_takes_no_common_name_carries_what_is_no_code_and_leaves_the_training_out(wheel: Path) -> None:
    """`flows` and `tasks` are what other people's Prefect projects call theirs."""
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == set(PACKAGES)
    assert "resmaster_stages/picturebook/pack/card.json" in names
    pages = ("publish/templates", "gallery/templates", "gallery/static", "gallery/static/vendor")
    loaded = {path for folder in pages for path in (ROOT / "resmaster_stages" / folder).glob("*.*")}
    assert len(loaded) > 20
    assert {str(path.relative_to(ROOT)) for path in loaded} <= names
    deployed = {f"resmaster_flows/{path.relative_to(ROOT)}" for path in (ROOT / "deployments").rglob("*.yaml")}
    assert len(deployed) == 16
    assert deployed <= names
    assert {f"resmaster_flows/infra/{kind}/job-template.yaml" for kind in ("docker", "kubernetes")} <= names
    assert HOME == ROOT, "the checkout keeps no copies"
    assert not [name for name in names if name.startswith(TRAINING)]
    packed = {name for name in names if name.endswith(".py")}
    wanted = {
        f"{module.split('.')[0]}/{path.relative_to(PACKAGES[module.split('.')[0]])}" for module, path in KNOWN.items()
    }
    assert packed == {name for name in wanted if not name.startswith(TRAINING)}


@pytest.mark.timeout(300)
def test_a_build_in_the_folder_of_another_project(wheel: Path, tmp_path: Path) -> None:
    python = install(wheel, tmp_path / "environment")
    folder = tmp_path / "project"
    folder.mkdir()
    project(folder)

    def resmaster(*words: str) -> str:
        done = subprocess.run(
            [python.with_name("resmaster"), *words],
            cwd=folder,
            env={**environment(), "PREFECT_HOME": str(tmp_path / "prefect")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert resmaster("--version").startswith("resmaster ")
    assert resmaster("init", "demo").endswith("next: resmaster run demo/picturebook.yaml\n")
    demo = folder / "demo" / "picturebook.yaml"
    config = yaml.safe_load(demo.read_text())
    config["low_res"]["steps"] = config["upscale"]["steps"] = 2
    config["upscale"]["scale"] = 1.5
    demo.write_text(yaml.safe_dump(config))
    assert "1 samples in " in resmaster("run", "demo/picturebook.yaml", "--limit", "1")
    (large,) = (folder / "out" / "picturebook" / "high_res").glob("*.tar")
    with tarfile.open(large) as tar:
        assert sorted(Path(name).suffix for name in tar.getnames()) == [".json", ".png", ".txt"]
