"""The server on a socket, the verb `view`, and a dataset on S3."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest

from resmaster_flows.cli import view
from resmaster_flows.cli.main import main
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.curation import read_choices
from resmaster_stages.dataset.dataset import Dataset, open_dataset
from resmaster_stages.errors import UserError
from resmaster_stages.gallery.serve import serving
from tests.checkout import PYTHONPATH
from tests.fake_stages import planned
from tests.faulty_proxy import Rule, faulty, seeded
from tests.gallery.conftest import Opener
from tests.gallery.standin import built
from tests.gallery.test_images import stored
from tests.gallery.test_samples import manifest


@pytest.fixture(scope="module")
def address(made: Dataset) -> Iterator[str]:
    with serving(made, 0, "ann") as address:
        yield address


def asked(address: str, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Send a path as it is, which clients would tidy."""
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_it_answers_on_loopback_only(address: str) -> None:
    parts = urlsplit(address)
    assert parts.hostname == "127.0.0.1"
    assert len(parts.path) > 30, "the token"
    assert urlopen(f"{address}api/count").read() == b'{"total":6}'
    with pytest.raises(OSError, match=r"refused|unreachable|timed out"):
        socket.create_connection(("127.0.0.2", parts.port), timeout=5)


def test_every_server_has_a_token_of_its_own(made: Dataset, address: str) -> None:
    with serving(made, 0, "ann") as other:
        assert urlsplit(other).path != urlsplit(address).path


def test_paths_are_taken_as_they_are(made: Dataset, address: str) -> None:
    token = urlsplit(address).path
    for path in (
        "static/../page.py",
        "static/../../../pyproject.toml",
        "image/../../config.json/high/file",
        "../",
        "//",
    ):
        status, body = asked(address, token + path)
        assert status == 404, path
        assert b"def " not in body
    assert asked(address, "/../" + token)[0] == 404
    assert asked(address, token, Host="evil.example")[0] == 404
    assert asked(address, token, Host=urlsplit(address).netloc)[0] == 200
    assert asked(address, f"{token}?x=\x01".replace("\x01", "%01"))[0] == 200


def test_requests_that_are_none_do_not_end_the_server(address: str) -> None:
    parts = urlsplit(address)
    for text in (
        b"\0\0\0\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET " + b"x" * 200_000,
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ):
        with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
            connection.sendall(text)
            with suppress(OSError):  # the server has hung up already
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass
    status, body = asked(
        address, f"{parts.path}api/choices", "POST", b"x", Content_Type="application/json", Content_Length=str(10**12)
    )
    assert status == 413, body
    assert urlopen(f"{address}api/count").read() == b'{"total":6}'


def test_a_port_that_is_taken(made: Dataset, address: str) -> None:
    port = urlsplit(address).port
    with pytest.raises(UserError, match=f"port {port} cannot be used .*choose another --port"), serving(made, port, ""):
        pass


def test_nothing_is_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = planned(tmp_path / "out", ["a"], tmp_path)
    assert main(["view", dataset.url]) == 2
    assert capsys.readouterr().err.replace("\n", " ").endswith(f"run: resmaster publish {dataset.url} ")
    assert main(["view", str(tmp_path / "nothing")]) == 2


@pytest.mark.parametrize("port", ["-1", "80", "65536"])
def test_a_port_that_is_none(made: Dataset, capsys: pytest.CaptureFixture[str], port: str) -> None:
    assert main(["view", made.url, "--port", port]) == 2
    assert "from 1024 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_verb_runs_until_a_signal(own: Dataset, stop: signal.Signals, status: int) -> None:
    command = [sys.executable, "-m", "resmaster_flows.cli.main", "view", own.url, "--no-open", "--who", "ann"]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # what a shell starts in the background, tests included, ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"view: (http://127\.0\.0\.1:\d+/[\w-]{32}/)\n", line)
        assert found, line
        key = manifest(own)[0]["key"]
        body = f'{{"choices": [{{"key": "{key}", "verdict": "kept"}}]}}'.encode()
        path = f"{urlsplit(found[1]).path}api/choices"
        assert (
            asked(found[1], path, "POST", body, Content_Type="application/json", Content_Length=str(len(body)))[0]
            == 200
        )
        kept_open = http.client.HTTPConnection(urlsplit(found[1]).netloc, timeout=30)
        kept_open.request("GET", f"{urlsplit(found[1]).path}api/count")
        assert kept_open.getresponse().read() == b'{"total":6}'
        process.send_signal(stop)
        out, err = process.communicate(timeout=60)
        kept_open.close()
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (status, "")
    assert err.endswith("interrupted; what is done is kept: run the same command again to go on\n")
    assert "Traceback" not in err
    assert read_choices(own.folder)[key].who == "ann"


STUCK = """
import sys, threading
from resmaster_flows.cli.main import main
from resmaster_stages.storage.filesystem import Folder

Folder.read_part = lambda *_: print("reads", flush=True) or threading.Event().wait(600)
sys.exit(main())
"""


def test_a_store_that_never_answers_does_not_keep_it_alive(own: Dataset) -> None:
    command = [sys.executable, "-c", STUCK, "view", own.url, "--no-open"]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        address = urlsplit(process.stdout.readline().removeprefix("view: ").strip())
        waiting = http.client.HTTPConnection(address.netloc, timeout=60)
        waiting.request("GET", f"{address.path}image/{manifest(own)[0]['key']}/high/thumb/128")
        assert process.stdout.readline() == "reads\n"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
        waiting.close()
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 143
    assert err == "interrupted; what is done is kept: run the same command again to go on\n"


@pytest.mark.parametrize(
    ("words", "display", "opens"),
    [([], "", False), ([], ":0", True), (["--open"], "", True), (["--no-open"], ":0", False)],
)
def test_when_a_browser_opens(
    own: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    display: str,
    opens: bool,
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(view.webbrowser, "open", opened.append)
    monkeypatch.setattr(view.threading.Event, "wait", stop_in_view(threading.Event.wait))
    assert main(["view", own.url, *words]) == 130
    address = capsys.readouterr().out.removeprefix("view: ").strip()
    assert opened == ([address] if opens else [])


def stop_in_view(wait: Any) -> Any:
    """The wait of the verb ends as by Ctrl-C; those of its threads wait."""

    def stopped(self: threading.Event, timeout: float | None = None) -> bool:
        if threading.current_thread() is threading.main_thread() and sys._getframe(1).f_globals is view.__dict__:
            raise KeyboardInterrupt
        return bool(wait(self, timeout))

    return stopped


# ----------------------------------------------------------------------------------------------------------------------
# on S3


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """(operation, key, range) of the S3 calls of this process."""
    from aiobotocore.client import AioBaseClient

    found: list[tuple[str, str, str]] = []
    call = AioBaseClient._make_api_call

    async def noted(self: Any, operation: str, asked: dict[str, Any]) -> Any:
        found.append((operation, str(asked.get("Key", "")), str(asked.get("Range", ""))))
        return await call(self, operation, asked)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", noted)
    return found


@pytest.mark.s3
def test_on_s3_only_the_bytes_of_an_image_are_read(
    s3_root: str, tmp_path: Path, opened: Opener, calls: list[tuple[str, str, str]]
) -> None:
    dataset = open_dataset(built(s3_root, tmp_path, side=256).url)
    rows = manifest(dataset)
    _, client = opened(dataset)
    calls.clear()
    row = rows[1]
    key = row["key"]
    data = dataset.folder.read_part(row["high_res_object"], row["high_res_offset"], row["high_res_bytes"])
    assert client.get(f"image/{key}/high/file").content == data
    for _ in range(2):
        for what in ("high/thumb/128", "high/thumb/512", "low/thumb/256", "high/tile/8/0_0", "high/tile/3/0_0"):
            assert client.get(f"image/{key}/{what}").status_code == 200
        assert client.get(f"api/sample/{key}").json()["facts"]["size"] == 256
    tars = [call for call in calls if call[1].endswith(".tar")]
    first, last = row["high_res_offset"], row["high_res_offset"] + row["high_res_bytes"] - 1
    assert all(operation == "GetObject" and asked.startswith("bytes=") for operation, _, asked in tars), tars
    high = [asked for _, name, asked in tars if name.endswith(row["high_res_object"])]
    assert high.count(f"bytes={first}-{last}") == 4, "by the test, for the file, for thumbnails, and for tiles"
    assert len(high) == 4 + 2, "and the facts, twice"
    assert sum(map(length, high)) < dataset.folder.size(row["high_res_object"])  # type: ignore[operator]


def length(asked: str) -> int:
    first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups()  # type: ignore[union-attr]
    return int(last) - int(first) + 1


@pytest.mark.s3
def test_on_s3_choices_are_kept_and_a_refusal_is_told(
    s3_root: str, tmp_path: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    dataset = built(s3_root, tmp_path)
    key = manifest(dataset)[0]["key"]
    with faulty(os.environ["AWS_ENDPOINT_URL"], seeded([])) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        _, client = opened(open_dataset(dataset.url))
        post = {"choices": [{"key": key, "verdict": "rejected"}]}
        assert client.post("api/choices", json=post).status_code == 200
        assert read_choices(dataset.folder)[key].verdict == "rejected"
        proxy.choose = seeded([Rule("access denied")])
        for path in (f"image/{key}/high/thumb/128", f"api/sample/{key}", "api/dataset", "api/choices.csv"):
            answer = client.get(path)
            assert answer.status_code == 502, path
            assert "lack the right" in answer.json()["error"]
        answer = client.post("api/choices", json={"choices": [{"key": key, "verdict": "kept"}]})
        assert answer.status_code == 502
        assert client.get("api/samples?verdict=rejected").json()["total"] == 1
        proxy.choose = seeded([])
        assert client.get(f"image/{key}/high/thumb/128").status_code == 200
        assert client.get("api/dataset").json()["choices"] == {"kept": 0, "rejected": 1, "rated": 0}
    assert read_choices(dataset.folder)[key].verdict == "rejected"


def test_the_dataset_is_only_read(made: Dataset, opened: Opener) -> None:
    """Whatever is asked for, no file of the dataset changes but choices."""

    def state() -> dict[str, tuple[int, float]]:
        return {file.name: (file.bytes, file.modified.timestamp()) for file in made.folder.files()}

    before = state()
    _, client = opened(made)
    key = manifest(made)[0]["key"]
    for path in (
        "",
        "api/dataset",
        "api/samples",
        f"api/sample/{key}",
        "api/failed",
        "api/choices.csv",
        "api/near_duplicates",
    ):
        assert client.get(path).status_code == 200
    for kind in ("high", "low"):
        for what in ("file", "thumb/128", "tile/3/0_0"):
            assert client.get(f"image/{key}/{kind}/{what}").status_code == 200
    assert client.get(f"image/{key}/high/file").content == stored(made, manifest(made)[0])
    assert state() == before
    assert not made.folder.names(layout.CURATION)
