"""A root of many datasets in the browser: its overview, the gallery of each below its name, and who may look."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from starlette.testclient import TestClient

from resmaster_flows.cli import view
from resmaster_flows.cli.main import main
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.curation import read_choices
from resmaster_stages.dataset.dataset import Dataset, dataset_or_root, open_dataset
from resmaster_stages.errors import UserError
from resmaster_stages.gallery import root as module
from resmaster_stages.gallery.guard import HEADERS, Guard
from resmaster_stages.gallery.root import RootServer
from resmaster_stages.gallery.serve import serving
from resmaster_stages.publish.publish import publish
from resmaster_stages.storage.filesystem import Folder, open_root
from tests.browser import Browser, chromium
from tests.gallery.conftest import BASE, PORT, TOKEN
from tests.inspection.several import made, several, work
from tests.test_security import ATTACKS

Client = Callable[[Folder], TestClient]
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def client() -> Iterator[Client]:
    """Makes clients of servers of roots."""
    with ExitStack() as stack:

        def start(root: Folder) -> TestClient:
            server = RootServer(root, "ann")
            stack.callback(server.close)
            return TestClient(Guard(server.app, TOKEN, PORT), base_url=BASE, follow_redirects=False)

        yield start


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Five datasets, which tests only read."""
    folder = tmp_path_factory.mktemp("root")
    several(folder / "out", folder)
    return open_root(str(folder / "out"))


def test_the_overview_leads_to_the_gallery_of_each_published_dataset(root: Folder, client: Client) -> None:
    asks = client(root)
    page = asks.get("").text
    links = re.findall(r'<th scope="row"><a href="([^"]+)">([^<]+)</a>', page)
    assert links == [("damaged/", "damaged"), ("failing/", "failing"), ("done/", "done")]
    assert page.index("1 commit damaged") < page.index("1 shard failed") < page.index("nothing committed yet")
    for link, name in links:
        assert f"<h1>{name}</h1>" in asks.get(link).text
        assert 'href="../"' in asks.get(link).text
        assert asks.get(f"{link}api/dataset").json()["name"] == name
    assert asks.get("done/api/count").json() == {"total": 6}
    key = asks.get("done/api/samples").json()["samples"][0]["key"]
    assert asks.get(f"done/image/{key}/high/thumb/128").headers["Content-Type"] == "image/jpeg"


def test_a_gallery_of_one_dataset_has_no_way_up(root: Folder) -> None:
    dataset = open_dataset(f"{root.url}/done")
    with serving(dataset, 0, "ann") as address, urlopen(address) as answer:
        assert b"All datasets" not in answer.read()


def test_choices_go_to_the_dataset_that_is_looked_at(tmp_path: Path, client: Client) -> None:
    datasets = [made(tmp_path / "out", tmp_path, name, "ab") for name in ("one", "two")]
    asks = client(open_root(str(tmp_path / "out")))
    key = datasets[1].plan.keys_of(0)[0]
    body = {"choices": [{"key": key, "verdict": "rejected"}]}
    assert asks.post("two/api/choices", json=body, headers={"Origin": "http://evil.example"}).status_code == 403
    assert asks.post("two/api/choices", json=body).status_code == 200
    assert [len(read_choices(dataset.folder)) for dataset in datasets] == [0, 1]


@pytest.mark.parametrize("path", ["", "done/", "done/api/count", "nothing/", "-/look.css", "-/nothing", "new/"])
def test_every_answer_has_the_headers_and_needs_the_token(root: Folder, client: Client, path: str) -> None:
    asks = client(root)
    answer = asks.get(path)
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    for address in (f"http://127.0.0.1:{PORT}/{path}", f"http://127.0.0.1:{PORT}/{TOKEN}x/{path}"):
        answer = asks.get(address)
        assert (answer.status_code, answer.content) == (404, b"")
    assert asks.get(path, headers={"Host": "evil.example"}).content == b""


@pytest.mark.parametrize(
    "name",
    ["%2e%2e", "..%2f..%2fetc", "%2e", "nothing", "%00", "é", "a" * 5000, "done%2f..", ".hidden", "notes.txt", "-x"],
)
def test_names_are_no_paths(tmp_path: Path, client: Client, name: str) -> None:
    made(tmp_path / "out", tmp_path, "done", "ab")
    made(tmp_path / "out", tmp_path, "x", "ab")
    (tmp_path / "out" / "notes.txt").write_text("secret")
    (tmp_path / "out" / "x").rename(tmp_path / "out" / ".hidden")
    asks = client(open_root(str(tmp_path / "out")))
    for path in (f"{name}/", f"{name}/api/dataset", f"{name}/static/%2e%2e/%2e%2e/config.json"):
        answer = asks.get(f"{BASE}{path}")
        assert answer.status_code == 404, path
        assert "secret" not in answer.text
    assert asks.get(f"{BASE}{name}/api/dataset").headers["Content-Type"] == "application/json"


def test_addresses_without_their_last_slash_and_with_two(root: Folder, client: Client) -> None:
    asks = client(root)
    answer = asks.get("done")
    assert (answer.status_code, answer.headers["Location"]) == (308, "./done/")
    assert asks.get("javascript:alert(1)").headers["Location"].startswith("./")
    assert "<h1>done</h1>" in asks.get(f"{BASE}/done/").text, "the printed address ends with a slash"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", ["", "-/look.css"])
def test_other_methods_do_nothing(root: Folder, client: Client, method: str, path: str) -> None:
    assert client(root).request(method, path, headers=JSON, content=b"{}").status_code == 405


def test_what_is_not_published_is_said_until_it_is(tmp_path: Path, client: Client) -> None:
    dataset = made(tmp_path / "out", tmp_path, "new", "abcd", 1)
    asks = client(open_root(str(tmp_path / "out")))
    answer = asks.get("new/")
    assert answer.status_code == 404
    assert f"{dataset.url}: nothing is published yet" in answer.text
    assert 'http-equiv="refresh"' in answer.text
    assert asks.get("new/api/count").json()["error"].endswith("nothing is published yet")
    publish(dataset)
    assert asks.get("new/").status_code == 200
    assert asks.get("new/api/count").json() == {"total": 2}
    work(dataset, [1])
    publish(dataset)
    assert asks.get("new/api/count").json() == {"total": 2}, "a page that is open stays as it is"
    assert asks.get("new/").status_code == 200
    assert asks.get("new/api/count").json() == {"total": 4}, "and shows what was published when it is loaded again"


def test_few_galleries_are_open_at_a_time(tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GALLERIES", 2)
    closed: list[str] = []
    close = module._Open.close
    monkeypatch.setattr(module._Open, "close", lambda self: closed.append(self.name) or close(self))
    for name in ("a", "b", "c"):
        made(tmp_path / "out", tmp_path, name, "ab")
    asks = client(open_root(str(tmp_path / "out")))
    for name in ("a", "b", "a", "c"):
        assert asks.get(f"{name}/api/count").json() == {"total": 2}
    assert asks.get("b/api/count").json() == {"total": 2}
    assert closed[:2] == ["b", "a"], "the one that was asked for longest ago"


def test_an_empty_root(tmp_path: Path, client: Client) -> None:
    (tmp_path / "out").mkdir()
    asks = client(open_root(str(tmp_path / "out")))
    assert "There is no dataset here yet" in asks.get("").text
    assert f"resmaster run CONFIG --root {tmp_path}/out" in asks.get("").text


def test_a_bad_dataset_costs_a_line(tmp_path: Path, client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "out", tmp_path, "good", "ab")
    bad = made(tmp_path / "out", tmp_path, "bad", "ab")
    Path(bad.folder.full(layout.CONFIG)).write_text("{")
    asks = client(open_root(str(tmp_path / "out")))
    page = asks.get("").text
    assert 'href="good/"' in page
    assert "bad/config.json: damaged" in page
    assert asks.get("bad/").status_code == 400
    assert "damaged" in asks.get("bad/").text
    assert asks.get("good/").status_code == 200


def test_a_root_that_cannot_be_read_is_said(root: Folder, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = client(root)

    def down(*_: object) -> None:
        raise ConnectionError("the store does not answer")

    monkeypatch.setattr(module, "overview", down)
    answer = asks.get("")
    assert answer.status_code == 502
    assert "the store does not answer" in answer.text


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_names_of_folders(tmp_path: Path, client: Client, attack: str) -> None:
    name = attack.replace("/", "_").replace("\0", "_").encode("utf-8", "replace").decode()[:60]
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "file").write_text("x")
    page = client(open_root(str(tmp_path / "out"))).get("").text
    assert "Other folders" in page
    assert "<script" not in page
    assert "<img" not in page


@pytest.mark.parametrize("token", ["short", "x" * 31, "x" * 31 + "/", "x" * 31 + "é", "x" * 201])
def test_a_token_that_can_be_guessed(root: Folder, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="give 32 or more"), serving(root, 0, "ann", token):
        pass
    monkeypatch.setenv("RESMASTER_VIEW_TOKEN", token)
    assert main(["view", root.url, "--no-open"]) == 2


def test_a_token_and_a_port_of_ones_own(
    root: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token = "t" * 32
    with serving(root, 0, "ann") as address:
        port = urlsplit(address).port
    asked: list[str] = []

    class Wait:
        def wait(self) -> None:
            asked.append(urlopen(capsys.readouterr().out.removeprefix("view: ").strip()).read().decode())
            raise KeyboardInterrupt

    monkeypatch.setattr(view, "threading", SimpleNamespace(Event=Wait))
    monkeypatch.setenv("RESMASTER_VIEW_TOKEN", token)
    assert main(["view", root.url, "--no-open", "--port", str(port)]) == 130
    assert "5 datasets" in asked[0]


def test_what_the_command_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = made(tmp_path / "out", tmp_path, "one", "ab")
    assert isinstance(dataset_or_root(dataset.url), Dataset)
    assert isinstance(dataset_or_root(str(tmp_path / "out")), Folder)
    assert main(["view", str(tmp_path / "nothing")]) == 2
    assert "no dataset here" in capsys.readouterr().err
    Path(dataset.folder.full(layout.CONFIG)).unlink()
    assert main(["view", dataset.url]) == 2
    assert "config.json is gone" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.s3
def test_a_root_on_s3(s3_root: str, tmp_path: Path, client: Client) -> None:
    assert "There is no dataset here yet" in client(open_root(s3_root)).get("").text
    made(s3_root, tmp_path, "done", "abcd")
    asks = client(open_root(s3_root))
    assert 'href="done/"' in asks.get("").text
    assert asks.get("done/api/count").json() == {"total": 4}
    key = asks.get("done/api/samples").json()["samples"][0]["key"]
    assert asks.get(f"done/image/{key}/low/file").status_code == 200


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="there is no Chromium here; on Debian: apt-get install chromium")
def test_the_pages_in_a_browser(root: Folder, tmp_path: Path) -> None:
    """On a desk and a telephone, by day and by night: nothing is wider than the screen, and nothing fails."""
    (tmp_path / "none").mkdir()
    with (
        Browser(1280, 800) as browser,
        serving(root, 0, "ann") as address,
        serving(open_root(str(tmp_path / "none")), 0, "ann") as empty,
    ):
        browser.watch()
        for width in (1280, 400):
            browser.resize(width, 800)
            for scheme in ("light", "dark"):
                feature = {"name": "prefers-color-scheme", "value": scheme}
                browser.command("Emulation.setEmulatedMedia", features=[feature])
                browser.open(address)
                text = browser.wait_for("1 commit damaged", "1 shard failed", "nothing committed yet", "done")
                assert "5 datasets" in text
                assert browser.evaluate("document.documentElement.scrollWidth") <= width
                painted = "getComputedStyle(document.body).backgroundColor"  # by the style sheet, once it is there
                paper = json.dumps(browser.until(f"{painted} !== 'rgba(0, 0, 0, 0)' && {painted}"))
                assert ("rgb(22" in paper) == (scheme == "dark")
        browser.open(empty)
        browser.wait_for("There is no dataset here yet")
        browser.open(address)
        browser.click("failing")
        browser.wait_for("All datasets", "samples")
        browser.click("All datasets")
        browser.wait_for("5 datasets")
        assert browser.faults == []
