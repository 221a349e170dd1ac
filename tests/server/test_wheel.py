"""A wheel, without the checkout: deploys, and its worker runs shards in the folder of another project."""

import subprocess
from pathlib import Path

import pytest
import yaml

from resmaster_flows import deploy
from resmaster_stages.config.load import load_config
from resmaster_stages.prompts import ingest
from tests.checkout import ROOT
from tests.s3_server import die_with_parent
from tests.server.conftest import POOL, Stack
from tests.wheel import build, environment, install, project

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(300)]

QUEUE = "wheel"
"""A queue of its own: the other workers of these tests do not look into it."""


def test_a_worker_of_the_wheel_in_the_folder_of_another_project(stack: Stack, tmp_path: Path) -> None:
    python = install(build(tmp_path), tmp_path / "environment")
    folder = tmp_path / "project"
    folder.mkdir()
    project(folder)
    server = {name: value for name, value in stack.environment.items() if name.startswith("PREFECT_")}
    same = {**deploy.DEFAULTS, "RESMASTER_ROOT": str(ROOT / "out")}  # as `make deploy` deploys, for the other tests
    own = {**environment(), **server, **same}
    deployed = subprocess.run(
        [python, "-m", "resmaster_flows.deploy"], cwd=folder, env=own, capture_output=True, text=True, check=False
    )
    assert deployed.returncode == 0, deployed.stderr
    assert "5 deployments named process" in deployed.stdout

    (folder / "prompts.txt").write_text("a red house\n")
    values = {"name": "tiny", "root": str(folder / "out"), "prompts": "prompts.txt", "low_res": {"steps": 2}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    dataset = ingest(load_config(folder / "tiny.yaml"))
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [python, "-m", "prefect", "worker", "start", "--pool", POOL, "--work-queue", QUEUE, "--name", QUEUE],
            cwd=folder,
            env=own,
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,
        )
    try:
        with stack.client() as client:
            found = client.read_deployment_by_name("process-shards/resmaster-shards")
            parameters = {"dataset_url": dataset.url, "shards": [0], "stages": ["low_res"]}
            run = client.create_flow_run_from_deployment(found.id, parameters=parameters, work_queue_name=QUEUE).id
        ended = stack.ended(run)
        assert ended.state is not None
        assert ended.state.is_completed(), f"{ended.state}\n{(tmp_path / 'worker.log').read_text()}"
    finally:
        worker.kill()
        worker.wait()
    assert list(dataset.commits("low_res").numbers()) == [0]
