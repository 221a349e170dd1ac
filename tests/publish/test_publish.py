"""What is published is known: `status` and `verify` say when it is missing, old or damaged; two commands mend it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from resmaster_flows.cli.main import main
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.errors import ShardError
from resmaster_stages.inspection.published import Published, changed_files
from resmaster_stages.inspection.status import status
from resmaster_stages.inspection.verify import note, verify
from resmaster_stages.publish.publish import publish
from resmaster_stages.runner.run import run_stage
from tests.fake_stages import FAKES, planned

FILES = ("manifest.parquet", "index.json", "README.md", "report/index.html", "report/contact-000.png")


def build(dataset: Dataset, *shards: int) -> None:
    for shard in shards:
        for stage in dataset.hashes:
            run_stage(dataset, stage, shard, process=FAKES[stage])


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Two shards, committed and not published, as a build leaves them that was suspended or killed before its end."""
    made = planned(tmp_path / "out", ["a", "b", "bad high_res", "c"], tmp_path)
    build(made, 0, 1)
    return made


def state(dataset: Dataset) -> Published:
    return status(dataset).published


def files(dataset: Dataset) -> dict[str, bytes]:
    return {name: dataset.folder.read(name) for name in (*FILES, layout.PUBLICATION)}


def test_all_committed_and_nothing_published(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", dataset.url]) == 0
    said = f"the publication is missing; next: resmaster publish {dataset.url}"
    assert said in capsys.readouterr().out
    assert main(["verify", dataset.url]) == 1
    assert said in capsys.readouterr().err
    assert main(["publish", dataset.url]) == 0
    shown = capsys.readouterr()
    assert f"3 samples of 2 shards published in {dataset.url}" in shown.err
    assert shown.out == f"report: {dataset.url}/report/index.html\n"
    for command in ("status", "verify"):
        assert main([command, dataset.url]) == 0
        shown = capsys.readouterr()
        assert "the publication" not in shown.out + shown.err


def test_the_report_states_the_licences_of_the_models(dataset: Dataset) -> None:
    publish(dataset)
    page = dataset.folder.read("report/index.html").decode()
    assert "licence of the base model" in page
    assert "licence of the captioner" in page
    assert "licence of the VAE" not in page


def test_repair_publishes_where_only_that_is_missing(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["repair", dataset.url]) == 0
    assert "its publication is missing; nothing else to repair" in capsys.readouterr().err
    before = files(dataset)
    assert main(["repair", dataset.url]) == 0
    assert f"{dataset.url}: nothing to repair" in capsys.readouterr().err
    assert main(["publish", dataset.url]) == 0
    assert files(dataset) == before, "equal commits give equal files"


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


@pytest.mark.parametrize("harm", [truncate, flip, None], ids=["truncated", "flipped", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_mended(
    dataset: Dataset, name: str, harm: Callable[[bytes], bytes] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(dataset)
    before = files(dataset)
    if harm:
        dataset.folder.write(name, harm(before[name]))
    else:
        dataset.folder.remove(name)
    assert changed_files(dataset.folder) == (name,)
    assert state(dataset) == (Published() if harm is flip else Published("damaged", (name,))), "sizes are looked at"
    assert main(["verify", dataset.url]) == 1
    shown = capsys.readouterr()
    assert name.split("/")[-1] in shown.out
    assert "resmaster repair" in shown.err
    assert main(["repair", dataset.url]) == 0
    assert f"its publication is damaged ({name})" in capsys.readouterr().err
    assert files(dataset) == before
    assert main(["verify", dataset.url]) == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"commits": 1, "files": [{}]}', b"[" * 100_000])
def test_an_unreadable_record_is_damage_too(dataset: Dataset, content: bytes) -> None:
    publish(dataset)
    before = files(dataset)
    dataset.folder.write(layout.PUBLICATION, content)
    assert state(dataset) == Published("damaged", (layout.PUBLICATION,))
    assert [(damage.stage, damage.name) for damage in verify(dataset).damage] == [("publication", layout.PUBLICATION)]
    assert main(["repair", dataset.url]) == 0
    assert files(dataset) == before


@pytest.mark.parametrize("kind", ["folder", "link in a circle", "foreign names"])
def test_what_is_in_the_place_of_the_record_ends_no_command(
    dataset: Dataset, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(dataset)
    place = Path(dataset.url, layout.PUBLICATION)
    foreign = place.read_text().replace('"index.json"', '"../index.json"')
    place.unlink()
    if kind == "foreign names":
        place.write_text(foreign)
    else:
        place.mkdir() if kind == "folder" else place.symlink_to(place.name)
    for words, rc in ((["status"], 0), (["verify"], 1), (["publish"], 2 if kind == "folder" else 0)):
        assert main([*words, dataset.url]) == rc
        shown = capsys.readouterr()
        assert layout.PUBLICATION in shown.out + shown.err or words == ["publish"]
    assert main(["verify", dataset.url]) == (1 if kind == "folder" else 0)


def test_two_damaged_files_of_a_finished_dataset(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    publish(dataset)
    dataset.folder.write("manifest.parquet", dataset.folder.read("manifest.parquet")[:2000])
    dataset.folder.write("index.json", b"{\n")
    assert main(["status", dataset.url]) == 0
    assert "the publication is damaged (manifest.parquet, index.json)" in capsys.readouterr().out
    assert main(["publish", dataset.url]) == 0
    assert verify(dataset).damage == ()
    assert json.loads(dataset.folder.read("index.json"))["shardlist"]


def test_a_publication_of_fewer_or_other_commits_is_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = planned(tmp_path / "out", ["a", "b", "c", "d"], tmp_path)
    assert state(dataset).problem == "", "there is nothing to publish"
    build(dataset, 0)
    assert state(dataset).problem == "missing"
    assert main(["status", dataset.url]) == 0
    assert "the publication is missing; a build publishes at its end" in capsys.readouterr().out
    publish(dataset)
    assert state(dataset).problem == ""
    run_stage(dataset, "low_res", 1, process=FAKES["low_res"])
    assert state(dataset).problem == "", "the shard is not finished"
    assert main(["verify", dataset.url]) == 0
    build(dataset, 1)
    assert state(dataset).problem == "stale"
    assert main(["verify", dataset.url]) == 1
    publish(dataset)
    (record,) = (
        name for name in dataset.folder.names(f"commits/quality-{dataset.hashes['quality'][:8]}") if "1" in name[-6:]
    )
    dataset.folder.remove(record)
    assert state(dataset).problem == "stale"
    capsys.readouterr()
    assert main(["verify", dataset.url]) == 1, "readers are led to objects that no commit names"
    assert f"quality of shard 000001: {record}: gone; restore it from a copy, or repair" in capsys.readouterr().out
    run_stage(dataset, "quality", 1, process=FAKES["quality"])
    assert state(dataset).problem == "stale", "another attempt has other objects"


def test_a_damaged_shard_makes_the_publication_stale_until_it_is_left_out(dataset: Dataset) -> None:
    publish(dataset)
    (tar,) = (name for name in dataset.folder.names("high_res") if "000001-" in name)
    dataset.folder.write(tar, dataset.folder.read(tar)[:-600])
    note(dataset, verify(dataset))
    assert state(dataset).problem == "stale"
    assert publish(dataset).shards_missing == 1
    assert state(dataset).problem == ""


def test_what_cannot_be_published_says_what_to_do(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    (name, _) = dataset.folder.names("quality")
    dataset.folder.remove(name)
    assert main(["publish", dataset.url]) == 1
    assert f"{name} is gone; run: resmaster verify" in capsys.readouterr().err
    with pytest.raises(ShardError):
        publish(dataset)
    assert main(["publish", f"{dataset.url}/nowhere"]) == 2


def test_what_is_not_finished_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = planned(tmp_path / "out", ["a", "b", "c"], tmp_path)
    build(dataset, 0)
    assert main(["publish", dataset.url]) == 0
    err = capsys.readouterr().err
    assert "2 samples of 1 shards published" in err
    assert f"1 shards are not finished; next: resmaster repair {dataset.url}" in err


def test_to_publish_no_sample_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = planned(tmp_path / "out", ["a", "b"], tmp_path)
    assert main(["publish", dataset.url]) == 1
    err = capsys.readouterr().err
    assert "0 samples of 0 shards published" in err
    assert f"1 shards are not finished; next: resmaster repair {dataset.url}" in err
