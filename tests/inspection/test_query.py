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
from resmaster_stages.inspection.query import Query, SampleTable, mentions, sample_table
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
        ("agreement_psnr <= (select quantile_disc(agreement_psnr, 0.25) from samples)", ["a house"]),
        ("lower(prompt) like 'A HOUSE' or prompt ilike 'A HOUSE'", ["a house"]),
        ("round(abs(-agreement_psnr) / 10) * 10 = 20 and isfinite(agreement_psnr)", ["a <b>tree</b>"]),
        ("regexp_matches(prompt, '^an? ') and not contains(prompt, 'tree')", ["a house", "an old house"]),
        ("coalesce(rating, 0) = 0 and case when blank then true else index = 4 end", ["a house", "water"]),
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
        "1=1) order by (index",
        "1=1) union select 1 where (true",
        "1=1) limit (1",
        "length(lpad(prompt, 2000000000, 'x')) > 0",
        "length(repeat(prompt, 2000000000)) > 0",
        "length(rpad(prompt, 2000000000, 'x')) > 0",
        "len(range(2000000000)) > 0",
        "prompt || prompt = ''",
        "length(replace(prompt, '', repeat('x', 2000000000))) > 0",
        "len([x for x in flags]) > 0",
        "(with recursive t(n) as (select 'x' union all select n || n from t) select count(*) from t) > 1",
        "current_setting('temp_directory') like '%'",
        "sleep_ms(100000) is null",
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


def test_choices_may_be_replaced_by_others(dataset: Dataset) -> None:
    with sample_table(dataset) as table:
        one, two, three, *_ = table.keys()
        table.choose([Choice(one, "rejected"), Choice(two, "kept", 3)])
        assert table.choice_counts() == {"kept": 1, "rejected": 1, "rated": 1}
        table.choose([Choice(two, "rejected"), Choice(three, "kept")], only=True)
        assert (table.keys(Query(where="rejected")), table.keys(Query(where="kept"))) == ([two], [three])
        table.choose([], only=True)
        assert table.choice_counts() == {"kept": 0, "rejected": 0, "rated": 0}


def test_a_question_that_takes_too_long_is_stopped(dataset: Dataset) -> None:
    endless = "(with recursive t(n) as (select 1 union all select n + 1 from t) select max(n) from t) > 1"
    with sample_table(dataset, seconds=0.3) as table:
        with pytest.raises(UserError, match=r"takes longer than 0\.3 s; ask for less"):
            table.count(Query(where=endless))
        assert prompts(table) == PROMPTS


def test_what_a_question_gathers_is_bounded(dataset: Dataset) -> None:
    gathering = "(select count(distinct a.index * b.index * c.index) from samples a, samples b, samples c) > 0"
    with sample_table(dataset) as table:
        assert len(table.keys(Query(where=gathering))) == 5
        settings = dict(table._connection.execute("select name, value from duckdb_settings()").fetchall())
        assert settings["max_temp_directory_size"] != "0 bytes"
        assert settings["enable_external_access"] == "false"
        assert settings["lock_configuration"] == "true"


def test_mentions(table: SampleTable) -> None:
    keys = table.keys()
    table.add_texts({keys[0]: "a green door", keys[1]: "a green roof"})
    table.add_texts({keys[4]: "nothing green"})

    def said(*words: str) -> list[str]:
        query = Query()
        for word in words:
            condition, parameters = mentions(word)
            query = query.also(condition, *parameters)
        return table.keys(query)

    assert said("GREEN") == [keys[0], keys[1], keys[4]]
    assert said("green", "house") == [keys[0]], "one word of the texts, one of the prompt"
    assert said(keys[3][:10].upper()) == [keys[3]]
    assert said("100%") == [keys[3]]
    assert said("%") == [keys[3]], "no wildcard"
    assert said("'") == [keys[3]]


def test_nothing_published(tmp_path: Path) -> None:
    dataset = built(tmp_path / "out", ["a"], tmp_path)
    with pytest.raises(UserError, match="nothing is published yet; run: resmaster publish"), sample_table(dataset):
        pass
    dataset.folder.write(layout.MANIFEST, b"PAR1 no table")
    with pytest.raises(ShardError, match="not a readable Parquet file"), sample_table(dataset):
        pass
