"""Questions to the published samples: what expressions may say, and that they only read."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.curation import Choice, Session, now
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.schemas import manifest_schema
from resmaster_stages.errors import ShardError, UserError
from resmaster_stages.inspection.query import Query, SampleTable, sample_table
from resmaster_stages.metrics import metric_columns
from resmaster_stages.metrics.flags import badness
from resmaster_stages.publish.publish import publish
from resmaster_stages.storage.tables import decode_table, encode_table
from tests.inspection.test_explain import built

PROMPTS = ["a house", "a <b>tree</b>", "an old house", "it's a 100% house", "water"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("query")
    with pytest.MonkeyPatch.context() as patch:
        dataset = built(folder / "out", PROMPTS, folder)
        publish(dataset)
        rows = manifest(dataset)
        for number, row in enumerate(rows):
            row["agreement_psnr"] = [10.0, 20.0, 30.0, None, math.inf][number]
            row["flags"] = [["blank"], ["seam", "near_duplicate"], [], ["structure"], []][number]
        dataset.folder.write(layout.MANIFEST, encode_table(rows, manifest_schema()))
        del patch
    return dataset


@pytest.fixture(scope="module")
def table(dataset: Dataset) -> Iterator[SampleTable]:
    with sample_table(dataset) as table:
        yield table


def manifest(dataset: Dataset) -> list[dict]:
    return decode_table(dataset.folder.read(layout.MANIFEST), manifest_schema(), "manifest").to_pylist()


def prompts(table: SampleTable, where: str = "", **more) -> list[str]:
    return [row["prompt"] for row in table.rows(Query(where=where, **more), ("prompt",))]


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("", PROMPTS),
        ("agreement_psnr > 15 and not near_duplicate", ["an old house", "water"]),
        ("near_duplicate", ["a <b>tree</b>"]),
        ("'seam' in flags", ["a <b>tree</b>"]),
        ("agreement_psnr is null", ["it's a 100% house"]),
        ("prompt like '%house' -- and a comment", ["a house", "an old house", "it's a 100% house"]),
        ("prompt = 'it''s a 100% house'", ["it's a 100% house"]),
        ("len(flags) = 0", ["an old house", "water"]),
        ("blank or structure", ["a house", "it's a 100% house"]),
        ("index in (0, 4)", ["a house", "water"]),
        ("rejected or kept or rating > 3", []),
        ("(select count(*) from manifest) = 5 and index = 1", ["a <b>tree</b>"]),
    ],
)
def test_expressions(table: SampleTable, where: str, found: list[str]) -> None:
    assert prompts(table, where) == found
    assert table.count(Query(where=where)) == len(found)


@pytest.mark.parametrize(
    "where",
    [
        "agreement > 3",
        "agreement_psnr >",
        "1=1; drop table manifest",
        "1=1) ; drop table manifest; --",
        "key > 3",
        "prompt = ",
        "sum(index) > 3",
        "'",
        "(",
        "key in (select content from read_text('/etc/hostname'))",
        "exists (from read_csv('/etc/passwd'))",
        "no_function(index)",
        "\0",
    ],
)
def test_a_wrong_expression_is_one_line_and_changes_nothing(table: SampleTable, where: str) -> None:
    with pytest.raises(UserError) as error:
        table.check(where)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert prompts(table) == PROMPTS


def test_a_misspelt_column_is_answered_with_the_right_one(table: SampleTable) -> None:
    with pytest.raises(UserError, match="agreement_psnr"):
        table.check("agreement_psn > 3")


def test_conditions_have_parameters(table: SampleTable) -> None:
    query = Query(where="agreement_psnr > 5").also("contains(prompt, ?)", "house").also("index < ?", 2)
    assert [row["prompt"] for row in table.rows(query, ("prompt",))] == ["a house"]
    assert table.count(Query().also("prompt = ?", "' or 1=1 --")) == 0


def test_sorting_puts_missing_values_last_either_way(table: SampleTable) -> None:
    assert prompts(table, sort="agreement_psnr")[-1] == "it's a 100% house"
    assert prompts(table, sort="agreement_psnr", descending=True)[-1] == "it's a 100% house"
    assert prompts(table, sort="agreement_psnr", descending=True)[:2] == ["water", "an old house"]
    with pytest.raises(UserError, match="no column 'index; drop table manifest'"):
        prompts(table, sort="index; drop table manifest")


def test_pages_are_the_whole(table: SampleTable) -> None:
    paged = [prompt for offset in range(0, 6, 2) for prompt in prompts(table, offset=offset, limit=2)]
    assert paged == PROMPTS
    assert table.row(table.keys()[2])["prompt"] == "an old house"  # type: ignore[index]
    assert table.row("nothing") is None


def test_badness_is_that_of_the_report(table: SampleTable, dataset: Dataset) -> None:
    expected = {row["key"]: badness(row) for row in manifest(dataset)}
    assert {row["key"]: row["bad"] for row in table.rows(columns=("key", "bad"))} == pytest.approx(expected)
    assert any(column.badness for column in metric_columns())


def test_histograms_count_every_finite_value_once(table: SampleTable) -> None:
    assert table.limits(["agreement_psnr", "seam"]) == {"agreement_psnr": (10.0, 30.0), "seam": (1.0, 1.0)}
    edges = np.linspace(10, 30, 5).tolist()
    assert table.histogram("agreement_psnr", edges) == [1, 0, 1, 1]
    assert table.histogram("agreement_psnr", edges, Query(where="not near_duplicate")) == [1, 0, 0, 1]
    assert table.histogram("agreement_psnr", [20.0, 20.0]) == [1]


def test_choices_count_at_once(dataset: Dataset) -> None:
    with sample_table(dataset) as table:
        key = table.keys()[1]
        table.choose([Choice(key, "rejected", 2, "blurred", "me", now())])
        assert table.keys(Query(where="rejected")) == [key]
        assert table.row(key)["reason"] == "blurred"  # type: ignore[index]
        table.choose([Choice(key, "kept", None, "", "me", now())])
        assert table.keys(Query(where="kept and rating is null")) == [key]
        assert not table.keys(Query(where="rejected"))


def test_choices_of_the_dataset_are_there(dataset: Dataset) -> None:
    session = Session(dataset.folder)
    with sample_table(dataset) as table:
        key = table.keys()[0]
    session.add([Choice(key, "rejected", when=now())])
    with sample_table(dataset) as table:
        assert table.keys(Query(where="rejected")) == [key]
    session.add([Choice(key, "none", when=now())])
    with sample_table(dataset) as table:
        assert not table.keys(Query(where="rejected"))


def test_nothing_published(tmp_path: Path) -> None:
    dataset = built(tmp_path / "out", ["a"], tmp_path)
    with pytest.raises(UserError, match="nothing is published yet; run: resmaster publish"), sample_table(dataset):
        pass
    dataset.folder.write(layout.MANIFEST, b"PAR1 no table")
    with pytest.raises(ShardError, match="not a readable Parquet file"), sample_table(dataset):
        pass
