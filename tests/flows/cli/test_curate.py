"""`resmaster curate` and `resmaster status --list`: choices from the command line, names for scripts."""

import csv
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resmaster_flows.cli.main import main
from resmaster_flows.cli.status import LISTS as NAMED
from resmaster_stages.dataset.curation import read_choices
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.inspection.lists import LISTS
from resmaster_stages.publish.publish import publish
from tests.inspection.test_explain import built, key_of

Said = pytest.CaptureFixture[str]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    dataset = built(tmp_path / "out", ["a house", "bad high_res", "a tree", "a boat"], tmp_path)
    publish(dataset)
    return dataset


def resmaster(*words: str) -> int:
    return main([str(word) for word in words])


def lines(capsys: Said) -> list[list[str]]:
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def verdicts(dataset: Dataset) -> dict[int, str]:
    return {
        index: read_choices(dataset.folder)[key].verdict
        for index in (0, 2, 3)
        if (key := key_of(dataset, index)) in read_choices(dataset.folder)
    }


def test_by_expressions(dataset: Dataset, capsys: Said) -> None:
    assert (
        resmaster("curate", dataset.url, "--reject", "prompt like '%house'", "--reason", "too many", "--who", "ann")
        == 0
    )
    assert "1 rejected" in capsys.readouterr().out
    assert resmaster("curate", dataset.url, "--keep", "not rejected") == 0
    assert verdicts(dataset) == {0: "rejected", 2: "kept", 3: "kept"}
    assert resmaster("curate", dataset.url, "--forget", "index = 2") == 0
    assert verdicts(dataset) == {0: "rejected", 3: "kept"}
    capsys.readouterr()
    assert resmaster("status", dataset.url, "--list", "rejected") == 0
    [[key, reason, who, when]] = lines(capsys)
    assert (key, reason, who) == (key_of(dataset, 0), "too many", "ann")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", when)


@pytest.mark.parametrize(
    ("where", "said", "status"),
    [
        ("agreement > 1", "agreement_psnr", 2),
        ("index > 9", "holds for no sample; nothing was chosen", 0),
        (" ", "the expression is empty; write `true` for all samples", 2),
    ],
)
def test_an_expression_that_chooses_nothing(dataset: Dataset, capsys: Said, where: str, said: str, status: int) -> None:
    assert resmaster("curate", dataset.url, "--reject", where) == status
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not read_choices(dataset.folder)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_round_trip_through_a_file(dataset: Dataset, suffix: str, tmp_path: Path) -> None:
    resmaster("curate", dataset.url, "--reject", "index = 0", "--reason", 'a, "quoted"\nreason', "--who", "ann")
    file, before = tmp_path / f"choices{suffix}", read_choices(dataset.folder)
    assert resmaster("curate", dataset.url, "--export", file) == 0
    resmaster("curate", dataset.url, "--forget", "true")
    assert not read_choices(dataset.folder)
    assert resmaster("curate", dataset.url, "--import", file) == 0
    assert not read_choices(dataset.folder), "the file's choices are older than what took them back"
    for name in dataset.folder.names("curation"):
        dataset.folder.remove(name)
    assert resmaster("curate", dataset.url, "--import", file) == 0
    assert read_choices(dataset.folder) == before


def test_a_spreadsheet(dataset: Dataset, tmp_path: Path) -> None:
    file, keys = tmp_path / "choices.csv", [key_of(dataset, index) for index in (0, 2, 3)]
    file.write_text(
        f"\ufeffnotes,key,verdict,rating\nx,{keys[0]}, Rejected ,\ny,{keys[1]},kept,4.0\nz,{keys[2]},,2\n", "utf-8"
    )
    assert resmaster("curate", dataset.url, "--import", file, "--who", "bob") == 0
    found = read_choices(dataset.folder)
    assert [(found[key].verdict, found[key].rating, found[key].who) for key in keys] == [
        ("rejected", None, "bob"),
        ("kept", 4, "bob"),
        ("none", 2, "bob"),
    ]


KEY = "KEY"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "key\n" + KEY, "lacks the columns key and verdict or rating (it has 'key'); add them"),
        ("a.csv", "verdict\nkept", "lacks the columns"),
        ("a.csv", "", "it has none"),
        ("a.csv", "key,verdict\n", "holds no choice"),
        (
            "a.csv",
            f"key,verdict\n{KEY},reject",
            "row 2: verdict 'reject' is none of kept, rejected, none (did you mean 'rejected'?)",
        ),
        ("a.csv", f"key,verdict\n{KEY},kept\n,kept", "row 3: has no key"),
        ("a.csv", "key,verdict\nffff,kept", "there is no sample 'ffff' in this dataset"),
        ("a.csv", f"key,rating\n{KEY},6", "row 2: rating 6 is no number from 1 to 5"),
        ("a.csv", f"key,rating\n{KEY},inf", "row 2: 'inf' is no whole number"),
        ("a.csv", f"key,rating\n{KEY},good", "row 2"),
        ("a.csv", f"key,verdict,when\n{KEY},kept,yesterday", "row 2: Invalid isoformat string: 'yesterday'"),
        ("a.csv", b"key,verdict\n\xff\xfe", "no CSV in UTF-8"),
        ("a.csv", f'key,verdict\n"{KEY},kept', "no CSV"),
        ("a.parquet", b"PAR1", "not a readable Parquet file"),
        ("a.xlsx", "{}", "unknown kind of file; known: .csv, .parquet"),
        ("a.json", "{}", "is no samples.json of FiftyOne"),
        ("a.json", '{"samples": []}', "holds no choice"),
        ("a.json", '{"samples": [{"key": "ffff", "tags": ["kept"]}]}', "there is no sample 'ffff'"),
        ("missing.csv", None, "cannot be read"),
    ],
)
def test_a_bad_file(
    dataset: Dataset, tmp_path: Path, capsys: Said, name: str, content: str | bytes | None, said: str
) -> None:
    file = tmp_path / name
    if content is not None:
        data = content if isinstance(content, bytes) else content.replace(KEY, key_of(dataset, 0)).encode()
        file.write_bytes(data)
    assert resmaster("curate", dataset.url, "--import", file) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not read_choices(dataset.folder), "nothing of a bad file is taken"


def test_a_parquet_file_of_another_program(dataset: Dataset, tmp_path: Path) -> None:
    table = pa.table({"key": [key_of(dataset, 0)], "rating": [3.0], "verdict": [None], "score": [0.1]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert resmaster("curate", dataset.url, "--import", tmp_path / "a.parquet") == 0
    assert read_choices(dataset.folder)[key_of(dataset, 0)].rating == 3


@pytest.mark.parametrize("when", ["2026-01-02 03:04:05", "2026-01-02T04:04:05+01:00", "20260102T030405Z"])
def test_times_of_other_programs_sort_with_ours(dataset: Dataset, tmp_path: Path, when: str) -> None:
    (tmp_path / "a.csv").write_text(f"key,verdict,when\n{key_of(dataset, 0)},kept,{when}\n")
    assert resmaster("curate", dataset.url, "--import", tmp_path / "a.csv") == 0
    assert read_choices(dataset.folder)[key_of(dataset, 0)].when == "2026-01-02T03:04:05.000000+00:00"


def test_tags_of_fiftyone(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text(
        json.dumps({"samples": [{"key": key_of(dataset, 0), "tags": ["rejected", "mine"], "reason": "hands"}]})
    )
    assert resmaster("curate", dataset.url, "--import", tmp_path / "samples.json", "--who", "ann") == 0
    found = read_choices(dataset.folder)[key_of(dataset, 0)]
    assert (found.verdict, found.reason, found.who) == ("rejected", "hands", "ann")


def test_the_export_is_plain_csv(dataset: Dataset, tmp_path: Path) -> None:
    resmaster("curate", dataset.url, "--keep", "index = 2")
    assert resmaster("curate", dataset.url, "--export", tmp_path / "a.csv") == 0
    [row] = csv.DictReader((tmp_path / "a.csv").open(encoding="utf-8"))
    assert (row["key"], row["verdict"], row["rating"]) == (key_of(dataset, 2), "kept", "")


def test_lists(dataset: Dataset, capsys: Said) -> None:
    assert resmaster("status", dataset.url, "--list", "failed") == 0
    [[key, stage, error, message]] = lines(capsys)
    assert (key, stage, error) == (key_of(dataset, 1), "high_res", "SampleError")
    assert "told to fail" in message
    for name in ("flagged", "duplicates", "kept", "rejected"):
        assert resmaster("status", dataset.url, "--list", name) == 0
    assert "\t" not in capsys.readouterr().out.replace("near_duplicate", "").split("\t")[0]


def test_inputs_that_were_never_planned(tmp_path: Path, capsys: Said) -> None:
    dataset = built(tmp_path / "out", ["a house", "a house", "a tree"], tmp_path)
    assert resmaster("status", dataset.url, "--list", "inputs") == 0
    found = lines(capsys)
    assert len(found) == sum(each.rejected_count + each.duplicates_count for each in dataset.plan.generations) > 0


def test_the_command_line_knows_the_lists() -> None:
    assert tuple(LISTS) == NAMED


def test_published_lists_need_a_publication(tmp_path: Path, capsys: Said) -> None:
    dataset = built(tmp_path / "out", ["a house"], tmp_path)
    assert resmaster("status", dataset.url, "--list", "flagged") == 2
    assert "nothing is published yet; run: resmaster publish" in capsys.readouterr().err
