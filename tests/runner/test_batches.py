"""A damaged shard comes back to the byte, in whatever batches its samples were computed.

The stand-in stages give other bytes in another slot, at another place of a slot, and with another batch size, as
devices do that round.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.batches import MOST_THREADS, Batch, batch_of_each, recorded
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.damage import give_up_damaged
from resmaster_stages.dataset.dataset import Dataset, open_dataset
from resmaster_stages.dataset.ledger import ledger_rows
from resmaster_stages.dataset.reading import committed_outputs, shard_samples
from resmaster_stages.dataset.records import signed, unsigned
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.stages import STAGES, Process, Stage, register
from resmaster_stages.errors import OutOfMemory, ShardError
from resmaster_stages.inspection.explain import Explanation, ShardExplanation, explain, explain_shard, spelled
from resmaster_stages.inspection.verify import verify
from resmaster_stages.models.identity import Weights
from resmaster_stages.planning.redoing import asked
from resmaster_stages.runner.compute import with_batch
from resmaster_stages.runner.run import run_stage
from tests.fake_stages import BATCH_DEPENDENT, batch_dependent, batch_dependent_high_res, planned
from tests.runner.test_resume import breadcrumbs, content, in_child, killed_at, spills, wait_for_spills

BATCH = 4
PROMPTS = list("abcdefghij")


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))


def made_at(root: Path, prompts: Sequence[str] = PROMPTS, **values: object) -> Dataset:
    """One shard of `prompts`, in slots of four."""
    low_res = {"height": 16, "width": 16, "batch_size": BATCH}
    values = {"samples_per_shard": len(prompts), "low_res": low_res, "spill_seconds": 0, **values}
    return planned(root, list(prompts), root, **values)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return made_at(tmp_path)


def with_size(dataset: Dataset, stage: str, size: int | None) -> Dataset:
    """The dataset with another batch size in its configuration, as a user sets it between two commands."""
    return replace(dataset, config=with_batch(dataset.config, STAGES[stage], size))  # type: ignore[arg-type]


def batches(dataset: Dataset, stage: str = "low_res") -> dict[str, tuple[int, int | None]]:
    """Prompt -> (slot, batch size) of each good sample, as the commit record says."""
    receipt = dataset.commits(stage).read(0)
    assert receipt is not None
    prompts = {sample.key: sample.prompt for sample in dataset.plan.read(0)}
    good = [key for key in prompts if key not in {*receipt.failed_keys, *receipt.lost_keys}]
    found = batch_of_each(receipt.batches, good)
    return {prompts[key]: (batch.slot, batch.size) for key, batch in found.items()}


def rewritten(dataset: Dataset, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the values of the commit record of shard 0 of low_res, and give the record its digest again."""
    name = layout.commit("low_res", dataset.hashes["low_res"], 0, 1)
    record = json.loads(unsigned(dataset.folder.read(name)))
    change(record)
    dataset.folder.write(name, signed(record, indent=1))


def repaired(dataset: Dataset, stage: str = "low_res", process: Process | None = None) -> None:
    """Cut the shard's object off, find the damage, repair it; the object must be the recorded one again."""
    receipt = dataset.commits(stage).read(0)
    assert receipt is not None
    before = content(dataset, stage)
    dataset.folder.write(receipt.objects[0].name, before[:1000])
    assert receipt.objects[0].name in [damage.name for damage in verify(dataset).damage]
    dataset.commits(stage).mark(0, [receipt.objects[0].name])
    assert run_stage(dataset, stage, 0, process=process or BATCH_DEPENDENT[stage]) == receipt
    assert content(dataset, stage) == before
    assert verify(dataset).damage == ()
    assert list(dataset.folder.files(layout.CACHE)) == []


def killing(prompt: str, log: Path, times: int) -> Process:
    """`batch_dependent` in which `prompt` kills the process so many times."""

    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        if any(sample.prompt == prompt for sample in samples):
            kills = len(log.read_text()) if log.exists() else 0
            if kills < times:
                log.write_text("x" * (kills + 1))
                os.kill(os.getpid(), 9)
        yield from batch_dependent(config, samples)

    return process


@pytest.mark.parametrize(
    ("kills", "of_slot"),
    [(1, dict.fromkeys("efgh", (4, 4))), (2, dict.fromkeys("efgh", (1, 1))), (3, dict.fromkeys("egh", (1, 1)))],
)
@pytest.mark.parametrize("spill_seconds", [0.0, None], ids=["spilled", "not spilled"])
def test_kills_in_a_slot_are_told_and_repaired(
    tmp_path: Path, kills: int, of_slot: dict[str, tuple[int, int]], spill_seconds: float | None
) -> None:
    dataset = made_at(tmp_path, spill_seconds=spill_seconds)
    process = killing("f", tmp_path / "log", kills)
    assert [in_child(dataset, "low_res", process) for _ in range(kills + 1)] == [-9] * kills + [0]
    usual = dict.fromkeys("abcdij", (4, 4))
    assert batches(dataset) == usual | of_slot
    repaired(dataset)


def out_of_memory(prompt: str, largest: int) -> Process:
    """`batch_dependent` that has memory for `largest` samples at once where `prompt` is among them."""

    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        size = config.low_res.batch_size
        for start in range(0, len(samples), size):
            batch = samples[start : start + size]
            if len(batch) > largest and any(sample.prompt == prompt for sample in batch):
                raise OutOfMemory("full", batch=len(batch))
        yield from batch_dependent(config, samples)

    return process


@pytest.mark.parametrize(("largest", "size"), [(2, 2), (1, 1)])
def test_halved_batches_are_told_and_repaired(dataset: Dataset, largest: int, size: int) -> None:
    run_stage(dataset, "low_res", 0, process=out_of_memory("f", largest))
    assert batches(dataset) == dict.fromkeys("abcd", (4, 4)) | dict.fromkeys("efghij", (4, size))
    repaired(dataset)


def test_a_batch_that_does_not_fit_in_a_repair_is_not_halved_to_other_bytes(dataset: Dataset) -> None:
    run_stage(dataset, "low_res", 0, process=batch_dependent)
    with pytest.raises(ShardError, match=r"(?s)other samples fail now .*nothing was put back.*OutOfMemory +4"):
        repaired(dataset, process=out_of_memory("f", 2))
    run_stage(dataset, "low_res", 0, process=batch_dependent)
    repaired(dataset)


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_another_batch_size_in_the_configuration_does_not_hinder_a_repair(dataset: Dataset, size: int) -> None:
    run_stage(dataset, "low_res", 0, process=batch_dependent)
    changed = with_size(dataset, "low_res", size)
    repaired(changed)
    assert run_stage(changed, "low_res", 0, process=batch_dependent).samples_ok == len(PROMPTS)


@pytest.mark.parametrize("failing", ["a", "f", "j", "dg"])
def test_a_failed_sample_keeps_its_place_in_a_repair(tmp_path: Path, failing: str) -> None:
    prompts = [f"{prompt} bad low_res" if prompt in failing else prompt for prompt in PROMPTS]
    dataset = made_at(tmp_path, prompts, max_failure_ratio=0.5)
    receipt = run_stage(dataset, "low_res", 0, process=batch_dependent)
    assert receipt.samples_failed == len(failing)
    assert len(receipt.batches) == 1
    repaired(dataset)
    assert receipt.ledger
    before = ledger_rows(dataset.commits("low_res"))
    dataset.folder.remove(receipt.ledger)
    repaired(dataset)
    told = [(row["key"], row["error_class"], row["message"]) for row in ledger_rows(dataset.commits("low_res"))]
    assert told == [(row["key"], row["error_class"], row["message"]) for row in before]


def test_an_error_that_made_a_slot_run_one_by_one_is_told_and_repaired(dataset: Dataset) -> None:
    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        if any(sample.prompt == "f" for sample in samples):
            raise ZeroDivisionError
        yield from batch_dependent(config, samples)

    assert run_stage(dataset, "low_res", 0, process=process).samples_failed == 1
    assert batches(dataset) == dict.fromkeys("abcdij", (4, 4)) | dict.fromkeys("egh", (1, 1))
    repaired(dataset, process=process)


def test_outputs_of_a_killed_run_with_another_batch_size_are_told_and_repaired(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.runner.test_resume.FAKES", BATCH_DEPENDENT)
    assert in_child(dataset, "low_res", killed_at("g", "low_res", tmp_path / "log")) == -9
    changed = with_size(dataset, "low_res", 3)
    run_stage(changed, "low_res", 0, process=batch_dependent)
    assert batches(dataset) == dict.fromkeys("abcd", (4, 4)) | dict.fromkeys("efghij", (3, 3))
    repaired(dataset)
    repaired(changed)


def test_outputs_that_the_loser_of_a_race_left_behind_in_other_batches_do_not_hinder_a_repair(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.runner.test_resume.FAKES", BATCH_DEPENDENT)
    loser = with_size(dataset, "low_res", 3)
    assert in_child(loser, "low_res", killed_at("g", "low_res", tmp_path / "log")) == -9
    left = dataset.folder.read_many(spills(dataset))
    assert len(left) == 6
    for name in (*left, *breadcrumbs(dataset)):
        dataset.folder.remove(name)
    run_stage(dataset, "low_res", 0, process=batch_dependent)
    dataset.folder.write_many(left)
    repaired(dataset)


def test_kills_of_one_attempt_do_not_count_in_the_next_although_their_note_was_left_behind(tmp_path: Path) -> None:
    dataset = made_at(tmp_path, max_failure_ratio=0.5)
    process = killing("f", tmp_path / "log", 3)
    assert [in_child(dataset, "low_res", process) for _ in range(3)] == [-9] * 3
    note = dataset.folder.read_many(breadcrumbs(dataset))
    assert run_stage(dataset, "low_res", 0, process=process).samples_failed == 1
    dataset.folder.write_many(note)
    assert run_stage(dataset, "low_res", 0, number=2, process=process).samples_ok == len(PROMPTS)
    assert batches(dataset)["f"] == (4, 4)


def good_at_last(samples: Sequence[Sample]) -> list[Sample]:
    return [replace(sample, prompt=sample.prompt.replace("bad", "good")) for sample in samples]


@pytest.mark.parametrize("size", [BATCH, 3, 1])
def test_a_later_attempt_keeps_the_batches_of_the_earlier_one(tmp_path: Path, size: int) -> None:
    prompts = ["a", "b bad low_res", "c", "d", "e", "f bad low_res", "g"]
    dataset = made_at(tmp_path, prompts, max_failure_ratio=0.5)
    run_stage(dataset, "low_res", 0, process=batch_dependent)
    first = content(dataset, "low_res")

    def retried(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        yield from batch_dependent(config, good_at_last(samples))

    changed = with_size(dataset, "low_res", size)
    receipt = run_stage(changed, "low_res", 0, number=2, process=retried)
    assert (receipt.number, receipt.samples_failed) == (2, 0)
    usual = dict.fromkeys((prompt for prompt in prompts if "bad" not in prompt), (BATCH, BATCH))
    assert batches(dataset) == usual | dict.fromkeys(("b bad low_res", "f bad low_res"), (size, size))
    assert content(dataset, "low_res") != first
    repaired(changed, process=retried)
    repaired(dataset, process=retried)


@pytest.mark.parametrize("size", [BATCH, 3, 1])
def test_another_draw_is_made_in_its_slot_and_keeps_the_batches_of_the_others(tmp_path: Path, size: int) -> None:
    """In whatever batch it is made, a repair makes it in the same one, and the others in theirs."""
    dataset = made_at(tmp_path)
    run_stage(dataset, "low_res", 0, process=batch_dependent)
    keys = [sample.key for sample in dataset.plan.read(0)]
    with committed_outputs(dataset, _last(dataset)) as outputs:
        before = {key: outputs[key] for key in outputs}
    asked(dataset, f"{keys[1]},{keys[5]}")
    changed = with_size(open_dataset(dataset.url), "low_res", size)
    receipt = run_stage(changed, "low_res", 0, process=batch_dependent)
    assert receipt.takes == {keys[1]: 1, keys[5]: 1}
    assert batches(dataset) == dict.fromkeys(PROMPTS, (BATCH, BATCH)) | dict.fromkeys("bf", (size, size))
    with committed_outputs(dataset, receipt) as outputs:
        assert {key for key in keys if outputs[key] != before[key]} == {keys[1], keys[5]}
    repaired(changed)
    repaired(dataset)


def _last(dataset: Dataset) -> Receipt:
    receipt = dataset.commits("low_res").read(0)
    assert receipt
    return receipt


@pytest.mark.parametrize(("stage", "size"), [("captions", 5), ("high_res", 9), ("high_res", None)])
def test_patches_and_views_per_call_are_told_and_repaired_on_another_device(
    dataset: Dataset, stage: str, size: int | None
) -> None:
    """Where nothing is set, the memory of the device decides. The repair runs on one with less memory."""
    for name in ("low_res", "captions", "high_res"):
        run_stage(with_size(dataset, stage, size), name, 0, process=BATCH_DEPENDENT[name])
        if name == stage:
            break
    assert batches(dataset, stage) == dict.fromkeys(PROMPTS, (1, size or 16))
    process = batch_dependent_high_res(7) if stage == "high_res" else BATCH_DEPENDENT[stage]
    repaired(dataset, stage, process)
    repaired(with_size(dataset, stage, 2), stage, process)


def test_kills_during_a_repair_change_nothing(dataset: Dataset, tmp_path: Path) -> None:
    run_stage(dataset, "low_res", 0, process=batch_dependent)
    receipt = dataset.commits("low_res").read(0)
    assert receipt
    before, name = content(dataset, "low_res"), receipt.objects[0].name
    dataset.folder.write(name, b"")
    dataset.commits("low_res").mark(0, [name])
    process = killing("f", tmp_path / "log", 2)
    assert [in_child(dataset, "low_res", process) for _ in range(3)] == [-9, -9, 0]
    assert content(dataset, "low_res") == before
    repaired(dataset)


def test_a_repair_that_was_killed_three_times_says_so_and_is_tried_again(dataset: Dataset, tmp_path: Path) -> None:
    run_stage(dataset, "low_res", 0, process=batch_dependent)
    receipt = dataset.commits("low_res").read(0)
    assert receipt
    before, name = content(dataset, "low_res"), receipt.objects[0].name
    dataset.folder.write(name, b"")
    dataset.commits("low_res").mark(0, [name])
    process = killing("f", tmp_path / "log", 3)
    assert [in_child(dataset, "low_res", process) for _ in range(3)] == [-9] * 3
    with pytest.raises(ShardError, match=r"(?s)nothing was put back.*the process died 3 times"):
        run_stage(dataset, "low_res", 0, process=process)
    run_stage(dataset, "low_res", 0, process=process)
    assert content(dataset, "low_res") == before


def test_a_lost_ledger_of_samples_that_are_good_now_is_written_again(tmp_path: Path) -> None:
    """Kills by chance had left the sample out. The good samples and the object are as recorded all the time."""
    dataset = made_at(tmp_path, max_failure_ratio=0.5)
    process = killing("f", tmp_path / "log", 3)
    assert [in_child(dataset, "low_res", process) for _ in range(4)] == [-9] * 3 + [0]
    receipt = dataset.commits("low_res").read(0)
    assert receipt
    assert receipt.ledger
    dataset.folder.remove(receipt.ledger)
    repaired(dataset, process=process)
    (row,) = ledger_rows(dataset.commits("low_res"))
    assert (row["key"],) == receipt.failed_keys
    assert "does not fail any more; run: resmaster repair" in row["message"]
    retried = run_stage(dataset, "low_res", 0, number=2, process=process)
    assert (retried.samples_ok, retried.samples_failed) == (10, 0)


def test_outputs_of_a_killed_run_are_not_used_after_an_earlier_stage_was_made_anew(dataset: Dataset) -> None:
    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for output, sample in zip(BATCH_DEPENDENT["high_res"](config, samples), samples):
            assert sample.low_res
            yield replace(output, files={**output.files, "txt": sample.low_res.data})

    def killed(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        if samples[0].prompt == "g":
            wait_for_spills(config, 6)
            os.kill(os.getpid(), 9)
        yield from process(config, samples)

    for stage in ("low_res", "captions"):
        run_stage(dataset, stage, 0, process=BATCH_DEPENDENT[stage])
    assert in_child(dataset, "high_res", killed) == -9
    assert len(spills(dataset)) == 6
    before = dataset.commits("low_res").read(0)
    assert before
    dataset.folder.write(before.objects[0].name, b"")
    dataset.commits("low_res").mark(0, [before.objects[0].name])
    give_up_damaged(dataset)
    for stage in ("low_res", "captions"):
        run_stage(with_size(dataset, "low_res", 2), stage, 0, process=BATCH_DEPENDENT[stage])
    receipt = run_stage(dataset, "high_res", 0, process=process)
    with shard_samples(dataset, 0, ["low_res"]) as samples, committed_outputs(dataset, receipt) as outputs:
        read = {sample.key: sample.low_res.data for sample in samples if sample.low_res}
        assert {key: outputs.file(key, "txt") for key in outputs} == read


def test_outputs_of_a_repair_on_a_wrong_machine_do_not_hinder_the_next_one(dataset: Dataset) -> None:
    run_stage(dataset, "low_res", 0, process=batch_dependent)

    def other(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for output in batch_dependent(config, samples):
            yield replace(output, files={**output.files, "txt": b"another machine's"})

    with pytest.raises(ShardError, match="came out with other bytes"):
        repaired(dataset, process=other)
    run_stage(dataset, "low_res", 0, process=batch_dependent)
    repaired(dataset)


def test_a_stage_with_slots_is_repaired_although_samples_became_good_before_it(tmp_path: Path) -> None:
    """What an earlier stage had lost took no place in the slots of that attempt."""

    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for place, sample in enumerate(samples):
            files = BATCH_DEPENDENT["low_res"](config, [sample])
            told = f"{place} of {''.join(each.prompt[0] for each in samples)}".encode()
            yield from (replace(output, files={**output.files, "txt": told}) for output in files)

    together = Stage(
        "together",
        process=process,
        identity=lambda config, weights: {},
        doing="seeing samples together",
        reads=("low_res",),
        slot=lambda config: 3,
    )
    register(together)
    try:
        prompts = ["a", "b bad low_res", "c", "d", "e", "f", "g"]
        dataset = made_at(tmp_path, prompts, max_failure_ratio=0.5)
        run_stage(dataset, "low_res", 0, process=batch_dependent)
        told = run_stage(dataset, "together", 0)
        assert [batch.lost for batch in told.batches] == [tuple(told.lost_keys)]

        def retried(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
            yield from batch_dependent(config, good_at_last(samples))

        run_stage(dataset, "low_res", 0, number=2, process=retried)
        assert run_stage(dataset, "together", 0, process=_all_good(process)).number == 2
        repaired(dataset, "together", _all_good(process))
    finally:
        STAGES.pop("together")


def _all_good(process: Process) -> Process:
    return lambda config, samples: process(config, good_at_last(samples))


def test_a_record_without_batches_is_repaired_in_the_batches_of_the_configuration(dataset: Dataset) -> None:
    run_stage(dataset, "low_res", 0, process=batch_dependent)
    rewritten(dataset, lambda record: record.pop("batches"))
    repaired(dataset)
    with pytest.raises(ShardError, match="came out with other bytes"):
        repaired(with_size(dataset, "low_res", 2))


def test_a_record_that_counts_a_good_sample_as_lost_ends_in_no_traceback(dataset: Dataset) -> None:
    run_stage(dataset, "low_res", 0, process=batch_dependent)
    rewritten(dataset, lambda record: record["batches"][0].update(lost=[dataset.plan.read(0)[1].key]))
    repaired(dataset)


@pytest.mark.parametrize("told", [{"keys": ["x", "y"]}, {"lost": ["x", "y"]}])
def test_a_record_whose_batches_name_samples_of_elsewhere_is_repaired(dataset: Dataset, told: object) -> None:
    run_stage(dataset, "low_res", 0, process=batch_dependent)
    rewritten(dataset, lambda record: record["batches"][0].update(told))
    repaired(dataset)


@pytest.mark.parametrize("number", [10**9, 10**30])
def test_a_record_with_absurd_batches_ends_in_one_line(dataset: Dataset, number: int) -> None:
    run_stage(dataset, "low_res", 0, process=batch_dependent)
    rewritten(dataset, lambda record: record["batches"][0].update(slot=number, size=number))
    with pytest.raises(ShardError, match="came out with other bytes"):
        repaired(dataset)


def test_a_record_without_provenance_gets_a_later_attempt(tmp_path: Path) -> None:
    dataset = made_at(tmp_path, ["a", "b bad low_res"], max_failure_ratio=0.5)
    run_stage(dataset, "low_res", 0, process=batch_dependent)
    rewritten(dataset, lambda record: record.update(provenance={}))
    assert run_stage(dataset, "low_res", 0, number=2, process=batch_dependent).number == 2


@pytest.mark.parametrize(
    "told",
    [
        [{"slot": 0}],
        [{"slot": "4"}],
        [{"slot": 4, "size": 0}],
        [{"slot": 4, "size": 4, "shards": 1}],
        [{"slot": 4, "size": 4, "threads": MOST_THREADS + 1}],
        [{"slot": 4, "size": 4}, {"slot": 1, "size": 1}],
        [{"slot": 4, "keys": ["k"]}, {"slot": 1, "keys": ["k"]}],
        {},
        [4],
    ],
)
def test_a_record_with_impossible_batches_is_a_damaged_record(dataset: Dataset, told: object) -> None:
    run_stage(dataset, "low_res", 0, process=batch_dependent)
    rewritten(dataset, lambda record: record.update(batches=told))
    with pytest.raises(ShardError, match=r"damaged commit record \(batches"):
        dataset.commits("low_res").read(0)


def test_explain_tells_which_samples_were_not_made_in_the_usual_batch(dataset: Dataset, tmp_path: Path) -> None:
    def told(explanation: Explanation | ShardExplanation) -> list[str]:
        lines = spelled(explanation).splitlines()
        return [" ".join(line.split()[1:]) for line in lines if line.startswith("  batch")]

    process = killing("f", tmp_path / "log", 2)
    assert [in_child(dataset, "low_res", process) for _ in range(3)] == [-9, -9, 0]
    keys = {sample.prompt: sample.key for sample in dataset.plan.read(0)}
    found = dataset.commits("low_res").read(0)
    assert found
    alone, usual = found.batches[1].spelled(), found.batches[0].spelled()
    assert (alone.startswith("alone, a batch of 1"), usual.startswith("in a slot of 4, a batch of 4")) == (True, True)
    assert told(explain(dataset, keys["a"])) == []
    assert told(explain(dataset, keys["e"])) == [f"{alone}: this sample; the others {usual}"]
    assert told(explain_shard(dataset, 0)) == [
        f"{alone}: {', '.join(keys[prompt] for prompt in 'efgh')}; the others {usual}"
    ]


def test_the_record_of_a_usual_shard_names_no_sample() -> None:
    usual, alone = Batch(slot=8, size=8, threads=2), Batch(slot=1, size=1, threads=2)
    assert recorded(dict.fromkeys("abc", usual), "abc") == (usual,)
    mixed = {"a": alone, "b": usual, "c": usual}
    assert recorded(mixed, "abc") == (usual, replace(alone, keys=("a",)))
    assert batch_of_each(recorded(mixed, "abc"), "abc") == mixed
    part = recorded({"b": usual}, "abc")
    assert batch_of_each(part, "abc") == {"b": usual}, "of the others nothing is known"
    assert recorded({}, "") == ()


def torch_dependent(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    """`batch_dependent` that also depends on the number of torch's threads, as sums on a CPU do."""
    threads = torch.get_num_threads()
    for output in batch_dependent(config, samples):
        yield replace(output, files={**output.files, "txt": str(threads).encode()})


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_a_repair_computes_with_the_threads_that_the_record_names(
    dataset: Dataset, threads: Callable[[int], None]
) -> None:
    threads(2)
    receipt: Receipt = run_stage(dataset, "low_res", 0, process=torch_dependent)
    assert {batch.threads for batch in receipt.batches} == {2}
    threads(1)
    repaired(dataset, process=torch_dependent)
    assert torch.get_num_threads() == 1

    def other(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for output in torch_dependent(config, samples):
            yield replace(output, files={**output.files, "txt": b"another torch"})

    model = dataset.config.model.model_copy(update={"compile": "blocks"})
    changed = replace(dataset, config=dataset.config.model_copy(update={"model": model}))
    with pytest.raises(ShardError, match=r"came out with other bytes .*, torch threads 2, model.compile: auto\)"):
        repaired(changed, process=other)


def test_a_method_without_batches_that_runs_out_of_memory_costs_the_sample(tmp_path: Path) -> None:
    dataset = made_at(tmp_path, upscale={"method": "lanczos"}, quality={"clip": None})
    run_stage(dataset, "low_res", 0, process=batch_dependent)

    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        if samples[0].prompt == "c":
            raise MemoryError
        yield from batch_dependent(config, samples)

    receipt = run_stage(dataset, "high_res", 0, process=process)
    assert (receipt.samples_ok, receipt.samples_failed) == (9, 1)
    assert receipt.batches == (replace(receipt.batches[0], slot=1, size=1, keys=()),)
    repaired(dataset, "high_res", process)
