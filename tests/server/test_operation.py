"""What operators do, on a real server with real worker processes: schedules, retries, kills, cancelling, the repair
form."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import AwaitingRetry, Cancelling

from resmaster_flows.outcome import INCOMPLETE
from resmaster_stages.dataset.dataset import Dataset, open_dataset
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.inspection.status import pending
from resmaster_stages.runner.run import run_stage
from tests.fake_stages import planned
from tests.server.conftest import Stack, descendants, wait
from tests.server.stages import begun_by, stand_in

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(400)]

DISPATCH = {"poll_seconds": 0.5, "shards_per_run": 1, "stall_seconds": 600}


def config(folder: Path, prompts: list[str], **dispatch: object) -> dict[str, Any]:
    """What a user gives the build: a shard per prompt."""
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    return {
        "name": "demo",
        "root": str(folder / "out"),
        "prompts": str(folder / "prompts.txt"),
        "samples_per_shard": 1,
        "low_res": {"height": 16, "width": 16},
        "dispatch": {**DISPATCH, **dispatch},
    }


def state(run: FlowRun) -> tuple[str, str]:
    assert run.state is not None
    return run.state.type.value, run.state.name


def contents(dataset: Dataset) -> dict[tuple[str, int], str]:
    """(stage, shard) -> sha256 of what lies there."""
    return {
        (stage, shard): hashlib.sha256(dataset.folder.read(receipt.objects[0].name)).hexdigest()
        for stage in dataset.hashes
        for shard, receipt in dataset.commits(stage).read_all().items()
    }


def test_a_schedule_starts_a_build_and_two_workers_share_its_shards(workers: Stack, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    wanted = config(tmp_path, [f"{letter} until {gate}" for letter in "ab"])
    with workers.client() as client:
        build = client.read_deployment_by_name("build-dataset/process")
        assert [schedule.active for schedule in build.schedules] == [False], "shipped, and paused"
        soon = (datetime.now(UTC) + timedelta(seconds=5)).isoformat()
        schedule = {"interval": 86400, "anchor_date": soon}
        body = [{"schedule": schedule, "active": True, "parameters": {"config": wanted}, "slug": "test"}]
        client.request("POST", f"/deployments/{build.id}/schedules", json=body).raise_for_status()

    both = wait(lambda: found if len(found := begun_by(gate)) == 2 else None)
    for name in ("gpu-a", "gpu-b"):
        assert len(both & set(descendants(workers.processes[name].pid))) == 1, "each worker has one run, and no more"
    with workers.client() as client:
        (run,) = [
            each for each in client.read_flow_runs() if each.deployment_id == build.id and state(each)[0] == "RUNNING"
        ]
    assert run.auto_scheduled
    gate.touch()
    assert state(workers.ended(run.id)) == ("COMPLETED", "Completed")
    dataset = open_dataset(str(tmp_path / "out"))
    assert not any(pending(dataset).values())
    assert (tmp_path / "out" / "demo" / "report" / "index.html").is_file()
    children = workers.children(run.id)
    assert sorted(child.name for child in children) == [f"demo: shards {shard}" for shard in range(2)]
    assert {child.work_queue_name for child in children} == {"gpu"}
    assert all("dataset:demo" in child.tags and len(str(child.parameters)) < 300 for child in children)


def test_a_failed_run_is_retried_as_the_button_does_it(workers: Stack, tmp_path: Path) -> None:
    mended = tmp_path / "mended"
    dataset = planned(tmp_path / "out", ["a", f"b unless {mended}"], tmp_path, samples_per_shard=1)
    run = workers.run("process-shards/process", dataset_url=dataset.url, shards=[0, 1])
    failed = workers.ended(run)
    assert state(failed) == ("FAILED", INCOMPLETE)
    assert failed.state is not None
    assert failed.state.message == "shards 1 not finished; first: high_res: not mended yet"
    before = contents(dataset)
    assert {shard for _, shard in before} == {0, 1}

    mended.touch()
    # A worker (of Prefect 3.8) that is offered a run whose process it has not seen off yet breaks down:
    # docs/deploying.md
    wait(lambda: not any(descendants(workers.processes[name].pid) for name in ("gpu-a", "gpu-b")))
    with workers.client() as client:
        client.set_flow_run_state(run, AwaitingRetry(), force=True)
    wait(lambda: workers.read(run).run_count == 2)
    assert state(workers.ended(run)) == ("COMPLETED", "Completed")
    assert not any(pending(dataset).values())
    assert before.items() <= contents(dataset).items(), "what was committed stays"


def test_kill_9_of_a_worker_and_its_run_costs_nothing_but_time(workers: Stack, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    prompts = [f"a until {gate}", "b"]
    reference = planned(tmp_path / "reference", prompts, tmp_path, samples_per_shard=1)
    gate.touch()
    for shard in (0, 1):
        for stage in STAGES:
            run_stage(reference, stage, shard, process=stand_in(stage))
    gate.unlink()
    for begun in tmp_path.glob("gate.begun-*"):
        begun.unlink()

    build = workers.run("build-dataset/process", config=config(tmp_path, prompts))
    (victim,) = wait(lambda: begun_by(gate))
    name = next(name for name in ("gpu-a", "gpu-b") if victim in descendants(workers.processes[name].pid))
    workers.kill(name)
    lost = next(child for child in workers.children(build) if child.parameters["shards"] == [0])
    gate.touch()
    dataset = open_dataset(str(tmp_path / "out"))
    wait(lambda: not any(1 in shards for shards in pending(dataset).values()))
    assert pending(dataset)["high_res"] == [0]
    assert state(workers.read(lost.id))[0] == "RUNNING", "nobody is left to say otherwise"

    # A repair goes by what is committed: the other worker does the shard, and the build that still waits sees it.
    repair = workers.run("repair/process", dataset_url=dataset.url, shards="0", stages=["high_res", "quality"])
    assert state(workers.ended(repair)) == ("COMPLETED", "Completed")
    (again,) = workers.children(repair)
    assert again.name == "demo: high_res,quality of shards 0"
    assert again.work_queue_name == "gpu-repair"
    assert state(workers.ended(build)) == ("COMPLETED", "Completed")
    assert contents(dataset) == contents(reference)
    assert len(contents(dataset)) == 2 * 4
    workers.start_worker(name, "gpu", "gpu-repair")


def test_cancelling_a_build_cancels_its_runs(workers: Stack, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    prompts = [f"{letter} until {gate}" for letter in "abc"]
    build = workers.run("build-dataset/process", config=config(tmp_path, prompts))
    at_work = wait(lambda: found if len(found := begun_by(gate)) == 2 else None)
    wait(lambda: len(workers.children(build)) == 3)
    with workers.client() as client:
        client.set_flow_run_state(build, Cancelling())
    assert state(workers.ended(build))[0] == "CANCELLED"
    for child in workers.children(build):
        assert state(workers.ended(child.id))[0] == "CANCELLED"
    wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in at_work))
