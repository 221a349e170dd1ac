"""Pages of samples, filters, histograms, one sample: what the page is told, and by how many questions."""

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from resmaster_stages.dataset import layout, schemas
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.schemas import manifest_schema, table_schema
from resmaster_stages.gallery import gallery as gallery_module
from resmaster_stages.gallery.filters import LONGEST_PAGE
from resmaster_stages.inspection import query
from resmaster_stages.inspection.query import SampleTable
from resmaster_stages.metrics.flags import badness
from resmaster_stages.storage.tables import decode_table, encode_table
from tests.gallery.conftest import Opener
from tests.gallery.standin import HOSTILE, standin


def manifest(dataset: Dataset) -> list[dict[str, Any]]:
    return decode_table(dataset.folder.read(layout.MANIFEST), manifest_schema(), "manifest").to_pylist()


def rewritten(dataset: Dataset, changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Change the first rows of the manifest. Returns all rows."""
    rows = manifest(dataset)
    for row, change in zip(rows, changes):
        row.update(change)
    dataset.folder.write(layout.MANIFEST, encode_table(rows, manifest_schema()))
    return rows


CHANGES = [
    {"prompt": "a House", "agreement_psnr": 10.0, "flags": ["blank"]},
    {"prompt": "a red tree", "agreement_psnr": 20.0, "flags": ["seam", "near_duplicate"]},
    {"prompt": "a red boat 100%", "agreement_psnr": None, "flags": ["seam"]},
    {"prompt": "water", "agreement_psnr": math.inf},
]


@pytest.fixture
def changed(own: Dataset, opened: Opener) -> tuple[list[dict[str, Any]], TestClient]:
    return rewritten(own, CHANGES), opened(own)[1]


def found(client: TestClient, **asked: Any) -> list[int]:
    """The indices of the samples that an address asks for; `count` says the same."""
    answer = client.get("api/samples", params=asked)
    assert answer.status_code == 200, answer.text
    indices = [sample["index"] for sample in answer.json()["samples"]]
    counted = {name: value for name, value in asked.items() if name not in ("offset", "limit")}
    assert client.get("api/count", params=counted).json()["total"] == answer.json()["total"] >= len(indices)
    return indices


@pytest.mark.parametrize(
    ("asked", "indices"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"q": "house"}, [0]),
        ({"q": "RED boat"}, [2]),
        ({"q": "boat  red"}, [2]),
        ({"q": "100%"}, [2]),
        ({"q": "' or 1=1 --"}, []),
        ({"flag": "seam"}, [1, 2]),
        ({"flag": ["seam", "near_duplicate"]}, [1]),
        ({"flag": "*"}, [0, 1, 2]),
        ({"flag": "-"}, [3, 4, 5]),
        ({"range": "agreement_psnr:15:25"}, [1]),
        ({"range": "agreement_psnr::25"}, [0, 1]),
        ({"range": ["agreement_psnr:15:", "seam:1:1"]}, [1, 3, 4, 5]),
        ({"where": "agreement_psnr > 15 and not near_duplicate"}, [3, 4, 5]),
        ({"where": "agreement_psnr > 15", "q": "water"}, [3]),
        ({"verdict": "none"}, [0, 1, 2, 3, 4, 5]),
        ({"verdict": "rejected"}, []),
        ({"rating": "1"}, []),
        ({"sort": "agreement_psnr", "limit": 2}, [0, 1]),
        ({"sort": "-agreement_psnr", "limit": 1}, [3]),
        ({"sort": "-bad", "limit": 1}, [0]),
        ({"offset": 4, "limit": 200}, [4, 5]),
        ({"offset": 100}, []),
        ({"group": "nothing"}, []),
    ],
)
def test_filters(changed: tuple[list[dict[str, Any]], TestClient], asked: dict[str, Any], indices: list[int]) -> None:
    assert found(changed[1], **asked) == indices


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"flag": "sean"}, "did you mean 'seam'"),
        ({"verdict": "maybe"}, "none of kept, rejected, none"),
        ({"rating": "6"}, "from 1 to 5"),
        ({"rating": "1.5"}, "from 1 to 5"),
        ({"range": "agreement_psnr:1"}, "COLUMN:LOW:HIGH"),
        ({"range": "prompt:1:2"}, "COLUMN:LOW:HIGH"),
        ({"range": "agreement_psnr:a:2"}, "no number"),
        ({"range": 'seam"; drop table manifest; --:1:2'}, "COLUMN:LOW:HIGH"),
        ({"where": "agreement_psn > 1"}, "agreement_psnr"),
        ({"where": "1=1; drop table manifest"}, "syntax error"),
        ({"where": "1=1); drop table manifest; select (1"}, "more than one expression"),
        ({"where": "1=1) order by (seam"}, "more than one expression"),
        ({"where": "1=1) union select 1 where (true"}, "more than one expression"),
        ({"where": "exists (from read_text('/etc/passwd'))"}, "no function read_text"),
        ({"where": "length(lpad(prompt, 2000000000, 'x')) > 1"}, "no function lpad"),
        ({"where": "length(repeat(prompt, 2000000000)) > 1"}, "no function repeat"),
        ({"where": "len(range(1000000000)) > 1"}, "no function range"),
        ({"where": "prompt || prompt = 'x'"}, "no function ||"),
        ({"sort": "nothing"}, "no column 'nothing'"),
        ({"sort": "_place"}, "no column '_place'"),
        ({"sort": "index; drop table manifest"}, "no column"),
        ({"limit": str(LONGEST_PAGE + 1)}, "from 1 to 200"),
        ({"limit": "0"}, "from 1 to 200"),
        ({"offset": "-1"}, "no number"),
        ({"offset": "9" * 50}, "no number"),
        ({"q": "a " * 21}, "at most 20"),
    ],
)
def test_a_wrong_question_is_answered_by_what_to_do(client: TestClient, asked: dict[str, Any], says: str) -> None:
    answer = client.get("api/samples", params=asked)
    assert answer.status_code == 400
    assert says in answer.json()["error"]
    assert answer.headers["Content-Type"] == "application/json"
    assert found(client) == [0, 1, 2, 3, 4, 5]


def test_a_sample_of_a_page(changed: tuple[list[dict[str, Any]], TestClient]) -> None:
    rows, client = changed
    samples = client.get("api/samples").json()["samples"]
    for row, sample in zip(rows, samples, strict=True):
        same = ("key", "index", "shard", "replica", "prompt", "negative_prompt", "source", "flags", "width", "height")
        assert {name: sample[name] for name in same} == {name: row[name] for name in same}
        assert (sample["low_width"], sample["low_height"]) == (16, 16)
        assert (sample["verdict"], sample["rating"], sample["reason"]) == ("none", None, "")
        assert sample["bad"] == pytest.approx(badness(row))
        value = row["agreement_psnr"]
        assert sample["quality"]["agreement_psnr"] == (value if value and math.isfinite(value) else None)
    assert len({sample["v"] for sample in samples}) == len(samples)


def test_hostile_text_is_data(own: Dataset, opened: Opener) -> None:
    rewritten(own, [{"prompt": HOSTILE, "source": HOSTILE, "flags": [HOSTILE]}])
    client = opened(own)[1]
    for path in ("api/samples", f"api/sample/{manifest(own)[0]['key']}"):
        answer = client.get(path)
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.content.isascii()
        sample = answer.json()["samples"][0] if "samples" in answer.json() else answer.json()
        assert (sample["prompt"], sample["source"], sample["flags"]) == (HOSTILE, HOSTILE, [HOSTILE])


def test_histograms(changed: tuple[list[dict[str, Any]], TestClient]) -> None:
    _, client = changed
    answer = client.get("api/histogram", params={"column": "agreement_psnr", "bins": 4}).json()
    assert answer == {"edges": [10, 15, 20, 25, 30], "counts": [1, 0, 1, 2], "all": [1, 0, 1, 2], "missing": 2}
    some = client.get("api/histogram", params={"column": "agreement_psnr", "bins": 4, "flag": "seam"}).json()
    assert (some["counts"], some["all"], some["missing"]) == ([0, 0, 1, 0], [1, 0, 1, 2], 1)
    same = client.get("api/histogram", params={"column": "seam", "bins": 3}).json()
    assert (same["counts"], same["missing"], len(same["edges"])) == ([6, 0, 0], 0, 4)
    nothing = client.get("api/histogram", params={"column": "clip_score"}).json()
    assert nothing == {"edges": [], "counts": [], "all": [], "missing": 6}
    for wrong in ({"column": "prompt"}, {"column": "seam", "bins": 0}, {"column": "seam", "bins": 10**6}, {}):
        assert client.get("api/histogram", params=wrong).status_code == 400


def test_the_dataset(changed: tuple[list[dict[str, Any]], TestClient], own: Dataset) -> None:
    _, client = changed
    about = client.get("api/dataset").json()
    assert (about["name"], about["url"], about["samples"], about["who"]) == ("demo", own.url, 6, "ann")
    assert (about["failed"], about["failed_error"], about["near_duplicate_groups"]) == (2, "", 0)
    assert about["choices"] == {"kept": 0, "rejected": 0, "rated": 0}
    counts = {flag["name"]: flag["count"] for flag in about["flags"]}
    assert (counts["seam"], counts["blank"], counts["near_duplicate"], counts["structure"]) == (2, 1, 1, 0)
    columns = {column["name"]: column for column in about["columns"]}
    assert (columns["agreement_psnr"]["min"], columns["agreement_psnr"]["max"]) == (10.0, 30.0)
    assert columns["clip_score"]["min"] is None
    thresholds = {each["field"]: each for each in about["thresholds"]}
    assert thresholds["min_agreement_psnr"] == {
        "field": "min_agreement_psnr",
        "column": "agreement_psnr",
        "side": "below",
        "value": own.config.quality.min_agreement_psnr,
        "flag": "structure",
    }
    assert about["facts"]["samples"] == "6"
    assert about["captions"] == {"indexed": 2, "shards": 2, "error": ""}
    assert "damaged (manifest.parquet)" in about["note"], "the test has changed the manifest"


def test_one_sample(made: Dataset, client: TestClient) -> None:
    row = manifest(made)[1]
    sample = client.get(f"api/sample/{row['key']}").json()
    assert sample["facts"] == {"key": row["key"], "size": 1024, "seed": 7, "model": "stand-in"}
    assert sample["low_facts"] == {"key": row["key"], "size": 256, "seed": 7, "model": "stand-in"}
    assert sample["commands"]["explain"] == f"resmaster explain {made.url} {row['key']}"
    assert sample["commands"]["redo"] == f"resmaster repair {made.url} --redo {row['key']}"
    assert (sample["captions_height"], sample["captions_width"]) == (1024, 1024)
    boxes = [(each["row"], each["col"], each["y0"], each["x0"], each["y1"], each["x1"]) for each in sample["captions"]]
    assert boxes == [
        (0, 0, 0, 0, 512, 512),
        (0, 1, 0, 512, 512, 1024),
        (1, 0, 512, 0, 1024, 512),
        (1, 1, 512, 512, 1024, 1024),
    ]
    assert sample["captions"][0]["caption"].startswith(f"corner 00 of {row['prompt']}")
    assert (sample["captions"][0]["status"], sample["captions"][0]["fit"]) == ("ok", 1.5)
    assert sample["group"] == []


def test_long_facts_take_a_second_read(made: Dataset, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.gallery.samples.META_BYTES", 520)
    row = manifest(made)[1]
    assert opened(made)[1].get(f"api/sample/{row['key']}").json()["facts"]["model"] == "stand-in"


def test_a_stale_publication_is_told(own: Dataset, opened: Opener, capsys: pytest.CaptureFixture[str]) -> None:
    own.folder.remove(layout.PUBLICATION)
    _, client = opened(own)
    assert "resmaster publish" in client.get("api/dataset").json()["note"]
    assert "publication is missing" in capsys.readouterr().err


def test_an_expression_that_never_ends_is_stopped_and_keeps_nobody_waiting(
    own: Dataset, tmp_path: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery_module, "QUESTION_SECONDS", 1.0)
    client = opened(standin(tmp_path / "many", tmp_path, 3000))[1]
    endless = "(select count(*) from samples a, samples b, samples c, samples d where a.seam < b.seam) > 0"
    answers: list[Any] = []
    asking = [
        threading.Thread(target=lambda: answers.append(client.get("api/count", params={"where": endless})))
        for _ in range(4)
    ]
    for thread in asking:
        thread.start()
    assert client.get("api/count").json() == {"total": 3000}
    assert not answers, "the plain question waited for the endless ones"
    for thread in asking:
        thread.join()
    assert {answer.status_code for answer in answers} == {400}
    assert "takes longer than 1 s; ask for less" in answers[0].json()["error"]
    assert client.get("api/count", params={"where": "seam > 0"}).json() == {"total": 3000}


def test_a_page_takes_the_same_questions_however_many_samples_there_are(
    own: Dataset, tmp_path: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    rows = SampleTable._rows
    monkeypatch.setattr(
        SampleTable,
        "_rows",
        lambda self, query, sql, parameters: asked.append(sql) or rows(self, query, sql, parameters),
    )
    numbers = []
    for dataset in (own, standin(tmp_path / "many", tmp_path, 2000)):
        _, client = opened(dataset)
        client.get("api/dataset")
        asked.clear()
        keys = [sample["key"] for sample in client.get("api/samples?limit=200&sort=-bad").json()["samples"]]
        for key in keys[:3]:
            assert client.get(f"image/{key}/high/thumb/128").status_code == 200
        numbers.append(len(asked))
    assert numbers == [3, 3], "the places of its samples, the samples, and their number; none for an image"


def test_groups_of_near_duplicates(own: Dataset, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the manifest's column of the first of a group, which the test adds where the schema has none."""
    schema = manifest_schema()
    if query.DUPLICATE_OF not in schema.names:
        fields = [(field.name, field.type, field.nullable) for field in schema]
        wider = table_schema("manifest", [*fields, (query.DUPLICATE_OF, "string", True)])
        monkeypatch.setattr(schemas, "manifest_schema", lambda: wider)
        monkeypatch.setattr(query, "manifest_schema", lambda: wider)
        monkeypatch.setattr(f"{__name__}.manifest_schema", lambda: wider)
    keys = [row["key"] for row in manifest(own)]
    firsts = [None, keys[0], None, keys[2], keys[2]]
    rewritten(own, [{query.DUPLICATE_OF: first} for first in firsts])
    client = opened(own)[1]
    assert client.get("api/near_duplicates").json() == {
        "total": 2,
        "groups": [{"first": keys[2], "keys": keys[2:5]}, {"first": keys[0], "keys": keys[:2]}],
    }
    assert client.get("api/near_duplicates?offset=1&limit=1").json()["groups"] == [{"first": keys[0], "keys": keys[:2]}]
    assert client.get("api/dataset").json()["near_duplicate_groups"] == 2
    assert found(client, group=keys[2]) == [2, 3, 4]
    assert client.get(f"api/sample/{keys[3]}").json()["group"] == keys[2:5]
    assert client.get(f"api/sample/{keys[2]}").json()["group"] == keys[2:5]
    assert client.get(f"api/sample/{keys[5]}").json()["group"] == []


def test_failed_samples(made: Dataset, client: TestClient) -> None:
    answer = client.get("api/failed").json()
    assert answer["total"] == 2
    assert {(each["prompt"], each["stage"], each["message"]) for each in answer["samples"]} == {
        ("bad low_res", "low_res", "told to fail"),
        ("bad high_res", "high_res", "told to fail"),
    }
    assert all(each["command"] == f"resmaster explain {made.url} {each['key']}" for each in answer["samples"])
    second = client.get("api/failed?offset=1&limit=1").json()
    assert (second["total"], second["samples"]) == (2, answer["samples"][1:])


def test_failures_that_cannot_be_read_are_told(own: Dataset, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(dataset: Dataset) -> list[dict[str, Any]]:
        raise ConnectionError("the store cannot be reached; check the network")

    monkeypatch.setattr("resmaster_stages.gallery.failed.failures", gone)
    client = opened(own)[1]
    about = client.get("api/dataset").json()
    assert (about["samples"], about["failed"]) == (6, 0)
    assert "cannot be reached" in about["failed_error"]
    answer = client.get("api/failed")
    assert (answer.status_code, answer.json()["error"]) == (502, about["failed_error"])


def test_json_is_json(changed: tuple[list[dict[str, Any]], TestClient]) -> None:
    """Infinite numbers are none of JSON."""

    def never(constant: str) -> None:
        raise AssertionError(constant)

    for path in ("api/samples?sort=-agreement_psnr", "api/dataset", "api/histogram?column=agreement_psnr"):
        json.loads(changed[1].get(path).text, parse_constant=never)
