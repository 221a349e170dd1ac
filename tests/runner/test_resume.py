"""Runs that are killed in the middle of a shard: what is kept, who is blamed, what is left behind. Real kills, stand-in
stages."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.batches import Batch
from resmaster_stages.dataset.commits import Commits
from resmaster_stages.dataset.dataset import Dataset, open_dataset
from resmaster_stages.dataset.ledger import ledger_rows
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.stages import Process, stage_hashes
from resmaster_stages.errors import GpuLost, UserError
from resmaster_stages.inspection.status import status
from resmaster_stages.models.identity import Weights
from resmaster_stages.runner.quarantine import Breadcrumbs, lives, process_name
from resmaster_stages.runner.resume import Spill, decode, encode
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.filesystem import Folder, open_root
from resmaster_stages.storage.scratch import PREFIX, YOUNG_SECONDS, reclaim, scratch_folder
from tests.fake_stages import FAKES, planned, png

SLOTS = {"height": 16, "width": 16, "batch_size": 4}
FAKE_FILES = {"png": png((1, 2, 3)), "json": b"{}", "txt": b"f"}


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """One shard of ten samples, every one of them spilled."""
    return planned(tmp_path, list("abcdefghij"), tmp_path, samples_per_shard=10, low_res=SLOTS, spill_seconds=0)


def killed_at(prompt: str, stage: str, log: Path) -> Process:
    """A slot of `stage`, which is logged when done; `prompt` kills the process.

    The kill waits until what was done before is kept: what happens else is for `test_overlap` to say.
    """

    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        if any(sample.prompt == prompt for sample in samples):
            done = set(log.read_text().replace(" ", "")) if log.exists() else set()
            wait_for_spills(config, len(done) if config.spill_seconds == 0 else 0)
            os.kill(os.getpid(), 9)
        outputs = list(FAKES[stage](config, samples))
        with log.open("a") as file:
            file.write("".join(sample.prompt for sample in samples) + " ")
        yield from outputs

    return process


def spilled(config: DatasetConfig) -> int:
    return len(list(Path(config.root, config.name).glob("cache/*/*.sample")))


def wait_for_spills(config: DatasetConfig, count: int) -> None:
    deadline = time.monotonic() + 60
    while spilled(config) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def in_child(dataset: Dataset, stage: str, process: Process) -> int:
    """Run the stage over shard 0 in a process of its own; its exit status, -9 if it was killed."""
    child = os.fork()
    if not child:
        status = 1
        try:
            run_stage(replace(open_dataset(dataset.url), config=dataset.config), stage, 0, process=process)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(dataset: Dataset, stage: str) -> bytes:
    receipt = dataset.commits(stage).read(0)
    assert receipt is not None
    return dataset.folder.read(receipt.objects[0].name)


def leftovers(dataset: Dataset) -> list[str]:
    return [name for folder in dataset.folder.names(layout.CACHE) for name in dataset.folder.names(folder)]


def spills(dataset: Dataset) -> list[str]:
    return [name for name in leftovers(dataset) if name.endswith(".sample")]


def breadcrumbs(dataset: Dataset) -> list[str]:
    return [name for name in leftovers(dataset) if name.endswith("/at.json")]


@pytest.mark.parametrize(
    ("stage", "killer", "kept", "then"),
    [
        ("low_res", "g", "abcd ", "efgh ij "),
        ("captions", "g", "a b c d e f ", "g h i j "),
        ("high_res", "g", "a b c d e f ", "g h i j "),
        ("quality", "g", "a b c d e f ", "g h i j "),
    ],
)  # fmt: skip
def test_a_killed_shard_goes_on_where_it_was_to_the_same_bytes(
    dataset: Dataset, tmp_path: Path, stage: str, killer: str, kept: str, then: str
) -> None:
    reference = planned(tmp_path / "reference", list("abcdefghij"), tmp_path, samples_per_shard=10, low_res=SLOTS)
    for place in (dataset, reference):
        for earlier in list(FAKES)[: list(FAKES).index(stage)]:
            run_stage(place, earlier, 0, process=FAKES[earlier])
    run_stage(reference, stage, 0, process=FAKES[stage])
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
    names = spills(dataset)
    assert len(names) == 8
    data = [dataset.folder.read(name) for name in names]
    dataset.folder.write(names[0], data[0][:-1])
    dataset.folder.write(names[1], b"")
    dataset.folder.write(names[2], data[2].replace(b"PNG", b"GNP", 1))
    dataset.folder.write(names[3], data[4])  # whole, but of another sample
    hurt = {Path(name).stem for name in names[:4]}
    log.unlink()
    assert in_child(dataset, "low_res", killed_at("", "low_res", log)) == 0
    slots = ["abcd", "efgh", "ij"]
    bad = {sample.prompt for sample in dataset.plan.read(0) if sample.key in hurt}
    assert log.read_text().split() == [slot for slot in slots if slot == "ij" or bad & set(slot)]


def test_spills_of_other_configurations_are_not_read() -> None:
    output = Output(
        "ab", files={"png": b"\n1", "json": b"", "txt": b"\xff"}, rows=[{"row": 1, "caption": "é\n", "b": True}]
    )
    data = encode(output, "h" * 64)
    assert decode(data, "h" * 64) == output
    assert decode(data, "g" * 64) is None


def test_spills_of_another_version_of_this_project_are_not_read() -> None:
    data = encode(Output("ab", files={"txt": b"x"}, batch=Batch(slot=4)), "h" * 64)
    later = data[64:].replace(b'"slot":4', b'"rows":4')
    assert later != data[64:]
    assert decode(hashlib.sha256(later).hexdigest().encode() + later, "h" * 64) is None


def test_spills_can_be_switched_off_and_quick_shards_have_none(dataset: Dataset, tmp_path: Path) -> None:
    for seconds, written in ((None, 0), (60.0, 0), (0.0, 8)):
        config = dataset.config.model_copy(update={"spill_seconds": seconds})
        assert stage_hashes(config) == stage_hashes(dataset.config), "operational: not in the hash"
        fresh = Dataset(dataset.folder, config)
        assert in_child(fresh, "low_res", killed_at("i", "low_res", tmp_path / "log")) == -9
        assert len(spills(dataset)) == written


def test_spills_work_where_there_are_no_folders() -> None:
    commits = Commits(open_root("memory://spills"), "high_res", "a" * 64)
    spill = Spill(commits, 0, 0.0, [])
    for key in ("aa", "bb"):
        spill.keep(Output(key, files={"png": key.encode()}))
    spill.flush()
    place = layout.spill_folder("high_res", "a" * 64, 0)
    again = Spill(commits, 0, 0.0, commits.folder.names(place))
    assert {key: output.files["png"] for key, output in again.read(["aa", "cc"]).items()} == {"aa": b"aa"}
    again.drop()
    assert commits.folder.names(place) == []
    assert commits.folder.names(layout.CACHE) == []


@pytest.mark.parametrize(
    "error", [UserError("the disk is full"), ConnectionError("503"), FileNotFoundError(), OSError(5, "I/O error")]
)
@pytest.mark.parametrize("method", ["write_many", "remove_all"])
def test_what_cannot_be_spilled_or_deleted_costs_nothing(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, method: str, error: Exception
) -> None:
    asked = []

    def refuse(folder: Folder, what: object) -> None:
        asked.append(what)
        raise error

    monkeypatch.setattr(Folder, method, refuse)
    assert run_stage(dataset, "low_res", 0, process=FAKES["low_res"]).samples_ok == 10
    assert asked


def test_a_spilled_sample_that_cannot_be_read_is_computed_again(dataset: Dataset, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert in_child(dataset, "low_res", killed_at("i", "low_res", log)) == -9
    place = Path(dataset.url, spills(dataset)[0])
    place.unlink()
    place.mkdir()
    assert in_child(dataset, "low_res", killed_at("", "low_res", log)) == 0
    assert len(log.read_text().split()) == 2 + 2, "its slot, and the last one"


# ----------------------------------------------------------------------------------------------------------------------
# breadcrumbs


def test_a_breadcrumb_that_cannot_be_written_is_an_error(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without breadcrumbs a deadly sample would kill every run."""
    write = Folder.write

    def refuse(folder: Folder, name: str, data: bytes) -> None:
        if name.endswith("/at.json"):
            raise UserError("the disk is full")
        write(folder, name, data)

    monkeypatch.setattr(Folder, "write", refuse)
    with pytest.raises(UserError, match="the disk is full"):
        run_stage(dataset, "low_res", 0, process=FAKES["low_res"])


def dead_before(kills: int, prompt: str, log: Path) -> Process:
    """low_res, in which `prompt` kills the process the first `kills` times, and never again."""

    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        deaths = log.read_text().count(prompt) if log.exists() else 0
        if deaths < kills and any(sample.prompt == prompt for sample in samples):
            with log.open("a") as file:
                file.write(prompt)
            os.kill(os.getpid(), 9)
        yield from FAKES["low_res"](config, samples)

    return process


@pytest.mark.parametrize("dies", ["never", "before its strikes are forgotten"])
def test_a_sample_that_was_left_out_is_tried_again_by_the_next_attempt(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    process = dead_before(3, "f", tmp_path / "log")
    assert [in_child(dataset, "low_res", process) for _ in range(3)] == [-9] * 3
    with monkeypatch.context() as patched:
        if dies != "never":
            patched.setattr(Breadcrumbs, "forget", lambda self: os.kill(os.getpid(), 9))
        assert in_child(dataset, "low_res", process) == (0 if dies == "never" else -9)
    receipt = dataset.commits("low_res").read(0)
    assert receipt
    assert receipt.failed_keys == (dataset.plan.read(0)[5].key,)
    again = run_stage(dataset, "low_res", 0, number=2, process=process)
    assert (again.number, again.samples_ok, again.failed_keys) == (2, 10, ())
    assert leftovers(dataset) == []


def test_an_attempt_that_is_killed_in_its_turn_leaves_the_sample_out_again(dataset: Dataset, tmp_path: Path) -> None:
    def attempt(number: int) -> int:
        child = os.fork()
        if not child:
            try:
                run_stage(dataset, "low_res", 0, number=number, process=dead_before(6, "f", tmp_path / "log"))
            finally:
                os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert [attempt(1) for _ in range(4)] == [-9, -9, -9, 0]
    assert [attempt(2) for _ in range(4)] == [-9, -9, -9, 0]
    receipt = dataset.commits("low_res").read(0)
    assert receipt
    assert (receipt.number, receipt.samples_ok) == (2, 9)
    assert attempt(3) == 0
    receipt = dataset.commits("low_res").read(0)
    assert receipt
    assert (receipt.number, receipt.samples_ok) == (3, 10)


def test_a_shard_that_lost_too_many_samples_by_kills_is_tried_anew(dataset: Dataset, tmp_path: Path) -> None:
    """One sample of ten may fail. The run after the one that says so tries all of them again."""

    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for prompt, kills in (("c", 3), ("f", 2)):  # the first kill counts for the whole shard
            list(dead_before(kills, prompt, tmp_path / "log")(config, samples))
        yield from FAKES["low_res"](config, samples)

    assert [in_child(dataset, "low_res", process) for _ in range(6)] == [-9] * 5 + [1]
    assert dataset.commits("low_res").read(0) is None
    assert len(ledger_rows(dataset.commits("low_res"))) == 2
    assert in_child(dataset, "low_res", process) == 0
    assert status(dataset).stages[0].samples_ok == 10


def test_a_finished_sample_is_used_although_the_process_died_three_times_beside_it(dataset: Dataset) -> None:
    commits = dataset.commits("low_res")
    run_stage(dataset, "low_res", 0, process=FAKES["low_res"])
    key = dataset.plan.read(0)[5].key
    crumb = {"process": "elsewhere 1 1", "attempt": 1, "at": [key], "strikes": {key: 2}}
    commits.drop([0])
    dataset.folder.write(layout.breadcrumb("low_res", commits.stage_hash, 0), json.dumps(crumb).encode())
    place = layout.spill_folder("low_res", commits.stage_hash, 0)
    spilled = Output(key, files=FAKE_FILES, batch=Batch(slot=1, size=1))
    dataset.folder.write(layout.spill(place, key), encode(spilled, commits.stage_hash))
    assert run_stage(dataset, "low_res", 0, process=FAKES["low_res"]).samples_failed == 0


@pytest.mark.parametrize("stage", ["low_res", "captions", "quality"])
def test_a_sample_that_kills_the_process_is_left_out_after_three_attempts(
    dataset: Dataset, tmp_path: Path, stage: str
) -> None:
    for earlier in list(FAKES)[: list(FAKES).index(stage)]:
        run_stage(dataset, earlier, 0, process=FAKES[earlier])
    log = tmp_path / "log"
    deadly = killed_at("f", stage, log)
    assert [in_child(dataset, stage, deadly) for _ in range(4)] == [-9, -9, -9, 0]
    (row,) = ledger_rows(dataset.commits(stage))
    assert row["key"] == dataset.plan.read(0)[5].key
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
    assert ledger_rows(dataset.commits("low_res")) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError("503"), GeneratorExit()])
def test_an_orderly_end_blames_nobody(dataset: Dataset, error: BaseException) -> None:
    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        assert samples[0].prompt == "a"
        assert breadcrumbs(dataset)
        raise error

    for _ in range(3):
        with pytest.raises((type(error), RuntimeError)):
            run_stage(dataset, "low_res", 0, process=process)
        assert leftovers(dataset) == []


def noted(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whom the breadcrumbs name that a run of low_res writes, as prompts."""
    prompts = {sample.key: sample.prompt for sample in dataset.plan.read(0)}
    written: list[str] = []
    write = type(dataset.folder).write

    def note(folder: Folder, name: str, data: bytes) -> None:
        if name.startswith(layout.CACHE):
            written.append("".join(prompts[key] for key in json.loads(data)["at"]))
        write(folder, name, data)

    monkeypatch.setattr(type(dataset.folder), "write", note)
    dataset = replace(dataset, config=dataset.config.model_copy(update={"spill_seconds": None}))
    run_stage(dataset, "low_res", 0, process=FAKES["low_res"])
    return written


def test_quick_samples_share_one_breadcrumb(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert noted(dataset, monkeypatch) == ["abcdefghij"]


def test_a_batch_after_a_slow_one_has_its_own_breadcrumb(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.runner.quarantine.SLOW_SECONDS", 0.0)
    first, *others = noted(dataset, monkeypatch)
    assert first == "abcdefghij", "it might be quick"
    assert [names[-4:] if names.endswith("h") else names[-2:] for names in others] == ["efgh", "ij"]
    assert all("abcdefghij".find(names) >= 0 for names in others), "and before it what is still being finished"


def test_a_living_process_is_not_blamed(dataset: Dataset) -> None:
    commits = dataset.commits("low_res")
    name = layout.breadcrumb("low_res", commits.stage_hash, 0)

    def found(*keys: str, cache: Sequence[str] = (name,)) -> Breadcrumbs:
        return Breadcrumbs(commits, 0, keys, cache)

    found("aa").at(["aa"])
    assert found("aa", "bb").strikes == {}
    record = json.loads(dataset.folder.read(name))
    assert record["at"] == ["aa"]
    dataset.folder.write(name, json.dumps({**record, "process": "elsewhere 1 1"}).encode())
    assert found("aa", "bb").strikes == {"aa": 1}
    assert found("bb").strikes == {}, "a sample of another shard"
    assert found("aa", cache=[]).strikes == {}, "none was listed"
    for damaged in (b"", b"[]", b"{}", b'{"strikes": 1, "process": 2, "at": 3}'):
        dataset.folder.write(name, damaged)
        assert found("aa").strikes == {}
    dataset.folder.remove(name)
    assert found("aa").strikes == {}, "it was listed, and has gone since"


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
