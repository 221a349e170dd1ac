"""Limits of money and hours: a build stops between two shards, says so, and goes on to the same bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from resmaster_flows.cli.main import main
from resmaster_flows.process import process_shards
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.dataset import Dataset, open_dataset
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.stages import STAGES, Process
from resmaster_stages.inspection.spending import Spending
from resmaster_stages.inspection.status import status
from resmaster_stages.models.identity import Weights
from tests.fake_stages import FAKES, config_at, planned

SHARD_COST = 4.0
"""Of a shard with one sample: four stages of an hour each, at a price of 1."""


class HourByHour(threading.local):
    """A clock for each thread, which stands still but for stages: each takes an hour a sample."""

    hours = 0

    def monotonic(self) -> float:
        return self.hours * 3600.0

    def process(self, stage: str) -> Process:
        def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
            self.hours += len(samples)
            yield from FAKES[stage](config, samples)

        return process


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HourByHour:
    found = HourByHour()
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))
    monkeypatch.setattr("resmaster_stages.runner.attempt.time", SimpleNamespace(monotonic=found.monotonic))
    for name, stage in STAGES.items():
        monkeypatch.setitem(STAGES, name, replace(stage, process=found.process(name)))
    return found


@pytest.fixture
def config(clock: HourByHour, tmp_path: Path) -> Path:
    """Six shards of one sample."""
    return written(tmp_path)


def written(folder: Path, **values: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join("abcdef"))
    values = {"samples_per_shard": 1, "prompts": str(folder / "prompts.txt"), **values}
    dumped = config_at(folder / "out", **values).model_dump(mode="json", exclude_unset=True)
    (folder / "demo.yaml").write_text(yaml.safe_dump(dumped))
    return folder / "demo.yaml"


def committed(dataset: Dataset) -> list[int]:
    """The number of committed shards of each stage."""
    return [stage.committed for stage in status(dataset).stages]


def spent(dataset: Dataset) -> float:
    """At a price of 1."""
    return Spending(dataset.folder).seconds() / 3600


@pytest.mark.parametrize(("most", "shards"), [(0.5, 1), (4.0, 1), (4.5, 2), (8.0, 2), (23.9, 6)])
def test_a_build_stops_at_the_end_of_the_shard_that_spends_the_budget(
    config: Path, most: float, shards: int, capsys: pytest.CaptureFixture[str]
) -> None:
    status_ = main(["run", str(config), "--price", "1", "--max-cost", str(most)])
    dataset = open_dataset(str(config.parent / "out"))
    assert committed(dataset) == [shards] * 4, "no shard is left half done"
    assert most <= spent(dataset) < most + SHARD_COST
    assert status_ == (0 if shards == 6 else 3)
    told = capsys.readouterr().err
    cost = shards * SHARD_COST
    assert f"cost so far: {cost:.2f} h of device time, {cost:.2f} at 1 an hour" in told
    if shards < 6:
        rest = (6 - shards) * SHARD_COST
        assert f"is spent (max_cost): {cost:.2f} h of device time, {cost:.2f} at 1 an hour; {6 - shards} of 6" in told
        assert f"shards are left, about {rest:.2f} h of device time, {rest:.2f} at 1 an hour; run the same" in told
        assert f"{shards} samples in" in told, "what is done is published"


def test_the_same_command_with_a_higher_limit_goes_on_to_the_same_bytes(config: Path) -> None:
    """The budget counts what earlier builds have spent."""
    limits = [(0.5, 1, 3), (4.0, 1, 3), (9.0, 3, 3), (100.0, 6, 0)]
    for most, shards, end in limits:
        assert main(["run", str(config), "--price", "1", "--max-cost", str(most)]) == end
        assert committed(open_dataset(str(config.parent / "out"))) == [shards] * 4
    other = written(config.parent / "other")
    assert main(["run", str(other)]) == 0
    assert contents(open_dataset(str(config.parent / "out"))) == contents(open_dataset(str(other.parent / "out")))


def contents(dataset: Dataset) -> dict[tuple[str, int], tuple[str, list[str]]]:
    """(stage, shard) -> the identity of the stage, and the sha256 of each object."""
    return {
        (stage, shard): (receipt.stage_hash, [stored.sha256 for stored in receipt.objects])
        for stage in dataset.hashes
        for shard, receipt in dataset.commits(stage).read_all().items()
    }


def test_repair_has_limits_of_its_own_and_keeps_them(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(config), "--price", "1", "--max-cost", "1"]) == 3
    root = str(config.parent / "out")
    assert main(["repair", root]) == 3, "the budget of the dataset"
    assert committed(open_dataset(root)) == [1] * 4
    assert main(["repair", root, "--max-cost", "8"]) == 3
    assert committed(open_dataset(root)) == [2] * 4
    assert open_dataset(root).config.dispatch.max_cost == 8
    assert main(["repair", root, "--max-cost", "1000", "--price", "0.5"]) == 0
    assert main(["repair", root, "--max-cost", "1"]) == 0, "nothing is left to do"
    assert "nothing to repair" in capsys.readouterr().err


def test_hours_are_those_of_one_build(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No shard is begun after the hours, and the next build has hours of its own."""
    assert main(["run", str(config), "--max-hours", "0.000000001"]) == 3
    root = str(config.parent / "out")
    assert committed(open_dataset(root)) == [0] * 4
    told = capsys.readouterr().err
    assert "UTC (max_hours); 6 of 6 shards are left; run the same command again with a higher limit" in told
    assert main(["run", str(config), "--max-hours", "100"]) == 0
    assert committed(open_dataset(root)) == [6] * 4


def test_a_finished_dataset_is_published_although_nothing_may_be_spent(config: Path) -> None:
    assert main(["run", str(config)]) == 0
    assert main(["run", str(config), "--price", "1", "--max-cost", "0.1"]) == 0


def test_a_failed_shard_weighs_more_than_a_limit(
    clock: HourByHour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        if samples[0].prompt == "a":
            raise ConnectionResetError("the store is away")
        yield from FAKES["low_res"](config, samples)

    monkeypatch.setitem(STAGES, "low_res", replace(STAGES["low_res"], process=failing))
    monkeypatch.setattr("resmaster_stages.runner.retrying.time.sleep", lambda seconds: None)
    assert main(["run", str(written(tmp_path)), "--price", "1", "--max-cost", "1"]) == 1


@pytest.mark.parametrize(("most", "end"), [(0.5, 8.0), (4.0, 8.0), (9.0, 16.0), (12.5, 16.0)])
def test_two_workers_overshoot_by_the_shards_at_work_alone(
    clock: HourByHour, tmp_path: Path, most: float, end: float
) -> None:
    """Each worker waits for the other one at the begin and at the end of every shard, so that both are always at work:
    the worst that can be. docs/operating.md has the numbers."""
    dispatch = {"price": 1.0, "max_cost": most}
    dataset = planned(tmp_path / "out", list("abcdefghij"), tmp_path, samples_per_shard=1, dispatch=dispatch)
    both = threading.Barrier(2)

    def together(inner: Process) -> Process:
        def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
            both.wait(timeout=60)
            yield from inner(config, samples)

        return process

    for stage in ("low_res", "quality"):  # `clock` puts them back
        STAGES[stage] = replace(STAGES[stage], process=together(clock.process(stage)))

    def work(shards: list[int]) -> object:
        try:
            return process_shards.fn(dataset.url, shards)
        finally:
            both.abort()

    with ThreadPoolExecutor(2) as workers:
        ends = list(workers.map(work, [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]))
    assert [state.name for state in ends] == ["Limited", "Limited"]  # type: ignore[attr-defined]
    assert spent(dataset) == end < most + 2 * SHARD_COST
    assert len(set(committed(dataset))) == 1, "no shard is left half done"


def test_mistakes_are_one_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in (
        (["--max-cost", "5"], "max_cost needs a price; set price"),
        (["--max-cost", "5", "--price", "0"], "max_cost needs a price"),
        (["--max-cost", "-5", "--price", "1"], "--max-cost -5.0: Input should be greater than 0"),
        (["--max-cost", "nan", "--price", "1"], "--max-cost nan: Input should be a finite number"),
        (["--max-hours", "0"], "--max-hours 0.0: Input should be greater than 0"),
        (["--price", "inf"], "--price inf: Input should be"),
    ):
        assert main(["run", str(config), *words]) == 2
        assert told in capsys.readouterr().err
    assert not (config.parent / "out").exists()


def test_plan_warns_of_a_budget_that_will_not_do(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(config), "--price", "1", "--max-cost", "1"]) == 3
    capsys.readouterr()
    above = "above the budget: 4.00 spent and 20.00 to come make 24.00, and max_cost is {}: the build will stop {}"
    longer = "longer than allowed: 20.00 h, and max_hours is 5: the build will stop after about 25% of its work"
    for words, warnings in (
        (["--max-cost", "24"], []),
        (["--max-cost", "14"], [above.format("14.00", "after about 50% of its work")]),
        (["--max-cost", "2"], [above.format("2.00", "before its first shard")]),
        (["--max-hours", "20"], []),
        (["--max-hours", "5"], [longer]),
        (["--max-hours", "5", "--workers", "5"], []),
    ):
        assert main(["plan", str(config), "--estimate", "--price", "1", *words]) == 0
        out = capsys.readouterr().out
        assert "spent so far: 4.00 h of device time, 4.00 at 1 an hour" in out
        assert [line.removeprefix("warning: ") for line in out.splitlines() if line.startswith("warning")] == warnings
    assert main(["plan", str(config), "--max-hours", "5"]) == 2
    assert "add --estimate" in capsys.readouterr().err
