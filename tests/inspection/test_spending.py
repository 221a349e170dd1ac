"""What a dataset has cost: the sum of its records, and each record is read once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.attempts import record_failure
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.commits import Commits
from resmaster_stages.dataset.dataset import Dataset, reconfigured
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.errors import GpuLost
from resmaster_stages.inspection.limits import Limits, left
from resmaster_stages.inspection.spending import Spending, Spent, StageSpent, spell_cost
from resmaster_stages.inspection.status import pending, status
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.filesystem import Folder
from tests.fake_stages import FAKES, planned

PRICE = 2.0
ONE_BY_ONE = {"samples_per_shard": 6, "spill_seconds": 0, "low_res": {"height": 16, "width": 16, "batch_size": 1}}


def commit(commits: Commits, shard: int, seconds: float, number: int = 1) -> None:
    """A commit that took so long."""
    attempt = f"{shard:04x}{number:04x}"
    receipt = Receipt(
        commits.stage, commits.stage_hash, shard, attempt, 0, 1, 0, (), "0" * 64, {}, "2026-11-28T12:00:00+00:00"
    )
    path = Path(commits.folder.full("made"))
    path.write_bytes(b"x")
    name = layout.shard_object(commits.stage, shard, attempt)
    commits.create(replace(receipt, seconds=seconds, number=number), [(name, path)])


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Commits of 10 s and (two attempts) 25 s, an earlier configuration of 7 s, failures of 5 s and 3 s."""
    made = planned(tmp_path / "out", ["a", "b", "c"], tmp_path, samples_per_shard=1, dispatch={"price": PRICE})
    low_res = made.commits("low_res")
    commit(low_res, 0, 10.0)
    commit(low_res, 1, 20.0)
    commit(low_res, 1, 25.0, number=2)
    commit(Commits(made.folder, "low_res", "ab" * 32), 0, 7.0)
    record_failure(low_res, 2, "0" * 8, GpuLost("gone"), {}, seconds=5.0)
    record_failure(made.commits("high_res"), 0, "1" * 8, GpuLost("gone"), {}, seconds=3.0)
    return made


def test_the_records_are_summed_up_by_stage(dataset: Dataset) -> None:
    found = status(dataset)
    assert Spending(dataset.folder).seconds() == 10 + 25 + 7 + 5 + 3 == found.spent.seconds
    by_stage = {stage.stage: stage for stage in found.spent.stages}
    assert by_stage["low_res"] == StageSpent("low_res", commits=35.0, failed=5.0, others=7.0)
    assert by_stage["high_res"] == StageSpent("high_res", commits=0.0, failed=3.0, others=0.0)
    assert found.spent.cost(3600) == PRICE
    told = found.to_json()["spent"]
    assert (told["device_seconds"], told["cost"]) == (50.0, pytest.approx(50 / 3600 * PRICE))
    assert found.spent.told() == (
        "50.0 s of device time, 0.028 at 2 an hour (of it failed attempts 8.0 s, other configurations 7.0 s)"
    )
    assert Spent().told() == "0.0 s of device time"
    assert spell_cost(7380, 2.5) == "2.05 h of device time, 5.12 at 2.5 an hour"


def test_a_stage_that_is_not_needed_any_more_still_cost_something(dataset: Dataset) -> None:
    commit(Commits(dataset.folder, "recaptions", "cd" * 32), 0, 11.0)
    assert StageSpent("recaptions", 0.0, 0.0, 11.0) in status(dataset).spent.stages
    assert Spending(dataset.folder).seconds() == 61


def test_each_record_is_read_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    original = Folder.read_many

    def counted(self: Folder, names: list[str], lenient: bool = False) -> dict[str, bytes]:
        reads.extend(names)
        return original(self, names, lenient)

    monkeypatch.setattr(Folder, "read_many", counted)
    spending = Spending(dataset.folder)
    assert spending.seconds() == 50
    assert len(reads) == len(set(reads)) == 5, "of the shard with two attempts, the last one says all"
    commit(dataset.commits("low_res"), 2, 40.0)
    assert spending.seconds() == 90
    assert len(reads) == 6


def test_a_record_that_cannot_be_read_costs_only_what_it_said(dataset: Dataset) -> None:
    namespace = layout.commit_folder("low_res", dataset.hashes["low_res"])
    dataset.folder.write(f"{namespace}/000000.json", b"{}")
    assert Spending(dataset.folder).seconds() == 40


def test_records_of_failures_from_before_they_had_seconds(dataset: Dataset) -> None:
    """A record without the field, as earlier versions wrote it."""
    from resmaster_stages.dataset.records import signed, unsigned

    folder = layout.attempts_folder("low_res", dataset.hashes["low_res"])
    (name,) = dataset.folder.names(folder)
    values = json.loads(unsigned(dataset.folder.read(name)))
    assert values.pop("seconds") == 5.0
    dataset.folder.write(name, signed(values, indent=1))
    assert Spending(dataset.folder).seconds() == 45
    assert status(dataset).stages[0].errors[0].last.message == "gone"


class Clock:
    """A clock that stands still but for the work of a stage."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        for module in ("attempt", "resume"):
            monkeypatch.setattr(
                f"resmaster_stages.runner.{module}.time", SimpleNamespace(monotonic=lambda: self.seconds)
            )

    def slow(self, stage: str, seconds: float, end: str = "", error: BaseException | None = None):  # type: ignore[no-untyped-def]
        """The stand-in of a stage, so many seconds a sample. At the prompt `end` it raises `error`."""

        def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
            for sample in samples:
                self.seconds += seconds
                if error is not None and sample.prompt == end:
                    raise error
            yield from FAKES[stage](config, samples)

        return process


def test_an_attempt_that_fails_and_the_next_one_cost_all_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first attempt saved counts once: in the commit that uses it."""
    clock = Clock(monkeypatch)
    dataset = planned(tmp_path, list("abcdef"), tmp_path, **ONE_BY_ONE)
    with pytest.raises(GpuLost):
        run_stage(dataset, "low_res", 0, process=clock.slow("low_res", 10, "d", GpuLost("gone")))
    lost = Spending(dataset.folder).seconds()
    assert lost < clock.seconds == 40, "the samples that were saved are not lost"
    receipt = run_stage(dataset, "low_res", 0, process=clock.slow("low_res", 10))
    assert clock.seconds < 40 + 6 * 10, "samples of the first attempt are used"
    assert receipt.seconds + lost == pytest.approx(clock.seconds)
    assert Spending(dataset.folder).seconds() == pytest.approx(clock.seconds)


def test_the_saved_work_of_an_interrupted_attempt_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption leaves no record, as a kill does."""
    clock = Clock(monkeypatch)
    dataset = planned(tmp_path, list("abcdef"), tmp_path, **ONE_BY_ONE)
    with pytest.raises(KeyboardInterrupt):
        run_stage(dataset, "low_res", 0, process=clock.slow("low_res", 10, "d", KeyboardInterrupt()))
    assert Spending(dataset.folder).seconds() == 0
    receipt = run_stage(dataset, "low_res", 0, process=clock.slow("low_res", 10))
    assert receipt.seconds >= 60, "every sample of the shard was paid for"
    assert receipt.seconds <= clock.seconds


def test_the_limits_and_what_they_leave(dataset: Dataset) -> None:
    assert Limits(dataset, None).reached() == ""
    assert Limits(dataset, "2999-01-01T00:00:00.000+00:00").reached() == ""
    assert "after 2020-01-01 00:00:00 UTC" in Limits(dataset, "2020-01-01T00:00:00.000+00:00").reached()
    for limit, reached in ((0.027, True), (50 / 3600 * PRICE, True), (0.03, False)):
        dispatch = dataset.config.dispatch.model_copy(update={"max_cost": limit})
        limited = reconfigured(dataset, dispatch=dispatch)
        assert bool(Limits(limited, None).reached()) is reached, limit
    assert Limits(limited, None).reached() == ""
    commit(dataset.commits("low_res"), 2, 400.0)
    assert Limits(limited, None).reached() == (
        "the budget of 0.03 is spent (max_cost): 7.5 min of device time, 0.25 at 2 an hour"
    )
    assert left(limited, pending(limited), status(limited)) == "3 of 3 shards are left", "no stage but one has a pace"
    only = {"low_res": [1, 2]}
    assert left(limited, only, status(limited)).startswith("2 of 3 shards are left, about ")
