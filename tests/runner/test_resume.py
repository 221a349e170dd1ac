"""Runs that are killed in the middle of a shard: what is kept, who is blamed, what is left behind. Real kills, stand-in
stages."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from resmaster_stages.config.dataset import DatasetConfig, Stage
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import read_commit
from resmaster_stages.dataset.dataset import Dataset, open_dataset
from resmaster_stages.dataset.ledger import ledger_rows
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.stages import stage_hashes
from resmaster_stages.errors import GpuLost
from resmaster_stages.inspection.status import status
from resmaster_stages.models.identity import Weights
from resmaster_stages.runner.compute import Process
from resmaster_stages.runner.quarantine import Breadcrumbs, lives, process_name
from resmaster_stages.runner.resume import SPILLED, Spill, decode, encode
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.scratch import PREFIX, YOUNG_SECONDS, reclaim, scratch_folder
from tests.fake_stages import FAKES, planned

SLOTS = {"height": 16, "width": 16, "batch_size": 4}


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """One shard of ten samples, every one of them spilled."""
    return planned(tmp_path, list("abcdefghij"), tmp_path, samples_per_shard=10, low_res=SLOTS, spill_seconds=0)


def killed_at(prompt: str, stage: Stage, log: Path) -> Process:
    """`stage` in slots, as low_res computes them, or sample by sample; each is logged when done; `prompt` kills the
    process.

    The kill waits until what was done before is kept: what happens else is for `test_overlap` to say.
    """

    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        size = config.low_res.batch_size if stage == "low_res" else 1
        kept = config.spill_seconds == 0 and stage in SPILLED
        due = spilled(config)
        for start in range(0, len(samples), size):
            slot = samples[start : start + size]
            if any(sample.prompt == prompt for sample in slot):
                wait_for_spills(config, due)
                os.kill(os.getpid(), 9)
            outputs = list(FAKES[stage](config, slot))
            due += len(outputs) if kept else 0
            with log.open("a") as file:
                file.write("".join(sample.prompt for sample in slot) + " ")
            yield from outputs

    return process


def spilled(config: DatasetConfig) -> int:
    return len(list(Path(config.root, config.name).glob("cache/*/*.sample")))


def wait_for_spills(config: DatasetConfig, count: int) -> None:
    deadline = time.monotonic() + 60
    while spilled(config) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def in_child(dataset: Dataset, stage: Stage, process: Process) -> int:
    """Run the stage over shard 0 in a process of its own; its exit status, -9 if it was killed."""
    child = os.fork()
    if not child:
        status = 1
        try:
            run_stage(open_dataset(dataset.url), dataset.config, stage, 0, process=process)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(dataset: Dataset, stage: Stage) -> bytes:
    receipt = read_commit(dataset.folder, stage, stage_hashes(dataset.config)[stage], 0)
    assert receipt is not None
    return dataset.folder.read(receipt.objects[0].name)


def leftovers(dataset: Dataset) -> list[str]:
    return dataset.folder.names(layout.CACHE)


@pytest.mark.parametrize(
    ("stage", "killer", "kept", "then"),
    [
        ("low_res", "g", "abcd ", "efgh ij "),
        ("captions", "g", "a b c d e f ", "g h i j "),
        ("high_res", "g", "a b c d e f ", "g h i j "),
        ("quality", "g", "a b c d e f ", "a b c d e f g h i j "),
    ],
)  # fmt: skip
def test_a_killed_shard_goes_on_where_it_was_to_the_same_bytes(
    dataset: Dataset, tmp_path: Path, stage: Stage, killer: str, kept: str, then: str
) -> None:
    reference = planned(tmp_path / "reference", list("abcdefghij"), tmp_path, samples_per_shard=10, low_res=SLOTS)
    for place in (dataset, reference):
        for earlier in list(FAKES)[: list(FAKES).index(stage)]:
            run_stage(place, place.config, earlier, 0, process=FAKES[earlier])
    run_stage(reference, reference.config, stage, 0, process=FAKES[stage])
    log = tmp_path / "log"
    assert in_child(dataset, stage, killed_at(killer, stage, log)) == -9
    assert log.read_text() == kept
    log.unlink()
    assert in_child(dataset, stage, killed_at("", stage, log)) == 0
    assert log.read_text() == then
    assert content(dataset, stage) == content(reference, stage)
    assert leftovers(dataset) == []


def test_torn_damaged_and_foreign_spills_are_computed_again(dataset: Dataset, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert in_child(dataset, "low_res", killed_at("i", "low_res", log)) == -9
    (folder,) = (name for name in leftovers(dataset) if not name.endswith(".json"))
    names = dataset.folder.names(folder)
    assert len(names) == 8
    data = [dataset.folder.read(name) for name in names]
    dataset.folder.write(names[0], data[0][:-1])
    dataset.folder.write(names[1], b"")
    dataset.folder.write(names[2], data[2].replace(b"PNG", b"GNP", 1))
    dataset.folder.write(names[3], data[4])  # whole, but of another sample
    hurt = {Path(name).stem for name in names[:4]}
    log.unlink()
    assert in_child(dataset, "low_res", killed_at("", "low_res", log)) == 0
    from resmaster_stages.dataset.plan import read_plan

    slots = ["abcd", "efgh", "ij"]
    bad = {sample.prompt for sample in read_plan(dataset.folder).read(0) if sample.key in hurt}
    assert log.read_text().split() == [slot for slot in slots if slot == "ij" or bad & set(slot)]


def test_spills_of_other_configurations_are_not_read() -> None:
    output = Output(
        "ab", files={"png": b"\n1", "json": b"", "txt": b"\xff"}, rows=[{"row": 1, "caption": "é\n", "b": True}]
    )
    data = encode(output, "h" * 64)
    assert decode(data, "h" * 64) == output
    assert decode(data, "g" * 64) is None


def test_spills_can_be_switched_off_and_quick_shards_have_none(dataset: Dataset, tmp_path: Path) -> None:
    for seconds, written in ((None, 0), (60.0, 0), (0.0, 8)):
        config = dataset.config.model_copy(update={"spill_seconds": seconds})
        assert stage_hashes(config) == stage_hashes(dataset.config), "operational: not in the hash"
        fresh = Dataset(dataset.folder, config)
        assert in_child(fresh, "low_res", killed_at("i", "low_res", tmp_path / "log")) == -9
        folders = [name for name in leftovers(dataset) if not name.endswith(".json")]
        assert sum(len(dataset.folder.names(folder)) for folder in folders) == written


def test_spills_work_where_there_are_no_folders(dataset: Dataset) -> None:
    from resmaster_stages.storage.filesystem import open_root

    folder = open_root("memory://spills")
    spill = Spill(folder, "high_res", "a" * 64, 0, 0.0)
    for key in ("aa", "bb"):
        spill.keep(Output(key, files={"png": key.encode()}))
    spill.flush()
    again = Spill(folder, "high_res", "a" * 64, 0, 0.0)
    assert {key: output.files["png"] for key, output in again.read(["aa", "cc"]).items()} == {"aa": b"aa"}
    again.drop()
    assert folder.names(layout.CACHE) == []


# ----------------------------------------------------------------------------------------------------------------------
# breadcrumbs


@pytest.mark.parametrize("stage", ["low_res", "captions", "quality"])
def test_a_sample_that_kills_the_process_is_left_out_after_three_attempts(
    dataset: Dataset, tmp_path: Path, stage: Stage
) -> None:
    for earlier in list(FAKES)[: list(FAKES).index(stage)]:
        run_stage(dataset, dataset.config, earlier, 0, process=FAKES[earlier])
    log = tmp_path / "log"
    deadly = killed_at("f", stage, log)
    assert [in_child(dataset, stage, deadly) for _ in range(4)] == [-9, -9, -9, 0]
    (row,) = ledger_rows(dataset.folder, stage)
    from resmaster_stages.dataset.plan import read_plan

    assert row["key"] == read_plan(dataset.folder).read(0)[5].key
    assert row["error_class"] == "Quarantined"
    assert "died 3 times" in row["message"]
    found = next(each for each in status(dataset).stages if each.stage == stage)
    assert (found.committed, found.samples_ok, found.samples_failed) == (1, 9, 1)
    assert leftovers(dataset) == []
    if stage == "low_res":  # one death in the slot, one more, then one by one
        assert log.read_text().split() == ["abcd", "e", "g", "h", "ij"]


def test_one_kill_leaves_nobody_out_and_batches_whole(dataset: Dataset, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert in_child(dataset, "low_res", killed_at("f", "low_res", log)) == -9
    assert in_child(dataset, "low_res", killed_at("", "low_res", log)) == 0
    assert log.read_text().split() == ["abcd", "efgh", "ij"]
    assert ledger_rows(dataset.folder, "low_res") == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError("503"), GeneratorExit()])
def test_an_orderly_end_blames_nobody(dataset: Dataset, error: BaseException) -> None:
    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        assert samples[0].prompt == "a"
        assert [name for name in leftovers(dataset) if name.endswith(".json")]
        raise error

    for _ in range(3):
        with pytest.raises((type(error), RuntimeError)):
            run_stage(dataset, dataset.config, "low_res", 0, process=process)
        assert leftovers(dataset) == []


def test_quick_samples_share_one_breadcrumb(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[list[str]] = []
    write = type(dataset.folder).write

    def noted(folder: object, name: str, data: bytes) -> None:
        if name.startswith(layout.CACHE):
            written.append(json.loads(data)["at"])
        write(dataset.folder, name, data)

    monkeypatch.setattr(type(dataset.folder), "write", noted)
    config = dataset.config.model_copy(update={"spill_seconds": None})
    run_stage(dataset, config, "low_res", 0, process=FAKES["low_res"])
    assert [len(keys) for keys in written] == [1, 10], "the first, as it might be slow; then all of them"


def test_a_living_process_is_not_blamed(dataset: Dataset) -> None:
    first = Breadcrumbs(dataset.folder, "low_res", "a" * 64, 0, ["aa", "bb"])
    first.at(["aa"])
    assert Breadcrumbs(dataset.folder, "low_res", "a" * 64, 0, ["aa", "bb"]).strikes == {}
    name = layout.breadcrumb("low_res", "a" * 64, 0)
    record = json.loads(dataset.folder.read(name))
    dataset.folder.write(name, json.dumps({**record, "process": "elsewhere 1 1"}).encode())
    assert Breadcrumbs(dataset.folder, "low_res", "a" * 64, 0, ["aa", "bb"]).strikes == {"aa": 1}
    assert Breadcrumbs(dataset.folder, "low_res", "a" * 64, 0, ["bb"]).strikes == {}, "a sample of another shard"
    for damaged in (b"", b"[]", b"{}", b'{"strikes": 1, "process": 2, "at": 3}'):
        dataset.folder.write(name, damaged)
        assert Breadcrumbs(dataset.folder, "low_res", "a" * 64, 0, ["aa"]).strikes == {}


def test_processes_are_told_apart() -> None:
    assert lives(process_name())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = process_name(child.pid)
    assert lives(name)
    assert not lives(name + "1"), "another process of the same pid"
    child.kill()
    for _ in range(500):
        if not lives(name):  # a zombie already counts as dead
            break
        time.sleep(0.02)
    assert not lives(name)
    child.communicate()
    assert not lives(name)
    for nonsense in ("", "x", "a b c", f"elsewhere {os.getpid()} 1"):
        assert not lives(nonsense)


# ----------------------------------------------------------------------------------------------------------------------
# scratch folders


def test_scratch_of_dead_processes_is_reclaimed_and_that_of_living_ones_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = (
        "from resmaster_stages.storage.scratch import scratch_folder\n"
        "with scratch_folder() as f:\n    (f / 'x').write_text('x'); print(f, flush=True); input()"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    dead, alive = (Path(child.stdout.readline().strip()) for child in children if child.stdout)
    children[0].kill()
    children[0].communicate()
    assert (dead / "x").exists()
    assert reclaim(str(tmp_path)) == 0, "young ones are left alone"
    for folder in (dead.parent, alive.parent):
        os.utime(folder, (time.time() - 2 * YOUNG_SECONDS,) * 2)
    assert reclaim(str(tmp_path)) == 1
    assert not dead.parent.exists()
    assert (alive / "x").exists()
    children[1].communicate("\n")
    assert children[1].returncode == 0
    assert list(tmp_path.glob(f"{PREFIX}*")) == []


def test_scratch_is_gone_after_the_block_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for error in (GpuLost("x"), KeyboardInterrupt(), None):
        try:
            with scratch_folder() as folder:
                assert folder.is_dir()
                if error:
                    raise error
        except (GpuLost, KeyboardInterrupt):
            pass
        assert list(tmp_path.iterdir()) == []
