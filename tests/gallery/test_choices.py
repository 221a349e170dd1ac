"""Choices over HTTP: durable before the answer, of one person, beside those of others, and never half."""

import threading
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.curation import Choice, Session, now, read_choices
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.errors import UserError
from resmaster_stages.gallery import choices as choices_module
from resmaster_stages.inspection.choice_files import read_choice_file
from resmaster_stages.storage.filesystem import Folder
from tests.gallery.conftest import Opener
from tests.gallery.test_samples import found, manifest


def post(client: TestClient, *choices: dict[str, Any]) -> Any:
    return client.post("api/choices", json={"choices": choices})


def keys(dataset: Dataset) -> list[str]:
    return [row["key"] for row in manifest(dataset)]


def test_a_choice_is_durable_and_counts_at_once(own: Dataset, opened: Opener) -> None:
    one, two, three, *_ = keys(own)
    _, client = opened(own)
    answer = post(client, {"key": one, "verdict": "rejected", "reason": "six fingers"}, {"key": two, "rating": 4})
    assert answer.json() == {"choices": {"kept": 0, "rejected": 1, "rated": 1}}
    kept = read_choices(own.folder)
    assert (kept[one].verdict, kept[one].reason, kept[one].who) == ("rejected", "six fingers", "ann")
    assert (kept[two].verdict, kept[two].rating) == ("none", 4)
    assert found(client, verdict="rejected") == [0]
    assert found(client, verdict="none") == [1, 2, 3, 4, 5]
    assert found(client, rating="4") == [1]
    assert found(client, where="reason = 'six fingers'") == [0]
    sample = client.get(f"api/sample/{one}").json()
    assert (sample["verdict"], sample["rating"], sample["reason"]) == ("rejected", None, "six fingers")
    assert post(client, {"key": three, "verdict": "kept"}).json()["choices"] == {"kept": 1, "rejected": 1, "rated": 1}
    assert len(own.folder.names(layout.CURATION)) == 1, "one file for the session"
    assert client.get("api/dataset").json()["choices"] == {"kept": 1, "rejected": 1, "rated": 1}


def test_what_a_choice_does_not_name_stays(own: Dataset, opened: Opener) -> None:
    key = keys(own)[0]
    _, client = opened(own)
    post(client, {"key": key, "verdict": "kept", "rating": 5, "reason": "sharp"})
    post(client, {"key": key, "rating": 2})
    assert read_choices(own.folder)[key].verdict == "kept"
    assert read_choices(own.folder)[key].reason == "sharp"
    post(client, {"key": key, "verdict": "none", "rating": None})
    assert read_choices(own.folder) == {}
    assert found(client, verdict="none") == [0, 1, 2, 3, 4, 5]


def test_choices_of_others_are_kept_and_count_when_the_page_is_loaded(own: Dataset, opened: Opener) -> None:
    one, two, three, *_ = keys(own)
    _, client = opened(own)
    post(client, {"key": one, "verdict": "rejected"})
    other = Session(own.folder)
    other.add([Choice(one, "kept", who="bob", when=now()), Choice(two, "rejected", who="bob", when=now())])
    assert found(client, verdict="rejected") == [0]
    assert client.get("api/dataset").json()["choices"] == {"kept": 1, "rejected": 1, "rated": 0}
    assert found(client, verdict="rejected") == [1]
    post(client, {"key": three, "verdict": "kept"})
    assert {key: choice.who for key, choice in read_choices(own.folder).items()} == {
        one: "bob",
        two: "bob",
        three: "ann",
    }
    other.add([Choice(two, "none", who="bob", when=now())])
    client.get("api/dataset")
    assert found(client, verdict="kept") == [0, 2]
    assert found(client, verdict="none") == [1, 3, 4, 5]


def test_many_who_choose_at_once_lose_nothing(own: Dataset, opened: Opener) -> None:
    _, client = opened(own)
    threads = [
        threading.Thread(target=post, args=(client, {"key": key, "rating": number % 5 + 1}))
        for number, key in enumerate(keys(own))
    ]
    threads += [threading.Thread(target=client.get, args=("api/dataset",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [read_choices(own.folder)[key].rating for key in keys(own)] == [1, 2, 3, 4, 5, 1]
    assert found(client, rating="1") == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("\xff", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "send"),
        ("null", "send"),
        ('{"choices": {}}', "send"),
        ('{"choices": [1]}', "a choice has a key"),
        ('{"choices": [{}]}', "a choice has a key"),
        ('{"choices": [{"key": 7}]}', "a choice has a key"),
        ('{"choices": [{"key": "KEY", "who": "bob"}]}', "a choice has a key"),
        ('{"choices": [{"key": "KEY", "verdict": "maybe"}]}', "a verdict is one of"),
        ('{"choices": [{"key": "KEY", "verdict": null}]}', "a verdict is one of"),
        ('{"choices": [{"key": "KEY", "verdict": ["kept"]}]}', "a verdict is one of"),
        ('{"choices": [{"key": "KEY", "rating": 6}]}', "a rating is"),
        ('{"choices": [{"key": "KEY", "rating": true}]}', "a rating is"),
        ('{"choices": [{"key": "KEY", "rating": 2.0}]}', "a rating is"),
        ('{"choices": [{"key": "KEY", "reason": 1}]}', "a reason is text"),
        ('{"choices": [{"key": "KEY", "reason": "\\ud800"}]}', "half a character"),
        ('{"choices": [{"key": "\\udfff"}]}', "half a character"),
        ('{"choices": [{"key": "nothing", "verdict": "kept"}]}', "no published sample has the key 'nothing'"),
        ('{"choices": [{"key": "KEY"}, {"key": "' + "x" * 9000 + '"}]}', "no published sample"),
    ],
)
def test_a_wrong_request_changes_nothing(own: Dataset, opened: Opener, body: str, says: str) -> None:
    key = keys(own)[0]
    _, client = opened(own)
    text = body.replace("KEY", key).encode("latin-1")
    answer = client.post("api/choices", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert says in answer.json()["error"]
    assert len(answer.content) < 500
    assert own.folder.names(layout.CURATION) == []
    assert found(client, verdict="none") == [0, 1, 2, 3, 4, 5]


def test_no_choice_writes_nothing(own: Dataset, opened: Opener) -> None:
    assert post(opened(own)[1]).json() == {"choices": {"kept": 0, "rejected": 0, "rated": 0}}
    assert own.folder.names(layout.CURATION) == []


def test_too_many_choices_at_once(own: Dataset, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices_module, "TOGETHER", 2)
    _, client = opened(own)
    assert "send at most 2" in post(client, *({"key": key} for key in keys(own)[:3])).json()["error"]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), UserError("s3://b: AccessDenied: no right"), ConnectionError("down")],
)
def test_what_cannot_be_written_does_not_count(
    own: Dataset, opened: Opener, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    one, two, *_ = keys(own)
    _, client = opened(own)
    post(client, {"key": one, "verdict": "kept"})
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", lambda *_: (_ for _ in ()).throw(error))
        answer = post(client, {"key": two, "verdict": "rejected"})
    assert answer.status_code == 502
    assert "the choices could not be kept: " in answer.json()["error"]
    assert found(client, verdict="rejected") == []
    assert post(client, {"key": two, "verdict": "rejected"}).status_code == 200, "sent again, it is kept"
    assert {key: choice.verdict for key, choice in read_choices(own.folder).items()} == {one: "kept", two: "rejected"}


def test_a_folder_that_cannot_be_written(own: Dataset, opened: Opener) -> None:
    """A file is in the place of the folder of choices."""
    Path(own.folder.full("curation")).write_text("no folder")
    _, client = opened(own)
    answer = post(client, {"key": keys(own)[0], "verdict": "kept"})
    assert answer.status_code == 502
    assert "could not be kept" in answer.json()["error"]


def test_choices_that_cannot_be_read_are_told(own: Dataset, opened: Opener) -> None:
    _, client = opened(own)
    own.folder.write(layout.choices("20260101T000000", "00000000"), b"damaged")
    for path in ("api/dataset", "api/choices.csv"):
        answer = client.get(path)
        assert answer.status_code == 502
        assert "not a readable Parquet file" in answer.json()["error"]
    assert client.get("api/samples").status_code == 200


def test_the_csv_can_be_read_back(own: Dataset, opened: Opener, tmp_path: Path) -> None:
    one, two, *_ = keys(own)
    _, client = opened(own)
    post(client, {"key": one, "verdict": "rejected", "reason": 'a "quoted",\nlong reason'}, {"key": two, "rating": 3})
    answer = client.get("api/choices.csv")
    assert answer.headers["Content-Type"].startswith("text/csv")
    assert answer.headers["Content-Disposition"] == 'attachment; filename="choices.csv"'
    (tmp_path / "choices.csv").write_bytes(answer.content)
    back = read_choice_file(str(tmp_path / "choices.csv"), "x", "x", {})
    assert {choice.key: choice for choice in back} == read_choices(own.folder)
