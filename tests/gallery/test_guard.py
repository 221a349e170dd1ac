"""Who is answered at all, and what stands in every answer."""

import pytest
from starlette.testclient import TestClient

from resmaster_stages.gallery import guard
from resmaster_stages.gallery.guard import HEADERS
from tests.gallery.conftest import BASE, PORT, TOKEN

ADDRESSES = ["", "api/dataset", "api/samples", "api/nothing", "api/choices.csv", "static/nothing.js"]
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "path", ["/", "/api/dataset", "/other/", f"/{TOKEN}x/", f"/{TOKEN[:-1]}/", f"//{TOKEN}/", "/é/"]
)
def test_without_the_token_there_is_nothing(client: TestClient, path: str) -> None:
    answer = client.get(f"http://127.0.0.1:{PORT}{path}")
    assert (answer.status_code, answer.content) == (404, b"")


@pytest.mark.parametrize("host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1", "127.0.0.1:1", ""])
def test_another_host_is_nothing(client: TestClient, host: str) -> None:
    """A page of evil.example whose name was made to lead to this machine."""
    answer = client.get("api/dataset", headers={"Host": host})
    assert (answer.status_code, answer.content) == (404, b"")


@pytest.mark.parametrize("host", [f"localhost:{PORT}", f"[::1]:{PORT}", f"127.0.0.1:{PORT}"])
def test_names_of_this_machine(client: TestClient, host: str) -> None:
    assert client.get("api/count", headers={"Host": host}).json() == {"total": 6}


def test_two_hosts_are_nothing(client: TestClient) -> None:
    headers = [("Host", f"127.0.0.1:{PORT}"), ("Host", "evil.example")]
    assert client.get("api/count", headers=headers).status_code == 404


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", f"https://127.0.0.1:{PORT}", "http://127.0.0.1:1", ""]
)
def test_another_page_cannot_write(client: TestClient, origin: str) -> None:
    answer = client.post("api/choices", json={"choices": []}, headers={"Origin": origin})
    assert answer.status_code == 403
    assert "only the page of this server" in answer.json()["error"]


def test_our_own_page_can_write(client: TestClient) -> None:
    for headers in ({}, {"Origin": f"http://127.0.0.1:{PORT}"}):
        assert client.post("api/choices", json={"choices": []}, headers=headers).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_form_cannot_write(client: TestClient, kind: str) -> None:
    answer = client.post("api/choices", content=b'{"choices": []}', headers={"Content-Type": kind})
    assert answer.status_code == 415


def test_a_body_that_is_too_long(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_BYTES", 100)
    monkeypatch.setattr("resmaster_stages.gallery.app.BODY_BYTES", 100)
    told = client.post("api/choices", content=b" " * 101, headers=JSON)
    untold = client.post("api/choices", content=iter([b" " * 60, b" " * 60]), headers=JSON)
    assert (told.status_code, untold.status_code) == (413, 413)
    assert "send less" in told.json()["error"]
    assert client.post("api/choices", content=b'{"choices": []}', headers=JSON).status_code == 200


@pytest.mark.parametrize("path", ADDRESSES)
def test_every_answer_has_the_headers(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert answer.headers["Cache-Control"] == "no-store"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "unsafe" not in answer.headers["Content-Security-Policy"]


def test_the_address_without_its_last_slash(client: TestClient) -> None:
    answer = client.get(BASE[:-1])
    assert (answer.status_code, answer.headers["Location"]) == (308, f"/{TOKEN}/")


@pytest.mark.parametrize(
    "path",
    [
        "static/%2e%2e/page.py",
        "static/..%2f..%2fgallery%2fpage.py",
        "static//etc/passwd",
        "static/vendor%2f..%2f..%2fpage.py",
        "static/%00",
        "static/%2e",
    ],
)
def test_names_of_files_are_no_paths(client: TestClient, path: str) -> None:
    answer = client.get(f"{BASE}{path}")
    assert answer.status_code == 404
    assert "error" in answer.json()


@pytest.mark.parametrize(
    "key", ["%2e%2e", "..%2f..%2fconfig.json", "%2e%2e%2fconfig.json", "/etc/passwd", "%00", "é", "a" * 5000]
)
@pytest.mark.parametrize("what", ["image/{}/high/file", "image/{}/high/thumb/128", "api/sample/{}"])
def test_keys_are_no_paths(client: TestClient, what: str, key: str) -> None:
    answer = client.get(f"{BASE}{what.format(key)}")
    assert answer.status_code == 404
    assert "error" in answer.json()
    assert len(answer.content) < 300


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", ["api/choices", "api/dataset", ""])
def test_other_methods_do_nothing(client: TestClient, method: str, path: str) -> None:
    answer = client.request(method, path, headers=JSON, content=b"{}")
    assert answer.status_code == 405
    assert "error" in answer.json()
