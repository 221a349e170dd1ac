"""A budget, on a real server with two real workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import FlowRun

from resmaster_stages.dataset.dataset import Dataset, open_dataset
from resmaster_stages.inspection.status import pending
from tests.server.conftest import Stack, wait
from tests.server.test_operation import config, contents, state

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(600)]

SHARDS = 6


def run(workers: Stack, *words: str) -> tuple[int, str]:
    """`resmaster run` with workers: its exit status and what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "resmaster_flows.cli.main", "run", *words],
        env=workers.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def ended_runs(workers: Stack, dataset: Dataset) -> list[FlowRun]:
    """The runs over shards of a dataset, once all of them have ended. A worker ends those that were cancelled."""
    with workers.client() as client:
        runs = client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=["process-shards"])))
    own = [each for each in runs if each.parameters["dataset_url"] == dataset.url]
    return own if all(each.state and each.state.is_final() for each in own) else []


def test_a_budget_ends_a_build_on_workers_with_the_shards_at_work(workers: Stack, tmp_path: Path) -> None:
    """Any shard spends the budget, so each of the two workers begins one at most. Runs that wait are not needed."""
    path = tmp_path / "demo.yaml"
    path.write_text(yaml.safe_dump(config(tmp_path, list("abcdef"), price=1e6)))
    status, said = run(workers, str(path), "--max-cost", "0.001")
    assert status == 3, said
    dataset = open_dataset(str(tmp_path / "out"))
    done = {shard for _, shard in contents(dataset)}
    assert 1 <= len(done) <= 2
    assert len(contents(dataset)) == 4 * len(done), "no shard is left half done"
    assert f"{SHARDS - len(done)} of {SHARDS} shards are left, about " in said
    shards = wait(lambda: ended_runs(workers, dataset))
    with workers.client() as client:
        builds = client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=["build-dataset"])))
    (build,) = (each for each in builds if str(tmp_path) in str(each.parameters))
    ends = {state(each) for each in shards}
    assert ends <= {("COMPLETED", "Completed"), ("COMPLETED", "Limited"), ("CANCELLED", "Cancelled")}
    assert state(build) == ("FAILED", "Incomplete")
    assert build.state is not None
    assert str(build.state.message).startswith("stopped: the budget of 0.001 is spent (max_cost): ")
    assert not [line for line in said.splitlines() if "not finished" in line], "what is left is no error"

    status, said = run(workers, str(path), "--max-cost", "1000000000")
    assert status == 0, said
    assert not any(pending(dataset).values())
