"""An attempt that ends by an error is recorded, whatever the error is, and the error stays the one that is seen."""

import json
import logging
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from resmaster_flows.cli.main import main
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.attempts import UNREADABLE, FailedAttempt, failed_names, read_failures
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.ledger import MESSAGE_CHARACTERS, ledger_rows
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.stages import Process
from resmaster_stages.errors import ConfigError, GpuLost, PlanError, ShardError, UserError
from resmaster_stages.inspection.leftovers import find_leftovers
from resmaster_stages.inspection.status import StageStatus, status
from resmaster_stages.inspection.verify import verify
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.filesystem import Folder
from tests.fake_stages import FAKES, planned


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return planned(tmp_path / "out", ["a", "b", "c", "bad high_res 1", "bad high_res 2", "d"], tmp_path)


def raising(error: BaseException) -> Process:
    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        raise error
        yield

    return process


def attempts(dataset: Dataset, stage: str) -> list[FailedAttempt]:
    commits = dataset.commits(stage)
    return read_failures(commits, failed_names(commits))


def fail(dataset: Dataset, shard: int, error: BaseException, stage: str = "low_res", **options) -> None:
    with pytest.raises(type(error)) as caught:
        run_stage(dataset, stage, shard, process=raising(error), **options)
    assert caught.value is error


def of(dataset: Dataset, stage: str) -> StageStatus:
    return next(found for found in status(dataset).stages if found.stage == stage)


def test_the_status_tells_the_latest_of_several_equal_failures(dataset: Dataset) -> None:
    for shard, reason in ((1, "the first"), (2, "in between"), (0, "the latest")):
        fail(dataset, shard, ShardError(reason))
    (error,) = of(dataset, "low_res").errors
    assert (error.shards, error.last.message) == ((0, 1, 2), "the latest")


@pytest.mark.parametrize(
    "error",
    [
        UserError("caption server down"),
        GpuLost("ECC"),
        ConnectionError("503"),
        TimeoutError(),
        ConfigError("no such model"),
    ],
)
def test_every_error_is_recorded(dataset: Dataset, error: Exception) -> None:
    facts = {"flow_run": "1-2-3", "flow_run_name": "demo: shards 0-2", "task_run": None, "other": 1}
    fail(dataset, 1, error, provenance=facts)
    (found,) = attempts(dataset, "low_res")
    assert (found.stage, found.shard, found.error_class) == ("low_res", 1, type(error).__name__)
    assert (found.stage_hash, found.flow_run_name) == (dataset.hashes["low_res"], "demo: shards 0-2")
    assert found.message == str(error)
    assert found.failed_at.endswith("+00:00")
    assert found.host
    stage = of(dataset, "low_res")
    assert (stage.committed, stage.pending, stage.failed, stage.failed_shards) == (0, 2, 1, (1,))
    assert stage.errors[0].last == found


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interruption_is_no_failure(dataset: Dataset, error: BaseException) -> None:
    fail(dataset, 0, error)
    assert attempts(dataset, "low_res") == []
    assert of(dataset, "low_res").failed == 0


def test_what_was_never_tried_is_no_failure(dataset: Dataset) -> None:
    with pytest.raises(PlanError):
        run_stage(dataset, "low_res", 9, process=FAKES["low_res"])
    assert not dataset.folder.exists("attempts")


def test_too_many_failed_samples_are_a_failed_attempt_with_the_id_of_its_ledger(dataset: Dataset) -> None:
    for shard in (1, 2):
        for stage in ("low_res", "captions"):
            run_stage(dataset, stage, shard, process=FAKES[stage])
    with pytest.raises(ShardError):
        run_stage(dataset, "high_res", 1, process=failing_samples)
    (found,) = attempts(dataset, "high_res")
    assert found.error_class == "ShardError"
    assert {row["attempt"] for row in ledger_rows(dataset.commits("high_res"))} == {found.attempt}
    assert "\n" not in found.message


def failing_samples(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    yield from (Output(sample.key, error=ValueError("broken")) for sample in samples)


def test_every_attempt_stays_and_the_last_one_tells_the_class(dataset: Dataset) -> None:
    for error in (ConnectionError("first"), UserError("second"), UserError("third")):
        fail(dataset, 0, error)
    fail(dataset, 2, UserError("of another shard"))
    assert [found.message for found in attempts(dataset, "low_res")] == ["first", "second", "third", "of another shard"]
    (error,) = of(dataset, "low_res").errors
    assert (error.error_class, error.shards, error.last.message) == ("UserError", (0, 2), "of another shard")
    run_stage(dataset, "low_res", 0, process=FAKES["low_res"])
    stage = of(dataset, "low_res")
    assert (stage.committed, stage.failed_shards) == (1, (2,)), "a commit ends a failure"
    assert len(attempts(dataset, "low_res")) == 4, "what happened is kept"


def test_another_configuration_starts_without_failures(dataset: Dataset) -> None:
    fail(dataset, 0, UserError("bad model"))
    config = dataset.config.model_copy(update={"seed": 5})
    assert of(Dataset(dataset.folder, config), "low_res").failed == 0


def test_a_record_that_cannot_be_written_hides_nothing(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = Folder.write

    def down(folder: Folder, name: str, data: bytes) -> None:
        if name.startswith("attempts/"):
            raise UserError(f"{name}: the disk is full")
        write(folder, name, data)

    monkeypatch.setattr(Folder, "write", down)
    with caplog.at_level(logging.WARNING):
        fail(dataset, 0, ConnectionError("the true reason"))
    assert "low_res of shard 000000: the failed attempt is not recorded" in caplog.text
    assert "the disk is full" in caplog.text


def test_a_message_is_one_line_without_credentials_and_bounded(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTIONS_API_KEY", "sk-0123456789")
    fail(dataset, 0, OSError("https://me:secret@host/v1 said\nno to sk-0123456789 " + "x" * 5000))
    (name,) = (file.name for file in dataset.folder.files("attempts"))
    text = dataset.folder.read(name).decode()
    assert "secret" not in text
    assert "sk-0123456789" not in text
    message = json.loads(text)["message"]
    assert message.startswith("https://host/v1 said no to [hidden]")
    assert len(message) == MESSAGE_CHARACTERS


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"message": 1}', b"\xff", b"[" * 100_000])
def test_an_unreadable_record_costs_only_what_it_said(dataset: Dataset, content: bytes) -> None:
    fail(dataset, 0, UserError("gone"))
    (file,) = dataset.folder.files("attempts")
    dataset.folder.write(file.name, content)
    dataset.folder.write("attempts/low_res-00000000/notes.txt", b"somebody's")
    (found,) = attempts(dataset, "low_res")
    assert (found.shard, found.error_class, found.message) == (0, "UserError", UNREADABLE)
    assert of(dataset, "low_res").failed == 1
    assert verify(dataset).damage == (), "no data depends on it"
    assert find_leftovers(dataset, timedelta(0)) == [], "gc leaves it alone"


@pytest.mark.parametrize("kind", ["folder", "link in a circle"])
def test_what_is_in_the_place_of_a_record_ends_no_command(
    dataset: Dataset, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fail(dataset, 0, UserError("gone"))
    (file,) = dataset.folder.files("attempts")
    place = Path(dataset.url, file.name)
    place.unlink()
    place.mkdir() if kind == "folder" else place.symlink_to(place.name)
    for words in (["status", dataset.url], ["explain", dataset.url, "0"]):
        assert main(words) == 0
        assert f"UserError: {UNREADABLE}" in capsys.readouterr().out


def test_a_class_with_a_strange_name_makes_a_plain_file_name(dataset: Dataset) -> None:
    fail(dataset, 0, type("Fehler/ü..", (UserError,), {})("odd"))
    (found,) = attempts(dataset, "low_res")
    assert found.error_class == "Fehler____"
