"""What is around a build, a server, its deployment or a cluster, is looked at before anything is planned."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

from resmaster_flows.cli.main import main
from resmaster_flows.workplace import computed_here
from resmaster_stages.config.dataset import DispatchConfig


def said(capsys: pytest.CaptureFixture[str], folder: Path, verb: str, **values: Any) -> list[str]:
    """The lines with which a command refuses a configuration. Nothing is begun."""
    (folder / "prompts.txt").write_text("a red house\n")
    config = {"name": "demo", "root": str(folder / "out"), "prompts": "prompts.txt", **values}
    (folder / "demo.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert main([verb, str(folder / "demo.yaml")]) == 2
    assert not (folder / "out").exists()
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("resmaster: ")]


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_workers_without_a_server(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = said(capsys, tmp_path, verb, dispatch={"where": "workers"})
    assert "dispatch.where is workers, but no server is configured" in line


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_cluster_without_its_package(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resmaster_flows.clusters.importlib.util.find_spec", lambda name: None)
    (line,) = said(capsys, tmp_path, verb, dispatch={"where": "ray"})
    assert "executor ray needs prefect-ray; install it with: pip install" in line


@pytest.mark.parametrize("where", ["auto", "here"])
@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_server_that_only_a_profile_names(
    verb: str, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        (line,) = said(capsys, tmp_path, verb, dispatch={"where": where})
    assert "http://127.0.0.1:9/api: no answer" in line


def test_the_devices_of_this_machine_count_where_it_computes() -> None:
    assert computed_here(DispatchConfig())
    assert computed_here(DispatchConfig(where="here"))
    assert not any(computed_here(DispatchConfig(where=where)) for where in ("workers", "dask", "ray"))
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert not computed_here(DispatchConfig())
        assert computed_here(DispatchConfig(where="here"))


@pytest.mark.parametrize("verb", ["plan", "run"])
@pytest.mark.usefixtures("server")  # it stays to the end of the module, so this test is the last one
def test_workers_without_a_deployment(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dispatch = {"where": "workers", "deployment": "nobody"}
    (line,) = said(capsys, tmp_path, verb, dispatch=dispatch)
    assert "has no deployment process-shards/nobody; make it with: make deploy" in line
    found = said(capsys, tmp_path, verb, dispatch=dispatch, quality={"clip": "/etc"}, model={"device": "nope"})
    assert len(found) == 3
    assert "has no deployment" in found[0]
    assert "quality.clip: /etc" in found[1]
    assert "model.device: 'nope'" in found[2]
