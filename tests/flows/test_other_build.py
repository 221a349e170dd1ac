"""Which build of a dataset gives way to which, on a real server. The other runs are only states there."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.events import emit_event
from prefect.states import Completed, Crashed, Running, Suspended

from resmaster_flows import server_runs
from resmaster_flows.build import build_dataset
from resmaster_flows.outcome import outcome
from resmaster_flows.server_runs import other_build
from resmaster_stages.config.dataset import DispatchConfig
from resmaster_stages.errors import UserError
from tests.fake_stages import config_at
from tests.server.conftest import wait

pytestmark = pytest.mark.usefixtures("server")


@flow(name="build-dataset")
def build(config: dict[str, Any], begun: bool = True) -> str | None:
    """A build that only looks around."""
    return other_build(DispatchConfig(), f"{config['root']}/{config['name']}")


@flow(name="repair")
def repair(dataset_url: str, shards: str | None = None, stages: list[str] | None = None) -> None:
    """Stands for a repair elsewhere."""


@flow(name="backup")
def backup(dataset_url: str) -> None:
    """Somebody else's flow."""


def elsewhere(which: Any, **parameters: Any) -> UUID:
    """A run that reads Running on the server."""
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(which, parameters=parameters, state=Running())
        assert run.state is not None
        assert run.state.is_running()
        return run.id


def read(run: UUID) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run)


def config(root: Path, name: str = "demo") -> dict[str, Any]:
    return {"root": str(root), "name": name}


def test_a_build_gives_way_to_one_that_is_at_work(tmp_path: Path) -> None:
    assert build(config(tmp_path)) is None
    run = elsewhere(build, config=config(tmp_path))
    told = build(config(tmp_path))
    assert told is not None
    assert told.startswith(f"{tmp_path}/demo: the run {read(run).name} builds it already (http://")
    assert str(run) in told
    assert build(config(tmp_path, "other")) is None
    assert build(config(tmp_path / "elsewhere")) is None


@pytest.mark.parametrize("end", [Completed(), Crashed(), Suspended()], ids=["completed", "crashed", "suspended"])
def test_a_build_that_has_ended_or_is_suspended_holds_up_nobody(tmp_path: Path, end: Any) -> None:
    run = elsewhere(build, config=config(tmp_path))
    assert build(config(tmp_path)) is not None
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run, end, force=True)
    assert build(config(tmp_path)) is None


def test_a_repair_of_everything_counts_and_one_of_chosen_shards_does_not(tmp_path: Path) -> None:
    elsewhere(repair, dataset_url=f"{tmp_path}/demo", shards="0")
    elsewhere(repair, dataset_url=f"{tmp_path}/demo", stages=["quality"])
    elsewhere(backup, dataset_url=f"{tmp_path}/demo")
    elsewhere(repair, dataset_url="")
    assert build(config(tmp_path)) is None
    elsewhere(repair, dataset_url=f"{tmp_path}/demo/")
    assert build(config(tmp_path)) is not None


def test_of_two_that_start_at_once_the_first_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = server_runs._dataset_of
    met: list[UUID] = []

    def look(run: FlowRun) -> str | None:
        met.append(run.id)
        return original(run)

    monkeypatch.setattr(server_runs, "_dataset_of", look)

    @flow(name="build-dataset")
    def first(config: dict[str, Any]) -> str | None:
        second.append(elsewhere(build, config=config))
        return other_build(DispatchConfig(), f"{config['root']}/{config['name']}")

    second: list[UUID] = []
    assert first(config(tmp_path)) is None
    assert second[0] not in met, "later than the own run"


def test_a_dead_build_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process leaves a run that reads Running for ever. What counts is whether anything was heard of it."""
    run = elsewhere(build, config=config(tmp_path))
    began = server_runs._start(read(run))[0]
    before, after = began - timedelta(days=1), datetime.now(UTC) + timedelta(days=1)
    with get_client(sync_client=True) as client:
        assert server_runs._heard(client, read(run), before), "it began since then"
        assert not server_runs._heard(client, read(run), after)
        since = began + timedelta(microseconds=1)
        heartbeat = emit_event(
            "prefect.flow-run.heartbeat", resource={"prefect.resource.id": f"prefect.flow-run.{run}"}
        )
        assert heartbeat is not None
        wait(lambda: server_runs._heard(client, read(run), since))
    monkeypatch.setattr(server_runs, "SILENT_SECONDS", -1e6)
    assert build(config(tmp_path)) is None


def test_a_build_that_gives_way_is_skipped_and_the_command_line_says_why(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\n")
    wanted = config_at(tmp_path / "out", prompts=str(tmp_path / "prompts.txt"))
    elsewhere(build, config=config(tmp_path / "out", wanted.name))
    state = build_dataset(wanted, return_state=True)
    assert (state.type.value, state.name) == ("CANCELLED", "Skipped")
    with pytest.raises(UserError, match=r"builds it already .* wait for that run, or cancel it .* 2 minutes"):
        outcome(state)
    assert not (tmp_path / "out").exists(), "nothing was begun"
