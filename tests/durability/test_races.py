"""Twelve processes, one shard: one of them wins, all return its receipt, and the others' objects are gone."""

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.dataset import open_dataset
from resmaster_stages.dataset.ledger import ledger_rows
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.filesystem import open_root
from tests.fake_stages import low_res, planned

PROCESSES = 12


def contend(url: str, environment: dict[str, str], barrier: Any, answers: Any) -> None:
    """What each process does: compute the shard, wait for all others to have computed it too, commit."""
    os.environ.update(environment)

    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        yield from low_res(config, samples)
        barrier.wait(120)

    dataset = open_dataset(url)
    receipt = run_stage(dataset, "low_res", 0, process=process, provenance={"process": os.getpid()})
    answers.put(json.dumps(receipt.to_json(), sort_keys=True))


@pytest.mark.parametrize("store", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_twelve_processes_race_for_a_shard(store: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    root, environment = str(tmp_path / "out"), {}
    if store == "s3":
        root = request.getfixturevalue("s3_root")
        environment = request.getfixturevalue("s3_server").environment
    dataset = planned(root, ["a", "bad low_res"], tmp_path)
    before = {file.name for file in dataset.folder.files()}

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.durability.injection", "s3fs"])
    barrier, answers = context.Barrier(PROCESSES), context.Queue()
    children = [
        context.Process(target=contend, args=(dataset.url, environment, barrier, answers)) for _ in range(PROCESSES)
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
    record = f"commits/low_res-{winner['stage_hash'][:8]}/000000.json"
    assert new == {winner["objects"][0]["name"], winner["ledger"], record}
    assert [row["attempt"] for row in ledger_rows(dataset.folder, "low_res")] == [winner["attempt"]]
