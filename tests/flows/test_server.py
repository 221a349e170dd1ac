"""What the command line says when the server, or what should be on it, is not there. Settings only: no server is
started."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import yaml
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_DEFAULT_RESULT_STORAGE_BLOCK,
    temporary_settings,
)

from resmaster_flows.cli.main import main
from resmaster_flows.server import (
    require_answer,
    require_result_storage,
    server_within_reach,
)
from resmaster_flows.server_runs import on_workers
from resmaster_stages.config.dataset import DispatchConfig
from resmaster_stages.errors import UserError
from tests.checkout import PYTHONPATH

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

    monkeypatch.setattr("resmaster_flows.server.get_client", lambda sync_client: Client())
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


def test_errors_of_the_work_itself_pass() -> None:
    with pytest.raises(UserError, match="own"), server_within_reach():
        raise UserError("own")


SETTINGS = [
    ("PREFECT_API_URL", "localhost:4200", "PREFECT_API_URL: localhost:4200 has no http:// or https://"),
    ("PREFECT_API_REQUEST_TIMEOUT", "soon", r"Prefect's settings cannot be used \(APISettings: request_timeout: .*"),
    ("PREFECT_LOGGING_LEVEL", "loud", r"Prefect's settings cannot be used \(LoggingSettings: level: .*"),
    ("PREFECT_PROFILE", "nobody", "PREFECT_PROFILE: Prefect has no profile 'nobody'; known: .*"),
    (
        "PREFECT_API_URL",
        "http://127.0.0.1:abc/api",
        r"http://127.0.0.1:abc/api: cannot be asked \(Invalid port: 'abc'\); .*",
    ),
    ("PREFECT_API_URL", "http://a..b/api", r"http://a..b/api: (cannot be asked|no answer) \(.*\); .*"),
    ("PREFECT_API_KEY", "caf\u00e9", r"http://127.0.0.1:9/api: cannot be asked \(.*\); check .*PREFECT_API_KEY, .*"),
    ("ALL_PROXY", "nonsense://127.0.0.1:1", r"http://127.0.0.1:9/api: cannot be asked \(.*\); .* proxy .*"),
    ("SSL_CERT_FILE", "nowhere.pem", r"https?://127.0.0.1:9/api: cannot be asked \(.*\); .* certificate"),
]


@pytest.mark.parametrize(("name", "value", "message"), SETTINGS)
def test_settings_of_prefect_that_do_not_fit_are_one_line(name: str, value: str, message: str, tmp_path: Path) -> None:
    """Said before anything is started or written. In a process of its own, because Prefect reads settings once."""
    (tmp_path / "prompts.txt").write_text("a red house\n")
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump({"name": "demo", "prompts": "prompts.txt"}))
    environment = {
        name: value for name, value in os.environ.items() if not name.lower().startswith(("prefect_", "no_proxy"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "resmaster_flows.cli.main", "run", "demo.yaml", "--root", "out"],
        cwd=tmp_path,
        env={
            **environment,
            "PREFECT_API_URL": NOBODY,
            "PYTHONPATH": PYTHONPATH,
            "PREFECT_HOME": str(tmp_path / "prefect"),
            "COLUMNS": "500",
            name: value,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert re.fullmatch(f"resmaster: {message}\n", done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


def test_a_block_for_results_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def missing() -> None:
        asked.append(1)
        raise ValueError("Unable to find block document named nosuch for block type s3-bucket")

    monkeypatch.setattr("resmaster_flows.server.get_default_result_storage", missing)
    with temporary_settings({PREFECT_API_URL: NOBODY}):
        require_result_storage()
    with temporary_settings(
        {PREFECT_DEFAULT_RESULT_STORAGE_BLOCK: "s3-bucket/nosuch"}, restore_defaults={PREFECT_API_URL}
    ):
        require_result_storage()
    assert asked == [], "without the setting nothing is asked, and without a server nobody"
    with (
        temporary_settings({PREFECT_API_URL: NOBODY, PREFECT_DEFAULT_RESULT_STORAGE_BLOCK: "s3-bucket/nosuch"}),
        pytest.raises(UserError, match=r"RESULT_STORAGE_BLOCK s3-bucket/nosuch cannot be used .*nosuch.*; unset it"),
    ):
        require_result_storage()


@pytest.mark.parametrize(
    ("health", "status", "body", "reason"),
    [
        (200, 401, b'{"exception_message": "Unauthorized"}', "^401 Unauthorized$"),
        (200, 200, b"<html>", "JSON|Expecting|parse"),
        (200, 200, b'"2.20.0"', "incompatible"),
        (404, 404, b"", "^404 Not Found$"),
        (403, 403, b"<html>", "^403 Forbidden$"),
    ],
)
def test_a_server_that_cannot_be_used_is_one_line(health: int, status: int, body: bytes, reason: str) -> None:
    """A wrong password, a page of something else, another version, an address without /api, another kind of server."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked_first = self.path.endswith("/health")
            self.send_response(health if asked_first else status)
            self.end_headers()
            self.wfile.write(b"true" if asked_first else body)

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with (
            temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{server.server_port}/api"}),
            pytest.raises(UserError, match=r"no Prefect server that can be used .*PREFECT_API_KEY") as raised,
        ):
            require_answer()
        told = re.search(r"can be used \((.*)\); check", str(raised.value))
        assert told
        assert re.search(reason, told[1])
    finally:
        server.shutdown()
        server.server_close()
