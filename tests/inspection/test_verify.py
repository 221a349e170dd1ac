"""Damage of every kind: found by shard and stage, and put back to the byte, on a folder and on S3."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileOpener

from resmaster_flows.cli.main import main
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.damage import drop_unreadable_records, give_up_damaged
from resmaster_stages.dataset.dataset import Dataset, create_or_open
from resmaster_stages.dataset.layout import commit as commit_name
from resmaster_stages.dataset.ledger import DIGEST, ledger_is_whole, ledger_rows
from resmaster_stages.dataset.publication import PublicationRecord
from resmaster_stages.dataset.records import record_text
from resmaster_stages.dataset.retry import number_of, retries_of
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.schemas import LEDGER_SCHEMA
from resmaster_stages.dataset.stages import Process, Stage
from resmaster_stages.errors import ShardError
from resmaster_stages.inspection import verify as verify_module
from resmaster_stages.inspection.status import pending
from resmaster_stages.inspection.verify import Damage, note, verify
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.publish.publish import publish
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.filesystem import Folder
from resmaster_stages.storage.tables import decode_table, encode_table, facts_of
from tests.checkout import PYTHONPATH, ROOT
from tests.durability.injection import everything
from tests.fake_stages import FAKES, files_of, planned

PROMPTS = ["a", "b", "bad low_res", "c", "d", "e", "f", "g"]
"""Two shards of four samples; the first one has an error ledger."""


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    root = request.getfixturevalue("s3_root") if request.param == "s3" else str(tmp_path / "out")
    made = planned(root, PROMPTS, tmp_path, samples_per_shard=4)
    work(made)
    return made


@pytest.fixture
def local(tmp_path: Path) -> Dataset:
    made = planned(tmp_path / "out", PROMPTS, tmp_path, samples_per_shard=4)
    work(made)
    return made


def listed(stage: str, shard: int, done: list[tuple[str, int]]) -> Process:
    """A stand-in stage that says when it is really computed."""

    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        if (stage, shard) not in done:
            done.append((stage, shard))
        yield from FAKES[stage](config, samples)

    return process


def work(dataset: Dataset) -> list[tuple[str, int]]:
    """What a repair does, without Prefect; returns what it computed."""
    done: list[tuple[str, int]] = []
    drop_unreadable_records(dataset)
    todo = pending(dataset)
    for shard in sorted({shard for shards in todo.values() for shard in shards}):
        for stage in todo:
            run_stage(dataset, stage, shard, process=listed(stage, shard, done))
    write_manifest(dataset)
    return done


@pytest.mark.parametrize("kind", ["folder", "link in a circle", "bad sector"])
def test_an_object_that_cannot_be_read_is_damage_like_others(
    local: Dataset, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [receipt_of(local, "high_res", 1).objects[0].name, receipt_of(local, "low_res", 0).ledger]
    names.append(commit_name("captions", local.hashes["captions"], 0))
    real = LocalFileOpener.read

    def bad(self: LocalFileOpener, *size: int) -> bytes:
        if self.path.endswith(tuple(map(str, names))):
            raise OSError(errno.EIO, "Input/output error")
        return real(self, *size)

    places = [Path(local.url, str(name)) for name in names]
    for place in places:
        if kind == "bad sector":
            monkeypatch.setattr(LocalFileOpener, "read", bad)
        else:
            place.unlink()
            place.mkdir() if kind == "folder" else place.symlink_to(place.name)
    found = verify(local)
    assert {damage.name for damage in found.damage} == set(names)
    note(local, found)
    key = local.plan.read(1)[0].key
    assert main(["explain", local.url, key]) == 0
    assert f"{names[0]} cannot be read; run: resmaster verify" in capsys.readouterr().out
    assert main(["status", local.url]) in (1, 2), "the record of a commit is missed"
    assert names[2] in capsys.readouterr().err
    monkeypatch.undo()
    for place in places:
        if kind == "folder":  # as the message of a repair asks
            place.rmdir()
    work(local)
    note(local, verify(local))
    assert verify(local).damage == ()
    assert not any(pending(local).values())


def test_a_folder_in_the_place_of_a_record_costs_its_shard_and_is_to_be_removed(
    local: Dataset, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stage, "function", lambda stage: FAKES[stage.name])
    record = Path(local.url, commit_name("captions", local.hashes["captions"], 0))
    damaged = receipt_of(local, "captions", 1).objects[0]
    record.unlink()
    record.mkdir()
    for options in ([], ["--replace"]):
        local.folder.write(damaged.name, b"x")
        assert main(["verify", local.url]) == 1
        capsys.readouterr()
        assert main(["repair", local.url, *options]) == 1
        (line,) = (line for line in capsys.readouterr().err.splitlines() if "not finished" in line)
        assert line.startswith("shard 000000 not finished: ")
        assert f"{record}: a folder is in the way where a file is needed; remove the folder" in line
        assert not any(1 in shards for shards in pending(local).values()), "the other shard is made again"
    record.rmdir()
    assert main(["repair", local.url]) == 0
    assert main(["verify", local.url]) == 0


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no table"])
def test_a_damaged_ledger_ends_no_command_and_is_mended(
    local: Dataset, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    name = receipt_of(local, "low_res", 0).ledger
    assert name is not None
    whole = local.folder.read(name)
    local.folder.write(name, content)
    key = local.plan.read(0)[0].key
    for words in (["status"], ["status", "--openmetrics"], ["publish"], ["explain", key]):
        assert main([words[0], local.url, *words[1:]]) == 0
    assert f"left out: {name}: not a readable Parquet file" in caplog.text
    note(local, verify(local))
    assert work(local) == [("low_res", 0)]
    assert ledger_is_whole(local.folder, name)
    assert len(local.folder.read(name)) == len(whole)
    assert not any(pending(local).values())


def test_a_ledger_with_other_rows_than_were_written_is_damage(local: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    name = receipt_of(local, "low_res", 0).ledger
    assert name is not None
    whole = local.folder.read(name)
    rows = decode_table(whole, LEDGER_SCHEMA, name).to_pylist()
    facts = {DIGEST: facts_of(whole, name)[DIGEST]}
    assert encode_table(rows, LEDGER_SCHEMA, facts) == whole
    local.folder.write(name, encode_table([{**rows[0], "message": "another"}], LEDGER_SCHEMA, facts))
    assert [(damage.name, damage.what) for damage in verify(local).damage] == [(name, "unreadable")]
    assert ledger_rows(local.commits("low_res")) == []
    assert "its rows were changed since they were written" in caplog.text
    note(local, verify(local))
    assert work(local) == [("low_res", 0)]
    assert ledger_rows(local.commits("low_res")) == rows, "with the number of its attempt"


def receipt_of(dataset: Dataset, stage: str, shard: int) -> Receipt:
    return dataset.commits(stage).read_all()[shard]


def change(dataset: Dataset, name: str, edit: Callable[[bytes], bytes]) -> None:
    dataset.folder.write(name, edit(dataset.folder.read(name)))


def flipped(offset: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:offset] + bytes([data[offset] ^ 0x10]) + data[offset + 1 :]


def keys_of(dataset: Dataset, shard: int) -> list[str]:
    return [sample.key for sample in dataset.plan.read(shard)]


def test_a_whole_dataset(dataset: Dataset) -> None:
    found = verify(dataset)
    assert found.damage == ()
    assert found.objects == 1 + 8 + 1  # plan, stages, ledger
    named = [receipt_of(dataset, stage, shard).objects[0].bytes for stage in FAKES for shard in (0, 1)]
    assert found.bytes >= sum(named) > 0
    note(dataset, found)
    assert not list(dataset.folder.files("damaged"))


def test_all_kinds_of_damage_at_once_are_found_and_mended(dataset: Dataset) -> None:
    before, stamps = everything(dataset.config.root), {file.name: file.modified for file in dataset.folder.files()}
    high, low = receipt_of(dataset, "high_res", 1), receipt_of(dataset, "low_res", 0)
    captions, quality = receipt_of(dataset, "captions", 1), receipt_of(dataset, "quality", 0)
    record = commit_name("quality", quality.stage_hash, 1)
    keys = keys_of(dataset, 1)
    tar = dataset.folder.read(high.objects[0].name)
    change(dataset, high.objects[0].name, flipped(tar.index(f"{keys[2]}.png".encode()) + 520))
    change(dataset, low.objects[0].name, lambda data: data[:4000])
    dataset.folder.remove(captions.objects[0].name)
    change(dataset, quality.objects[0].name, lambda data: data[:-100])
    dataset.folder.remove(low.ledger or "")
    change(dataset, record, lambda data: data[:50])

    found = verify(dataset)
    assert found.damage == (
        Damage("low_res", 0, low.ledger or "", "gone"),
        Damage("low_res", 0, low.objects[0].name, "cut off"),
        Damage("captions", 1, captions.objects[0].name, "gone"),
        Damage("high_res", 1, high.objects[0].name, "changed"),
        Damage("quality", 0, quality.objects[0].name, "cut off"),
        Damage("quality", 1, record, "unreadable"),
    )
    note(dataset, found)
    assert {stage: shards for stage, shards in pending(dataset).items() if shards} == {
        "low_res": [0],
        "captions": [1],
        "high_res": [1],
        "quality": [0, 1],
    }
    assert work(dataset) == [("low_res", 0), ("quality", 0), ("captions", 1), ("high_res", 1), ("quality", 1)]
    assert everything(dataset.config.root) == before
    for receipt in (high, low, captions, quality):
        assert receipt_of(dataset, receipt.stage, receipt.shard) == receipt, "a commit record never changes"
    assert verify(dataset).damage == ()
    assert not list(dataset.folder.files("damaged"))
    changed = {file.name for file in dataset.folder.files() if stamps.get(file.name) != file.modified}
    if dataset.folder.local:  # an object store's clock is too coarse to tell
        untouched = receipt_of(dataset, "high_res", 0).objects[0].name
        assert untouched not in changed
        assert high.objects[0].name in changed


def test_other_bytes_are_not_put_back_unless_they_are_asked_for(local: Dataset) -> None:
    """As on another kind of GPU: the same shard comes out a little different."""
    low = receipt_of(local, "low_res", 0)
    change(local, low.objects[0].name, flipped(600))
    damaged = local.folder.read(low.objects[0].name)
    note(local, verify(local))

    def other(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for output in FAKES["low_res"](config, samples):
            yield output if output.error else Output(output.key, files={**output.files, "txt": b"other"})

    with pytest.raises(ShardError, match=r"other bytes than its commit recorded .*nothing was put back.* --replace"):
        run_stage(local, "low_res", 0, process=other)
    assert local.folder.read(low.objects[0].name) == damaged
    assert local.commits("low_res").marked() == [0]
    assert receipt_of(local, "low_res", 0) == low

    give_up_damaged(local)
    assert {stage: shards for stage, shards in pending(local).items() if shards} == {stage: [0] for stage in FAKES}
    assert run_stage(local, "low_res", 0, process=other).attempt != low.attempt
    assert [stage for stage, _ in work(local)] == ["captions", "high_res", "quality"]
    assert verify(local).damage == ()


def test_giving_up_can_be_limited_to_shards(local: Dataset) -> None:
    for shard in (0, 1):
        change(local, receipt_of(local, "high_res", shard).objects[0].name, flipped(600))
    note(local, verify(local))
    give_up_damaged(local, [1])
    committed = {stage: set(local.commits(stage).numbers()) for stage in FAKES}
    assert committed == {"low_res": {0, 1}, "captions": {0, 1}, "high_res": {0}, "quality": {0}}


def test_giving_up_begins_with_what_was_made_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So wherever it is broken off, nothing is left without what it was made from."""
    dataset = planned(tmp_path / "out", ["a", "bad low_res", "b"], tmp_path, samples_per_shard=3)
    work(dataset)
    retry(dataset, healed)
    change(dataset, receipt_of(dataset, "low_res", 0).objects[0].name, flipped(600))
    note(dataset, verify(dataset))
    removed: list[str] = []
    real = Folder.remove

    def remove(self: Folder, name: str) -> None:
        removed.append(name)
        real(self, name)

    monkeypatch.setattr(Folder, "remove", remove)
    give_up_damaged(dataset)
    made = [(stage, number) for stage in FAKES for number in (1, 2)]
    wanted = [commit_name(stage, dataset.hashes[stage], 0, number) for stage, number in reversed(made)]
    assert [name for name in removed if name.startswith("commits/")] == wanted


def test_a_later_attempt_is_verified_and_mended_too(tmp_path: Path) -> None:
    dataset = planned(tmp_path / "out", ["a", "bad low_res", "b bad low_res", "c"], tmp_path, samples_per_shard=4)
    relaxed = replace(dataset, config=dataset.config.model_copy(update={"max_failure_ratio": 0.5}))
    work(relaxed)
    retry(relaxed, half_healed)
    first, second = (dataset.commits("low_res").attempt(0, number) for number in (1, 2))
    assert first
    assert second
    before = {file.name: dataset.folder.read(file.name) for file in dataset.folder.files()}
    found = verify(dataset)
    assert (found.damage, found.objects) == ((), 1 + 4 + 1), "of the attempts that count"
    tars = {name for name in before if name.startswith(("low_res/", "high_res/"))}
    assert len(tars) == 4
    for name in tars:
        dataset.folder.remove(name)
    dataset.folder.remove(first.ledger or "")
    found = verify(dataset)
    counting = [receipt_of(dataset, stage, 0).objects[0].name for stage in ("low_res", "high_res")]
    assert [damage.name for damage in found.damage] == counting
    note(dataset, found)
    for stage, process in (("low_res", half_healed), ("high_res", FAKES["high_res"])):
        assert run_stage(dataset, stage, 0, process=process) == dataset.commits(stage).read(0)
    again = {file.name: dataset.folder.read(file.name) for file in dataset.folder.files()}
    gone = (tars - set(counting)) | {first.ledger}
    assert again == {name: data for name, data in before.items() if name not in gone}, "nobody reads the others"

    dataset.folder.remove(second.ledger or "")
    note(dataset, verify(dataset))
    assert run_stage(dataset, "low_res", 0, process=healed) == second
    (row,) = ledger_rows(dataset.commits("low_res"))
    assert (row["key"],) == second.failed_keys
    assert "its error is lost with the ledger" in row["message"]
    assert verify(dataset).damage == ()


def test_an_unreadable_record_of_a_later_attempt_takes_along_the_earlier_ones(tmp_path: Path) -> None:
    dataset = planned(tmp_path / "out", ["a", "bad low_res", "b"], tmp_path, samples_per_shard=3)
    work(dataset)
    retry(dataset, healed)
    for number in (2, 1):
        record = commit_name("low_res", dataset.hashes["low_res"], 0, number)
        change(dataset, record, lambda data: data[:-30])
        found = verify(dataset)
        assert [(damage.name, damage.what, damage.shard) for damage in found.damage] == [(record, "unreadable", 0)]
        note(dataset, found)
        assert work(dataset) == [(stage, 0) for stage in FAKES], "a first attempt"
        assert verify(dataset).damage == ()
        retry(dataset, healed)


def retry(dataset: Dataset, low_res: Process) -> None:
    """Another attempt at what failed, and all that follows from it."""
    retries, _ = retries_of(dataset)
    for stage in FAKES:
        process = {**FAKES, "low_res": low_res}[stage]
        run_stage(dataset, stage, 0, process=process, number=number_of(retries, stage, 0))
    write_manifest(dataset)


def half_healed(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    """The stage low_res, where the prompt `bad low_res` does not fail any more, and longer ones do."""
    for sample in samples:
        yield from (healed if sample.prompt == "bad low_res" else FAKES["low_res"])(config, [sample])


def healed(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    """The stage low_res, where nothing fails any more."""
    for sample in samples:
        yield Output(sample.key, files=files_of(sample, 16))


def test_an_unreadable_record_takes_along_what_was_made_from_it(local: Dataset) -> None:
    before = everything(local.config.root)
    change(local, commit_name("captions", local.hashes["captions"], 0), lambda data: data[:-30])
    (damage,) = verify(local).damage
    assert (damage.stage, damage.shard, damage.what) == ("captions", 0, "unreadable")
    note(local, verify(local))
    assert work(local) == [("captions", 0), ("high_res", 0), ("quality", 0)]
    assert everything(local.config.root) == before
    assert verify(local).damage == ()


def test_a_shard_whose_record_is_gone_is_whole_after_one_repair(local: Dataset) -> None:
    """It is not marked: the mark would outlive its repair, and hide the shard from readers."""
    publish(local)
    record = commit_name("captions", local.hashes["captions"], 1)
    local.folder.remove(record)
    found = verify(local)
    assert (record, "gone") in {(damage.name, damage.what) for damage in found.damage}
    note(local, found)
    assert work(local) == [("captions", 1)]
    assert not any(pending(local).values())
    assert publish(local).shards_missing == 0


@pytest.mark.parametrize("case", ["all its samples failed", "another shard is not finished"])
def test_a_record_that_is_gone_is_missed_wherever_its_shard_was_published(tmp_path: Path, case: str) -> None:
    prompts = ["a", "bad low_res"] if case == "all its samples failed" else ["a", "b"]
    dataset = planned(tmp_path / "out", prompts, tmp_path, samples_per_shard=1)
    work(dataset)
    shard = 1
    if case == "another shard is not finished":
        shard = 0
        dataset.commits("quality").drop([1])
    publish(dataset)
    assert verify(dataset).damage == ()
    record = commit_name("low_res", dataset.hashes["low_res"], shard)
    dataset.folder.remove(record)
    found = verify(dataset).damage
    assert [(damage.what, damage.shard, damage.mend) for damage in found if damage.name == record] == [
        ("gone", shard, verify_module.RECORD_GONE)
    ]


def test_a_published_object_of_an_unreadable_record_is_no_damage_of_its_own(local: Dataset) -> None:
    publish(local)
    record = commit_name("high_res", local.hashes["high_res"], 1)
    change(local, record, lambda data: data[:-30])
    assert [(damage.name, damage.what) for damage in verify(local).damage] == [(record, "unreadable")]


def test_a_record_of_other_samples_is_told_and_one_of_a_stranger_is_left_alone(local: Dataset) -> None:
    receipt = receipt_of(local, "quality", 1)
    record = commit_name("quality", receipt.stage_hash, 1)
    local.folder.write("commits/another-01234567/000000.json", b"{")
    assert verify(local).damage == ()
    for other in (
        replace(receipt, keys_digest="0" * 64),
        replace(receipt, samples_ok=receipt.samples_ok + 1),
        replace(receipt, samples_failed=1, failed_keys=("f" * 32,)),
    ):
        local.folder.write(record, record_text(other))
        (damage,) = verify(local).damage
        assert (damage.name, damage.what) == (record, "of other samples than the plan's")
        assert damage.mend == verify_module.CONTRADICTION


def test_a_link_to_nothing_in_the_place_of_a_record_is_replaced(local: Dataset) -> None:
    record = commit_name("captions", local.hashes["captions"], 1)
    place = Path(local.url, record)
    place.unlink()
    place.symlink_to("nowhere")
    found = verify(local)
    assert [(damage.name, damage.what) for damage in found.damage] == [(record, "unreadable")]
    note(local, found)
    assert work(local) == [("captions", 1), ("high_res", 1), ("quality", 1)]
    assert verify(local).damage == ()


@pytest.mark.parametrize("what", ["configuration", "plan", "plan file", "commit", "object", "ledger", "publication"])
def test_an_outage_is_no_damage(local: Dataset, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    low = receipt_of(local, "low_res", 0)
    dataset = create_or_open(local.config.model_copy(update={"webp_quality": 90}))
    work(dataset)
    publish(dataset)
    name = {
        "configuration": layout.CONFIG,  # the one before
        "plan": layout.plan_record(0),
        "plan file": dataset.plan.generations[0].parts[0].stored.name,
        "commit": commit_name("low_res", low.stage_hash, 0),
        "object": low.objects[0].name,
        "ledger": low.ledger or "",
        "publication": layout.PUBLICATION,
    }[what]
    assert verify(dataset).damage == ()
    real_cat, real_open = Folder._cat, Folder.open

    def cat(self: Folder, path: str) -> bytes:
        if path.endswith(f"/{name}"):
            raise ConnectionError("the store is down")
        return real_cat(self, path)

    def opened(self: Folder, each: str, *size: int) -> Any:
        if each == name:
            raise ConnectionError("the store is down")
        return real_open(self, each, *size)

    monkeypatch.setattr(Folder, "_cat", cat)
    monkeypatch.setattr(Folder, "open", opened)
    with pytest.raises(ConnectionError, match="the store is down"):
        verify(dataset)


def test_damage_of_an_older_configuration_is_told_and_not_marked(local: Dataset) -> None:
    old = receipt_of(local, "high_res", 0).objects[0]
    config = local.config.model_copy(update={"webp_quality": 90})
    changed = create_or_open(config)
    assert changed.hashes["high_res"] != local.hashes["high_res"]
    change(local, old.name, flipped(600))
    found = verify(changed)
    assert [(damage.name, damage.current) for damage in found.damage] == [(old.name, False)]
    note(changed, found)
    assert not list(local.folder.files("damaged"))


def test_a_false_alarm_is_cleared(local: Dataset) -> None:
    stored = receipt_of(local, "captions", 0).objects[0]
    data = local.folder.read(stored.name)
    local.folder.remove(stored.name)
    note(local, verify(local))
    assert pending(local)["captions"] == [0]
    local.folder.write(stored.name, data)  # somebody restored it from a copy
    note(local, verify(local))
    assert pending(local)["captions"] == []


def test_the_command_line(local: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    publish(local)
    assert main(["verify", local.url]) == 0
    shown = capsys.readouterr()
    assert "everything is as recorded" in shown.err
    assert "16 objects" in shown.out, "ten of the plan and the commits, five that are published, the configuration"

    stored = receipt_of(local, "low_res", 1).objects[0]
    local.folder.remove(stored.name)
    (part,) = (name for name in local.folder.names("plan/gen-0000") if name.endswith(".parquet"))
    change(local, part, flipped(20))
    assert main(["verify", local.config.root, "--json"]) == 1
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [(damage["stage"], damage["shard"], damage["what"]) for damage in answer["damage"]] == [
        ("plan", None, "changed"),
        ("low_res", 1, "gone"),
    ]
    assert main(["verify", local.url]) == 1
    shown = capsys.readouterr()
    assert "low_res" in shown.out
    assert "restore its folder from a copy" in shown.err
    assert f"resmaster repair {local.url}" in shown.err.replace("\n", "")
    assert main(["status", local.url]) == 0
    assert f"damaged: low_res of shards 1; put them back: resmaster repair {local.url}" in capsys.readouterr().out
    assert main(["status", local.url, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["stages"]
    assert [stage["damaged_shards"] for stage in told] == [[1], [], [], []]
    assert main(["status", local.url, "--openmetrics"]) == 0
    labels = f'dataset="demo",root="{local.url.rpartition("/")[0]}",stage="low_res"'
    assert f"resmaster_damaged_shards{{{labels}}} 1.0" in capsys.readouterr().out
    assert main(["verify", f"{local.url}/nowhere"]) == 2
    assert "Traceback" not in shown.err + capsys.readouterr().err


def test_a_copy_under_another_name_is_as_good(
    local: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(local)
    copy = tmp_path / "elsewhere" / "ds"
    shutil.copytree(local.folder.path, copy)
    for command in (["verify", copy], ["status", copy.parent], ["gc", "--dry-run", copy], ["repair", copy]):
        assert main([str(word) for word in command]) == 0
    assert str(copy) in capsys.readouterr().out


def test_one_record_that_may_not_be_read_costs_its_shard_and_no_command(
    local: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where another user wrote the record, and lets nobody read it."""
    publish(local)
    record = commit_name("captions", local.hashes["captions"], 1)
    real = Folder._cat

    def cat(self: Folder, path: str) -> bytes:
        if path.endswith(record):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(self, path)

    monkeypatch.setattr(Folder, "_cat", cat)
    for words, rc in ((["status"], 1), (["status", "--openmetrics"], 0), (["repair"], 1), (["publish"], 0)):
        assert main([words[0], local.url, *words[1:]]) == rc
        shown = capsys.readouterr()
        assert record in shown.err or "openmetrics" in words[-1] or words == ["publish"]
        assert "nothing to repair" not in shown.err
        if words == ["status"]:
            assert "captions  2 " in shown.out, "the other stages and shards are shown"
    assert main(["verify", local.url]) == 1
    assert (
        f"captions of shard 000001: {record}: unreadable; restore it from a copy, or repair" in capsys.readouterr().out
    )
    monkeypatch.undo()
    assert main(["verify", local.url]) == 1, "published without the shard"
    assert "the publication was made from other commits" in capsys.readouterr().err
    assert main(["repair", local.url]) == 0
    assert main(["verify", local.url]) == 0


def test_a_lost_record_of_the_plan_by_the_command_line(local: Dataset) -> None:
    publish(local)
    name = "plan/gen-0000/_PLAN.json"
    whole = local.folder.read(name)
    local.folder.remove(name)
    os.mkfifo(local.folder.full(name))

    def command(*words: str) -> tuple[int, str]:
        environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
        line = [sys.executable, "-m", "tests.standin_cli", *words, local.url]
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    status, said = command("verify")
    assert (status, f"plan: {name}: unreadable; repair puts it together again from the plan's files" in said) == (
        1,
        True,
    )
    status, said = command("repair")
    assert (status, f"{name} is put together again" in said, "nothing to repair" in said) == (0, True, False)
    assert local.folder.read(name) == whole
    assert command("verify")[0] == 0


def test_what_a_run_commits_and_publishes_meanwhile_is_not_lost(
    local: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in local.hashes:
        local.commits(stage).drop([1])
    publish(local)
    read = verify_module.read_publication

    def late(folder: Folder) -> PublicationRecord | None:
        work(local)
        publish(local)
        return read(folder)

    monkeypatch.setattr(verify_module, "read_publication", late)
    assert verify(local).damage == ()
