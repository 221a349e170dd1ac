"""A publication honours choices: columns, counts, a curated index; and it knows when people have chosen since."""

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import webdataset as wds

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.curation import Choice, Session, now, read_choices
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.schemas import CURATION_SCHEMA, manifest_schema
from resmaster_stages.errors import ShardError
from resmaster_stages.inspection.leftovers import find_leftovers
from resmaster_stages.inspection.status import status
from resmaster_stages.inspection.verify import verify
from resmaster_stages.publish.publish import publish
from resmaster_stages.storage.filesystem import Folder
from resmaster_stages.storage.tables import decode_table
from tests.inspection.test_explain import built

PROMPTS = ["a house", "a tree", "a boat", "a hill", "a lake"]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return built(tmp_path / "out", PROMPTS, tmp_path)


def rows(dataset: Dataset) -> list[dict]:
    return decode_table(dataset.folder.read(layout.MANIFEST), manifest_schema(), "manifest").to_pylist()


def keys(dataset: Dataset) -> list[str]:
    return [row["key"] for row in rows(dataset)]


def read(dataset: Dataset, index: str) -> list[str]:
    """The prompts that plain webdataset reads by an index."""
    shards = [each["url"] for each in json.loads(dataset.folder.read(index))["shardlist"]]
    return [
        sample["txt"].decode()
        for sample in wds.WebDataset([dataset.folder.full(name) for name in shards], shardshuffle=False)
    ]


def test_columns_table_and_counts(dataset: Dataset) -> None:
    publish(dataset)
    first, second, *_ = keys(dataset)
    Session(dataset.folder).add(
        [
            Choice(first, "rejected", 1, "hands", "me", now()),
            Choice(second, rating=5, when=now()),
            Choice("f" * 32, "kept"),
        ]
    )
    published = publish(dataset)
    assert [(row["verdict"], row["rating"]) for row in rows(dataset)][:3] == [("rejected", 1), (None, 5), (None, None)]
    assert (published.chosen.kept, published.chosen.rejected, published.chosen.rated) == (0, 1, 2), "of its own samples"
    table = decode_table(dataset.folder.read(layout.CURATION_TABLE), CURATION_SCHEMA, "curation").to_pylist()
    assert [row["key"] for row in table] == sorted([first, second, "f" * 32])


def test_status_says_that_people_have_chosen_since(dataset: Dataset) -> None:
    publish(dataset)
    session, key = Session(dataset.folder), keys(dataset)[0]
    assert status(dataset).published.problem == ""
    session.add([Choice(key, "rejected", when=now())])
    found = status(dataset)
    assert found.published.problem == "other choices"
    assert "does not honour the latest choices; next: resmaster publish" in found.publication_line(dataset.url)
    publish(dataset)
    assert status(dataset).published.problem == ""
    before = {name: dataset.folder.read(name) for name in (layout.MANIFEST, layout.CARD, layout.PUBLICATION)}
    publish(dataset)
    assert before == {name: dataset.folder.read(name) for name in before}, "equal choices give equal files"
    session.add([Choice(key, when=now())])
    assert status(dataset).published.problem == "other choices"
    publish(dataset)
    assert not dataset.folder.exists(layout.CURATION_TABLE)
    assert status(dataset).published.problem == ""


def test_nothing_that_is_committed_changes(dataset: Dataset) -> None:
    publish(dataset)
    before = {file.name: dataset.folder.read(file.name) for file in dataset.folder.files("high_res")}
    Session(dataset.folder).add([Choice(key, "rejected", when=now()) for key in keys(dataset)[:2]])
    publish(dataset, curated=True)
    assert before == {file.name: dataset.folder.read(file.name) for file in dataset.folder.files("high_res")}
    assert not verify(dataset).damage


def test_the_curated_index(dataset: Dataset) -> None:
    """Two samples a shard: one shard without rejects, one with one, one with all."""
    publish(dataset)
    third, fifth = keys(dataset)[2], keys(dataset)[4]
    session = Session(dataset.folder)
    session.add([Choice(third, "rejected", when=now()), Choice(fifth, "rejected", when=now())])
    publish(dataset, curated=True)
    assert read(dataset, layout.CURATED_INDEX) == ["a house", "a tree", "a hill"]
    assert read(dataset, layout.INDEX) == PROMPTS
    items = json.loads(dataset.folder.read(layout.CURATED_INDEX))["shardlist"]
    assert [each["nsamples"] for each in items] == [2, 1]
    assert items[0]["url"].startswith("high_res/"), "a shard without rejected samples is not copied"
    assert layout.is_curated(items[1]["url"])
    assert all(dataset.folder.size(each["url"]) == each["filesize"] for each in items)
    assert "curated/" in dataset.folder.read(layout.CARD).decode()
    publish(dataset)
    assert dataset.folder.exists(layout.CURATED_INDEX), "a later publication keeps it up to date"
    session.add([Choice(third, when=now())])
    publish(dataset)
    assert read(dataset, layout.CURATED_INDEX) == PROMPTS[:4]
    publish(dataset, curated=False)
    assert not dataset.folder.exists(layout.CURATED_INDEX)
    publish(dataset)
    assert not dataset.folder.exists(layout.CURATED_INDEX)


def test_a_copy_is_made_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(dataset)
    Session(dataset.folder).add([Choice(keys(dataset)[2], "rejected", when=now())])
    publish(dataset, curated=True)
    uploads: list[str] = []
    upload = Folder.upload
    monkeypatch.setattr(Folder, "upload", lambda self, name, path: (uploads.append(name), upload(self, name, path))[1])
    publish(dataset)
    assert not [name for name in uploads if layout.is_curated(name)]
    [copy] = dataset.folder.files(layout.CURATED)
    dataset.folder.remove(copy.name)
    publish(dataset)
    assert copy.name in uploads, "one that is gone is made again"


def test_gc_removes_copies_that_no_reader_needs(dataset: Dataset) -> None:
    publish(dataset)
    session, key = Session(dataset.folder), keys(dataset)[2]
    session.add([Choice(key, "rejected", when=now())])
    publish(dataset, curated=True)
    [copy] = dataset.folder.files(layout.CURATED)
    hour = timedelta(hours=1)

    def leftovers(after: timedelta) -> list[str]:
        return [leftover.file.name for leftover in find_leftovers(dataset, hour, datetime.now(UTC) + after)]

    assert leftovers(3 * hour) == []
    session.add([Choice(key, when=now())])
    publish(dataset)
    os.utime(dataset.folder.full(copy.name), (1, 1))
    assert leftovers(hour / 2) == [], "somebody may still read by the index before"
    assert leftovers(3 * hour) == [copy.name]
    dataset.folder.write(layout.CURATED_INDEX, b"damaged")
    assert leftovers(3 * hour) == []


def test_verify_names_a_curated_index_that_was_changed(dataset: Dataset) -> None:
    publish(dataset, curated=True)
    dataset.folder.write(layout.CURATED_INDEX, b"{}")
    assert status(dataset).published.files == (layout.CURATED_INDEX,)
    publish(dataset)
    assert status(dataset).published.problem == ""


def test_choices_that_cannot_be_read_are_not_passed_over(dataset: Dataset) -> None:
    dataset.folder.write(layout.choices("20260101T000000", "00000000"), b"damaged")
    with pytest.raises(ShardError, match="not a readable Parquet file"):
        publish(dataset)
    with pytest.raises(ShardError):
        read_choices(dataset.folder)
