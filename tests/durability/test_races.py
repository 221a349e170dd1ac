"""Twelve processes, one shard, and each attempt at it.

One of them wins, all return its receipt, and the others' objects are gone. A loser that is still at work goes on,
although the winner deletes the shard's cache.
"""

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.dataset import open_dataset
from resmaster_stages.dataset.ledger import ledger_rows
from resmaster_stages.dataset.records import record_text
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.planning.redoing import asked
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.filesystem import open_root
from tests.durability.injection import everything, good_later
from tests.fake_stages import FAKES, low_res, planned

PROCESSES = 12


def contend(url: str, environment: dict[str, str], number: int, barrier: Any, answers: Any) -> None:
    """What each process does: compute the shard, wait for all others to have computed it too, commit."""
    os.environ.update(environment)
    dataset = open_dataset(url)

    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        yield from good_later(dataset, "low_res", 0)(config, samples)
        barrier.wait(120)

    receipt = run_stage(dataset, "low_res", 0, number=number, process=process, provenance={"process": os.getpid()})
    answers.put(record_text(receipt).decode())


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("store", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_twelve_processes_race_for_a_shard(
    store: str, number: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    root, environment = str(tmp_path / "out"), {}
    if store == "s3":
        root = request.getfixturevalue("s3_root")
        environment = request.getfixturevalue("s3_server").environment
    dataset = planned(root, ["a", "bad low_res"], tmp_path)
    if number == 2:
        run_stage(dataset, "low_res", 0, process=low_res)
    first = dataset.commits("low_res").attempt(0, 1)
    before = {file.name for file in dataset.folder.files()}

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.durability.injection", "s3fs"])
    barrier, answers = context.Barrier(PROCESSES), context.Queue()
    children = [
        context.Process(target=contend, args=(dataset.url, environment, number, barrier, answers))
        for _ in range(PROCESSES)
    ]
    for child in children:
        child.start()
    receipts = [json.loads(answers.get(timeout=150)) for _ in children]
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * PROCESSES
    assert receipts.count(receipts[0]) == PROCESSES, "all return the winner's receipt"
    assert receipts[0]["provenance"]["process"] in {child.pid for child in children}
    winner = receipts[0]
    new = {file.name for file in open_root(root).sub("demo").files()} - before
    record = layout.commit("low_res", dataset.hashes["low_res"], 0, number)
    assert (winner["number"], winner["samples_ok"], winner["samples_failed"]) == (number, number, 2 - number)
    assert new == {winner["objects"][0]["name"], record} | ({winner["ledger"]} if number == 1 else set())
    kept = dataset.commits("low_res").attempt(0, 1)
    assert kept is not None
    assert first in (None, kept), "what was committed stays as it was"
    assert [row["attempt"] for row in ledger_rows(dataset.commits("low_res"))] == [kept.attempt]


def redo(url: str, environment: dict[str, str], keys: str, barrier: Any) -> None:
    """What each process does: ask for samples again, and do what is due in the shard."""
    os.environ.update(environment)
    barrier.wait(120)
    asked(open_dataset(url), keys)
    dataset = open_dataset(url)
    for stage, process in FAKES.items():
        run_stage(dataset, stage, 0, process=process)


@pytest.mark.parametrize("store", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_twelve_processes_ask_for_samples_again_and_make_them_at_once(
    store: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Half of them want the first two samples, half the last two: each wish counts once, and none is lost."""
    roots, environment = [str(tmp_path / name) for name in ("raced", "calm")], {}
    if store == "s3":
        root = request.getfixturevalue("s3_root")
        roots, environment = [f"{root}/raced", f"{root}/calm"], request.getfixturevalue("s3_server").environment
    raced, calm = (planned(root, ["a", "b", "c"], tmp_path, samples_per_shard=3) for root in roots)
    for dataset in (raced, calm):
        for stage, process in FAKES.items():
            run_stage(dataset, stage, 0, process=process)
    a, b, c = raced.plan.keys_of(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.durability.injection", "s3fs"])
    barrier = context.Barrier(PROCESSES)
    wishes = [f"{a},{b}", f"{b},{c}"]
    children = [
        context.Process(target=redo, args=(raced.url, environment, wishes[number % 2], barrier))
        for number in range(PROCESSES)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(150)
    assert [child.exitcode for child in children] == [0] * PROCESSES
    assert len(open_dataset(raced.url).redos.requests) == 2
    for wish in wishes:
        asked(calm, wish)
    for url in (raced.url, calm.url):
        last = open_dataset(url)
        for stage, process in FAKES.items():
            receipt = run_stage(last, stage, 0, process=process)
            assert receipt.takes == {a: 1, b: 2, c: 1}
        write_manifest(last)
    assert everything(raced.url) == everything(calm.url)


def drop_again_and_again(url: str, names: list[str], started: Any) -> None:
    """Delete these folders without end, as winners do once."""
    folder = open_dataset(url).folder
    while True:
        for name in names:
            with suppress(OSError):
                folder.remove_all(name)
        started.set()


def test_a_loser_goes_on_while_the_winner_deletes_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample is spilled, and every batch has a breadcrumb of its own; both are deleted while they are written."""
    monkeypatch.setattr("resmaster_stages.runner.quarantine.SLOW_SECONDS", 0.0)
    prompts = [f"{number} of many" for number in range(800)]
    dataset = planned(tmp_path / "out", prompts, tmp_path, samples_per_shard=100, spill_seconds=0)
    hashed = dataset.hashes["low_res"]
    names = [layout.spill_folder("low_res", hashed, shard) for shard in range(8)]
    context = multiprocessing.get_context("forkserver")
    started = context.Event()
    winner = context.Process(target=drop_again_and_again, args=(dataset.url, names, started), daemon=True)
    winner.start()
    try:
        assert started.wait(120)
        receipts = [run_stage(dataset, "low_res", shard, process=low_res) for shard in range(8)]
    finally:
        winner.kill()
        winner.join(60)
    assert [receipt.samples_ok for receipt in receipts] == [100] * 8
