"""What operators do, on a real server with real worker processes: schedules, retries, kills, cancelling, the repair
form."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect import flow
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterType,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.objects import State as PrefectState
from prefect.events.filters import EventFilter
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.states import AwaitingRetry, Cancelling, Crashed, Running

from resmaster_flows.deploy import for_kind, read_yaml
from resmaster_flows.outcome import INCOMPLETE
from resmaster_stages.dataset.dataset import Dataset, open_dataset
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


def table(stack: Stack, run: UUID) -> dict[str, str]:
    """The table on the page of a build: name of the run -> state."""
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]), type=ArtifactFilterType(any_=["table"]))
    with stack.client() as client:
        (artifact,) = client.read_artifacts(artifact_filter=wanted)
    return {row["run"]: row["state"] for row in json.loads(str(artifact.data))}


def log(stack: Stack, run: UUID) -> list[str]:
    """The log on the page of a run."""
    with stack.client() as client:
        return [entry.message for entry in client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run])))]


def events(stack: Stack, run: UUID, name: str = "prefect.flow-run.") -> list[ReceivedEvent]:
    """The events of a run, oldest first."""
    wanted = EventFilter.model_validate(
        {"resource": {"id": [f"prefect.flow-run.{run}"]}, "event": {"prefix": [name]}, "order": "ASC"}
    )
    with stack.client() as client:
        found = client.read_events(wanted, limit=50).events
    return [ReceivedEvent.model_validate(event.model_dump(mode="json")) for event in found]


def trigger(automation: str) -> EventTrigger:
    """What starts an automation of `deployments/automations.yaml`, as the server evaluates it."""
    entries = [for_kind(entry, "process") for entry in read_yaml("automations.yaml")]
    return EventTrigger.model_validate(next(entry["trigger"] for entry in entries if entry["name"] == automation))


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
        build = client.read_deployment_by_name("build-dataset/resmaster-build")
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
    run = workers.run("process-shards/resmaster-shards", dataset_url=dataset.url, shards=[0, 1])
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
    wait(lambda: any("Finished in state Incomplete" in line for line in log(workers, run)))
    assert not any("Traceback" in line for line in log(workers, run)), "the flow chose this end"
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
        for stage in reference.hashes:
            run_stage(reference, stage, shard, process=stand_in(stage))
    gate.unlink()
    for begun in tmp_path.glob("gate.begun-*"):
        begun.unlink()

    build = workers.run("build-dataset/resmaster-build", config=config(tmp_path, prompts))
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
    repair = workers.run("repair/resmaster-repair", dataset_url=dataset.url, shards="0", stages=["high_res", "quality"])
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
    build = workers.run("build-dataset/resmaster-build", config=config(tmp_path, prompts))
    at_work = wait(lambda: found if len(found := begun_by(gate)) == 2 else None)
    wait(lambda: len(workers.children(build)) == 3)
    with workers.client() as client:
        client.set_flow_run_state(build, Cancelling())
    assert state(workers.ended(build))[0] == "CANCELLED"
    for child in workers.children(build):
        assert state(workers.ended(child.id))[0] == "CANCELLED"
    assert table(workers, build) == {f"demo: shards {shard}": "Cancelled" for shard in range(3)}
    wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in at_work))


def test_a_suspended_build_keeps_what_is_done_and_goes_on_when_it_is_resumed(workers: Stack, tmp_path: Path) -> None:
    """Suspended without the note that its process leaves: Prefect would resume it as Running, without a process."""
    gate = tmp_path / "gate"
    build = workers.run(
        "build-dataset/resmaster-build", config=config(tmp_path, [f"{letter} until {gate}" for letter in "abc"])
    )
    wait(lambda: len(begun_by(gate)) == 2)
    waiting = wait(lambda: [child for child in workers.children(build) if state(child)[0] == "SCHEDULED"])
    with workers.client() as client:
        client.set_flow_run_state(build, PrefectState(type=StateType.PAUSED, name="Suspended"))
    assert state(workers.ended(waiting[0].id))[0] == "CANCELLED"
    assert sorted(wait(lambda: table(workers, build)).values()) == ["Cancelled", *["at work when the build ended"] * 2]
    gate.touch()
    dataset = open_dataset(str(tmp_path / "out"))
    wait(lambda: sum(map(len, pending(dataset).values())) == len(dataset.hashes))
    assert state(workers.read(build)) == ("PAUSED", "Suspended")

    wait(lambda: not descendants(workers.processes["builds"].pid))  # else the worker may end: docs/deploying.md
    with workers.client() as client:
        client.resume_flow_run(build)
    assert state(workers.ended(build)) == ("COMPLETED", "Completed")
    assert (tmp_path / "out" / "demo" / "manifest.parquet").exists()
    names = [child.name for child in workers.children(build)]
    assert len(names) == 4, "the shard that waited got another run, the others did not"
    assert names.count(waiting[0].name) == 2


@flow(name="build-dataset")
def foreign(config: dict[str, Any]) -> None:
    """Somebody else's flow. It has the name of ours, and a deployment."""


def test_a_build_of_the_command_line_lives_and_holds_up_the_schedule(workers: Stack, tmp_path: Path) -> None:
    """The server hears of it, no automation takes it for dead, and a second build of its dataset gives way."""
    gate = tmp_path / "gate"
    wanted = config(tmp_path, [f"a until {gate}"])
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(wanted))
    command = [sys.executable, "-m", "resmaster_flows.cli.main", "run", str(tmp_path / "demo.yaml")]
    running = subprocess.Popen(
        command, env=workers.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait(lambda: begun_by(gate))
        with workers.client() as client:
            runs = [run for run in client.read_flow_runs() if run.name == "build demo"]
        (own,) = [run for run in runs if state(run)[0] == "RUNNING"]
        assert own.deployment_id is None
        (child,) = workers.children(own.id)

        second = workers.ended(workers.run("build-dataset/resmaster-build", config=wanted))
        assert state(second) == ("CANCELLED", "Skipped")
        assert second.state is not None
        assert f"the run build demo builds it already ({workers.api.removesuffix('/api')}" in str(second.state.message)
        assert str(own.id) in str(second.state.message)
        third = subprocess.run(command, env=workers.environment, capture_output=True, text=True, check=False)
        assert third.returncode == 2
        assert f"resmaster: {tmp_path}/out/demo: the run build demo builds it already" in third.stderr
        assert "Traceback" not in third.stderr

        zombies, repair = trigger("resmaster-zombies"), trigger("resmaster-repair-after-crash")
        beats = wait(lambda: found if len(found := events(workers, own.id, "prefect.flow-run.heartbeat")) > 1 else [])
        assert beats[1].occurred - beats[0].occurred < zombies.within, "the second beat comes in time"
        assert not any(map(zombies.covers, events(workers, own.id)))
        ours = wait(lambda: events(workers, child.id, "prefect.flow-run.heartbeat"))
        assert all(zombies.covers(event) and zombies.starts_after(event.event) for event in ours)
        assert all(map(zombies.covers, events(workers, child.id)))

        with workers.client() as client:
            theirs = client.create_deployment(flow_id=client.create_flow(foreign), name="theirs", tags=["billing"])
            other = client.create_flow_run_from_deployment(theirs, parameters={"config": {}}).id
            client.set_flow_run_state(other, Running())
            client.set_flow_run_state(other, Crashed())
            lost = workers.run("build-dataset/resmaster-build", config=wanted)
            client.set_flow_run_state(lost, Crashed(), force=True)
        crashed = wait(lambda: events(workers, other, "prefect.flow-run.Crashed"))
        assert not any(each.covers(event) for each in (zombies, repair) for event in events(workers, other))
        assert crashed
        with workers.client() as client:
            client.delete_deployment(theirs)
        assert all(map(repair.covers, wait(lambda: events(workers, lost, "prefect.flow-run.Crashed"))))
    finally:
        gate.touch()
        out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert out.startswith("report: ")
    assert table(workers, own.id) == {"demo: shards 0": "Completed"}
