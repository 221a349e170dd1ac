"""The overview of a root: what it counts, what comes first, what a bad folder costs, and how many requests it takes."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.curation import Choice, Session
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.errors import UserError
from resmaster_stages.inspection import overview as module
from resmaster_stages.inspection.known import Known
from resmaster_stages.inspection.numbers import DatasetNumbers, PublicationNumbers, StageNumbers, dataset_numbers
from resmaster_stages.inspection.overview import HEADINGS, cells, concern, facts, look, overview, spell_age
from resmaster_stages.inspection.status import status
from resmaster_stages.publish.publish import publish
from resmaster_stages.storage.filesystem import Folder, open_root
from tests.fake_stages import FAKES
from tests.faulty_proxy import faulty
from tests.inspection.several import FAILING, made, several, work
from tests.s3_server import S3Server


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Five datasets, which tests only read."""
    folder = tmp_path_factory.mktemp("overview")
    several(folder / "out", folder)
    return open_root(str(folder / "out"))


def numbers_of(dataset: Dataset, limit: int | None = None) -> DatasetNumbers:
    return dataset_numbers(dataset, dataset.folder.names(""), Known(), limit)


def test_what_needs_attention_first_stands_first(root: Folder) -> None:
    found = overview(root)
    rows = [(numbers.name, concern(numbers, found.seen).text) for numbers in found.datasets]
    assert rows == [
        ("damaged", "1 commit damaged"),
        ("failing", "1 shard failed"),
        ("new", "nothing committed yet"),
        ("half", "incomplete"),
        ("done", ""),
    ]
    assert [concern(numbers, found.seen).urgent for numbers in found.datasets] == [True, True, False, False, False]
    later = {numbers.name: concern(numbers, found.seen + 7300).text for numbers in found.datasets}
    assert later["half"] == "no commit for 2 h"
    assert (later["done"], later["new"]) == ("", "nothing committed yet")
    assert (found.count, found.others) == ("5 datasets", ())


def test_the_numbers_are_those_of_the_status_of_each_dataset(root: Folder) -> None:
    for numbers in overview(root).datasets:
        dataset = module.dataset_in(root.sub(numbers.name))
        told = status(dataset)
        assert (numbers.shards, numbers.samples, numbers.complete) == (told.shards, told.samples, told.complete)
        for stage, same in zip(numbers.stages, told.stages, strict=True):
            for name in ("stage", "committed", "pending", "failed", "samples_ok", "samples_failed", "seconds"):
                assert getattr(stage, name) == getattr(same, name), (numbers.name, stage.stage, name)
            assert stage.damaged == len(same.damaged_shards)
        assert not numbers.estimated


def test_a_price_makes_hours_money(root: Folder) -> None:
    by_name = {numbers.name: facts(numbers, 0.0) for numbers in overview(root).datasets}
    half = by_name["half"]
    assert half["cost"] == pytest.approx(half["device_hours"] * 3600, rel=0.2, abs=0.4), "one a second"
    assert (half["price"], half["max_cost"]) == (3600.0, 1e8)
    assert by_name["done"]["cost"] is None


def test_what_is_flagged_and_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quality = FAKES["quality"]

    def flags(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for output, sample in zip(quality(config, samples), samples, strict=True):
            found = ["blank", "seam"] if sample.prompt in "abc" else []
            yield replace(output, rows=[{**row, "flags": found} for row in output.rows])

    monkeypatch.setitem(FAKES, "quality", flags)
    dataset = made(tmp_path / "out", tmp_path, "flagged", "abcd")
    assert numbers_of(dataset).publication.flagged == 3
    keys = dataset.plan.keys_of(0)
    session = Session(dataset.folder)
    session.add([Choice(keys[0], "rejected", when="2026-11-30T00:00:00+00:00")])
    assert numbers_of(dataset).publication.rejected == 1
    session.add([Choice(keys[0], "kept", when="2026-11-30T00:00:01+00:00"), Choice(keys[1], "rejected")])
    known = Known()
    assert dataset_numbers(dataset, dataset.folder.names(""), known, None).publication.rejected == 1
    session.add([Choice(keys[0], "rejected", when="2026-11-30T00:00:02+00:00")])
    assert dataset_numbers(dataset, dataset.folder.names(""), known, None).publication.rejected == 2, "the file changed"


def test_a_publication_that_cannot_be_read_costs_its_own_numbers_alone(tmp_path: Path) -> None:
    dataset = made(tmp_path / "out", tmp_path, "done", "abcd")
    Path(dataset.folder.full(layout.MANIFEST)).write_bytes(b"PAR1 no more")
    numbers = numbers_of(dataset)
    assert numbers.progress == 1
    assert concern(numbers, 0).text.startswith("publication: manifest.parquet: not a readable Parquet file")
    Path(dataset.folder.full(layout.MANIFEST)).unlink()
    assert concern(numbers_of(dataset), 0).urgent


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"price": 1.0, "max_cost": 2.0}, "cost above max_cost 2"),
        ({"max_failure_ratio": 0.01}, "20 % of samples failed"),
        ({"redo_samples": 3}, "3 samples to make again"),
        ({"publication": PublicationNumbers()}, "not published"),
        ({"publication": PublicationNumbers(there=True, problem="gone")}, "publication: gone"),
        ({}, ""),
    ],
)
def test_further_concerns(change: dict[str, Any], text: str) -> None:
    assert concern(replace(whole(), **change), 1000.0).text == text


def whole() -> DatasetNumbers:
    """A dataset of ten samples, of which two failed, after three hours of work."""
    stage = StageNumbers("low_res", 5, 0, 0, 0, 8, 2, 10_800.0, 999.0, 10, {}, 0.0, 1, {}, {}, 0, False)
    return DatasetNumbers("x", "/out", 5, 10, (stage,), 0.0, 0, PublicationNumbers(True), 7200.0, 0.5, None, None)


def test_a_bad_folder_costs_a_line_and_not_the_others(tmp_path: Path) -> None:
    root = tmp_path / "out"
    made(root, tmp_path, "good", "ab")
    for name in ("broken", "planless", "lost"):
        made(root, tmp_path, name, "ab")
    (root / "broken" / "config.json").write_text("{")
    (root / "lost" / "config.json").unlink()
    for path in (root / "planless" / "plan").rglob("*.*"):
        path.unlink()
    made(root / "nested", tmp_path, "inner", "ab")
    (root / "empty").mkdir()
    (root / ".hidden").mkdir()
    (root / ".hidden" / "file").write_text("x")
    (root / "notes.txt").write_text("x")
    (root / "\u202eevil\x1b[1m").mkdir()
    (root / "\u202eevil\x1b[1m" / "file").write_text("x")
    found = overview(open_root(str(root)))
    assert [numbers.name for numbers in found.datasets] == ["good"]
    unreadable = {each.name: each.line for each in found.unreadable}
    assert sorted(unreadable) == ["broken", "lost", "planless"]
    assert unreadable["broken"].startswith(f"{root}/broken/config.json: damaged")
    assert unreadable["lost"] == (
        f"{root}/lost: config.json is gone; restore it from a copy, or run the same configuration again: "
        "resmaster run CONFIG"
    )
    assert "restore the folder plan/" in unreadable["planless"]
    lines = {each.name: each.line for each in found.foreign}
    assert lines["nested"].endswith(f"if datasets lie below it: resmaster status {root}/nested")
    assert all(line.isprintable() for line in lines.values())
    assert len(lines) == 2
    assert found.count == "4 datasets"
    assert json.loads(json.dumps(found.to_json()))["unreadable"] == unreadable


def test_a_root_with_too_many_folders(root: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FOLDERS", 4)
    with pytest.raises(UserError, match="5 folders are too many"):
        overview(root)


def test_a_large_dataset_is_estimated_and_a_rare_failure_is_not_missed(tmp_path: Path) -> None:
    """12 shards of two samples, of which one fails. Only `quality` does not know that one shard gets one sample."""
    prompts = [f"p{number}" for number in range(24)]
    prompts[7] = "bad high_res"
    dataset = made(tmp_path / "out", tmp_path, "large", prompts)
    exact, about = numbers_of(dataset), numbers_of(dataset, 3)
    assert (exact.estimated, about.estimated) == (False, True)
    for stage, same in zip(about.stages, exact.stages, strict=True):
        for name in ("committed", "samples_failed", "last_commit", "native_rows"):
            assert getattr(stage, name) == pytest.approx(getattr(same, name)), (stage.stage, name)
    assert [stage.samples_ok for stage in exact.stages] == [24, 24, 23, 23]
    assert [stage.samples_ok for stage in about.stages[:3]] == [24, 24, 23]
    assert 12 <= about.stages[3].samples_ok <= 24
    assert [stage.samples_failed for stage in about.stages] == [0, 0, 1, 0]
    assert 0 < about.seconds < 5 * exact.seconds
    assert cells(about, 0.0)[HEADINGS.index("samples failed")] == "~1"


def test_failures_of_shards_without_a_commit_are_estimated(tmp_path: Path) -> None:
    prompts = [f"bad low_res {number}" for number in range(12)]
    dataset = made(tmp_path / "out", tmp_path, "down", prompts, 6)
    numbers = numbers_of(dataset, 2)
    assert (numbers.stages[0].failed, numbers.samples_failed, numbers.estimated) == (6, 12, True)


class Asked:
    """The names that folders are asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for name in ("read", "names", "files", "open", "exists"):
            self._watch(monkeypatch, name)
        read_many = Folder.read_many
        monkeypatch.setattr(
            Folder, "read_many", lambda f, names, **kw: self.names.extend(names) or read_many(f, names, **kw)
        )

    def _watch(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        call: Callable[..., Any] = getattr(Folder, name)
        monkeypatch.setattr(Folder, name, lambda f, at="", *a, **kw: self.names.append(at) or call(f, at, *a, **kw))


def test_a_second_look_reads_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = made(tmp_path / "out", tmp_path, "growing", FAILING, 1)
    known = Known()
    look(dataset.folder, known, None, pixels=True)
    work(dataset, [1, 2])
    asked = Asked(monkeypatch)
    found = look(dataset.folder, known, None, pixels=True)
    assert isinstance(found, DatasetNumbers)
    assert replace(found, megapixels=0.0) == numbers_of(dataset)
    asked.names.clear()
    look(dataset.folder, known, None, pixels=True)
    records = re.compile(r"commits/.*\.json|errors/.*\.parquet|plan/.*\.parquet|manifest")
    assert [name for name in asked.names if records.match(name)] == []


def test_a_record_that_is_made_anew_under_its_name_is_read_again(tmp_path: Path) -> None:
    dataset = made(tmp_path / "out", tmp_path, "demo", "ab")
    known = Known()
    before = look(dataset.folder, known, None)
    commits = dataset.commits("quality")
    commits.drop([0])
    assert isinstance(before, DatasetNumbers)
    gone = look(dataset.folder, known, None)
    assert isinstance(gone, DatasetNumbers)
    assert (gone.stages[-1].committed, gone.stages[-1].samples_ok) == (0, 0)
    work(dataset, [0])
    again = look(dataset.folder, known, None)
    assert isinstance(again, DatasetNumbers)
    assert again.stages[-1].last_commit is not None
    assert again.stages[-1].last_commit >= (before.stages[-1].last_commit or 0)
    assert again == numbers_of(dataset)


@pytest.mark.s3
def test_requests_on_s3_do_not_grow_with_shards(
    s3_root: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the store sees them. RECORDS of each stage are read, however many there are."""
    import s3fs

    monkeypatch.setattr(module, "RECORDS", 2)
    for name, shards in (("two", 2), ("nine", 9)):
        dataset = made(s3_root, tmp_path, name, (f"p{number}" for number in range(2 * shards)), shards)
        if name == "two":
            publish(dataset)

    def requests(look_at: Callable[[], Any]) -> Counter[str]:
        with faulty(s3_server.endpoint, lambda *_: None) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            s3fs.S3FileSystem.clear_instance_cache()
            look_at()
            kinds = Counter(
                "list" if "list-type" in path else "record" if "/commits/" in path else "other"
                for (method, path), count in proxy.seen.items()
                for _ in range(count)
            )
        return kinds

    seen = {name: requests(lambda n=name: look(open_root(f"{s3_root}/{n}"), Known(), 2)) for name in ("two", "nine")}
    assert seen["nine"] == seen["two"]
    assert seen["nine"]["record"] == 4 * 2, "two of each of four stages"
    assert seen["nine"]["list"] <= 8
    assert seen["nine"]["other"] <= 8
    whole = requests(lambda: overview(open_root(s3_root)))
    assert whole.total() == seen["two"].total() + seen["nine"].total() + 1, "one listing of the root beside"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "119 min"), (7200, "2 h"), (200_000, "2 d")],
)
def test_ages(seconds: float, text: str) -> None:
    assert spell_age(seconds) == text
