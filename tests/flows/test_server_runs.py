"""What the command line says when the server, or what should be on it, is not there. Settings only: no server is
started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
import yaml
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE, temporary_settings

from resmaster_flows.cli.main import main
from resmaster_flows.server_runs import on_workers, server_within_reach
from resmaster_stages.config.dataset import DispatchConfig
from resmaster_stages.errors import UserError

NOBODY = "http://127.0.0.1:9/api"


def test_a_server_that_does_not_answer_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a red house\n")
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump({"name": "demo", "prompts": "prompts.txt"}))
    with temporary_settings({PREFECT_API_URL: NOBODY}):
        assert main(["run", str(tmp_path / "demo.yaml"), "--root", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"resmaster: {NOBODY}: no answer (")
    assert lines[-1].endswith("start the server, or unset PREFECT_API_URL to do without one")
    assert not (tmp_path / "out").exists(), "nothing was begun"


def test_a_server_that_goes_away_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        def api_healthcheck(self) -> None:
            return None

    monkeypatch.setattr("resmaster_flows.server_runs.get_client", lambda sync_client: Client())
    with (
        temporary_settings({PREFECT_API_URL: NOBODY}),
        pytest.raises(ConnectionError, match=r"lost .*run the same command again"),
        server_within_reach(),
    ):
        raise httpx.ConnectError("connection refused")


def test_work_goes_to_workers_where_a_server_is_configured() -> None:
    with temporary_settings({PREFECT_API_URL: NOBODY}):
        assert on_workers(DispatchConfig())
        assert not on_workers(DispatchConfig(where="here"))
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert not on_workers(DispatchConfig())
        assert on_workers(DispatchConfig(where="workers"))


class Temporary:
    """Stands in for Prefect's temporary server: answers slowly at its first `slow` starts."""

    slow = 0
    events: ClassVar[list[str]] = []

    def start(self) -> None:
        self.events.append("start")
        if self.events.count("start") <= self.slow:
            raise httpx.ReadTimeout("timed out")

    def stop(self) -> None:
        self.events.append("stop")


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Temporary]]:
    monkeypatch.setattr("resmaster_flows.server_runs.SubprocessASGIServer", Temporary)
    monkeypatch.setattr(Temporary, "events", [])
    with temporary_settings({PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: True}, restore_defaults={PREFECT_API_URL}):
        yield Temporary


def test_a_temporary_server_that_answers_slowly_is_started_again(
    temporary: type[Temporary], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(temporary, "slow", 2)
    with server_within_reach():
        assert temporary.events == ["start", "stop"] * 2 + ["start"]
    monkeypatch.setattr(temporary, "slow", 9)
    with (
        pytest.raises(ConnectionError, match="3 times; try again when this machine is less busy"),
        server_within_reach(),
    ):
        pass
    assert temporary.events[-1] == "stop"


def test_errors_of_the_work_itself_pass(temporary: type[Temporary]) -> None:
    with pytest.raises(UserError, match="own"), server_within_reach():
        raise UserError("own")
    assert temporary.events == ["start"]


def test_a_temporary_server_is_not_started_against_the_settings(temporary: type[Temporary]) -> None:
    with (
        temporary_settings({PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: False}),
        pytest.raises(UserError, match="set PREFECT_API_URL"),
        server_within_reach(),
    ):
        pass
    assert temporary.events == []
