"""`repair --retry-errors`: failed samples get the shard's next attempt; what is committed is never touched."""

import json
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.chain import read_chain
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import Dataset, create_or_open
from resmaster_stages.dataset.ledger import ledger_rows
from resmaster_stages.dataset.reading import committed_outputs, shard_samples
from resmaster_stages.dataset.retry import Retries, number_of, part_of, retries_of
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.inspection.explain import explain
from resmaster_stages.inspection.status import pending, status
from resmaster_stages.models.identity import Weights
from resmaster_stages.publish import report
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.runner.run import run_stage
from tests.fake_stages import FAKES, files_of, planned

PROMPTS = ["a", "bad low_res", "b", "bad high_res", "c", "d"]


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))


@pytest.fixture(params=["local", "memory"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    """Two shards of three, complete: the first lost a sample in low_res, the second one in high_res."""
    root = str(tmp_path / "root") if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    dataset = planned(root, PROMPTS, tmp_path, samples_per_shard=3)
    work(dataset)
    return dataset


class Mended:
    """The stand-in stages with the mistake corrected; `done` lists what they were asked for."""

    def __init__(self, still_bad: Sequence[str] = ()) -> None:
        self.still_bad, self.done = still_bad, dict[str, list[str]]()

    def process(self, stage: str, config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for sample in samples:
            self.done.setdefault(stage, []).append(sample.prompt)
            if sample.prompt in self.still_bad and stage in sample.prompt:
                yield from FAKES[stage](config, [sample])
            elif stage in ("low_res", "high_res"):
                yield Output(sample.key, files=files_of(sample, 16 if stage == "low_res" else 64))
            else:
                yield from FAKES[stage](config, [sample])


def work(dataset: Dataset, mended: Mended | None = None, retries: Retries | None = None) -> list[Receipt]:
    """Do all that is pending, stage by stage."""
    receipts = []
    for stage in dataset.hashes:
        for shard in pending(dataset, stages=[stage], retries=retries)[stage]:

            def process(config: DatasetConfig, samples: Sequence[Sample], stage: str = stage) -> Iterator[Output]:
                return (mended.process(stage, config, samples)) if mended else FAKES[stage](config, samples)

            number = number_of(retries, stage, shard)
            receipts.append(run_stage(dataset, stage, shard, number=number, process=process))
    return receipts


def outputs(dataset: Dataset, stage: str, shard: int) -> dict[str, Output]:
    receipt = dataset.commits(stage).read(shard)
    assert receipt is not None
    with committed_outputs(dataset, receipt) as found:
        return {key: found[key] for key in found}


def snapshot(dataset: Dataset) -> dict[str, bytes]:
    """Every file but those that `publish` replaces."""
    fs, folder = dataset.folder.fs, dataset.folder.path
    names = [
        name
        for name in fs.find(folder)
        if name.rpartition("/")[2] not in ("manifest.parquet", "index.json", "README.md")
    ]
    return {name: fs.cat_file(name) for name in names}


def read_by_index(dataset: Dataset) -> list[str]:
    """The keys that plain webdataset sees over index.json, with repetitions."""
    import webdataset as wds

    index = json.loads(dataset.folder.read(layout.INDEX))
    urls = [f"{dataset.folder.path}/{shard['url']}" for shard in index["shardlist"]]
    keys = [sample["__key__"] for sample in wds.WebDataset(urls, shardshuffle=False)]
    assert len(keys) == sum(shard["nsamples"] for shard in index["shardlist"])
    return keys


def key_of(dataset: Dataset, prompt: str) -> str:
    plan = dataset.plan
    return next(s.key for shard in range(plan.shards) for s in plan.read(shard) if s.prompt == prompt)


def test_what_failed_gets_the_next_attempt_and_nothing_else_changes(dataset: Dataset) -> None:
    write_manifest(dataset)
    before = snapshot(dataset)
    made = {(stage, shard): outputs(dataset, stage, shard) for stage in dataset.hashes for shard in (0, 1)}
    assert not any(pending(dataset).values()), "a failed sample is no reason to work"
    retries, samples = retries_of(dataset)
    assert (retries, samples) == ({"low_res": {"0": 2}, "high_res": {"1": 2}}, 2)
    assert json.loads(json.dumps(retries)) == retries, "a run's parameter"
    assert pending(dataset, retries=retries) == {"low_res": [0], "captions": [], "high_res": [1], "quality": []}
    mended = Mended()
    receipts = work(dataset, mended, retries)
    # low_res computes its slot whole, as an undisturbed run would; what was good in it is copied all the same
    assert mended.done == {
        "low_res": ["a", "bad low_res", "b"],
        "captions": ["bad low_res"],
        "high_res": ["bad low_res", "bad high_res"],
        "quality": ["bad low_res", "bad high_res"],
    }
    assert {(r.stage, r.shard, r.number, r.samples_ok, r.samples_failed) for r in receipts} == {
        ("low_res", 0, 2, 3, 0), ("captions", 0, 2, 3, 0), ("high_res", 0, 2, 3, 0), ("quality", 0, 2, 3, 0),
        ("high_res", 1, 2, 3, 0), ("quality", 1, 2, 3, 0),
    }  # fmt: skip
    after = snapshot(dataset)
    assert {name: after[name] for name in before} == before, "what was there is untouched to the byte"
    assert not any(pending(dataset, retries=retries).values()), "the wish is fulfilled"
    assert retries_of(dataset) == ({}, 0)
    for (stage, shard), earlier in made.items():
        now = outputs(dataset, stage, shard)
        assert {key: now[key] for key in earlier} == earlier, "what was good is the same to the byte"
        assert len(now) == 3

    keys = [sample.key for shard in (0, 1) for sample in dataset.plan.read(shard)]
    published = write_manifest(dataset)
    assert (published.samples, published.failures) == (6, dict.fromkeys(FAKES, 0))
    rows = pq.read_table(dataset.folder.open(layout.MANIFEST)).to_pylist()
    assert [row["key"] for row in rows] == keys, "in the plan's order"
    for row in rows:
        data = dataset.folder.read(row["high_res_object"])
        assert data[row["high_res_offset"] :].startswith(b"\x89PNG")
    for shard in (0, 1):
        with shard_samples(dataset, shard, list(dataset.hashes)) as found:
            assert [sample.key for sample in found] == keys[3 * shard : 3 * shard + 3]
            assert all(s.high_res and s.high_res.open().size == (64, 64) and len(s.captions) == 4 for s in found)
    stages = {each.stage: (each.samples_ok, each.samples_failed, each.retried) for each in status(dataset).stages}
    assert stages == {"low_res": (6, 0, 1), "captions": (6, 0, 1), "high_res": (6, 0, 2), "quality": (6, 0, 2)}
    assert report.failures(dataset) == []
    trace = {each.stage: each for each in explain(dataset, key_of(dataset, "bad low_res")).stages}
    assert {each.state for each in trace.values()} == {"committed"}
    assert trace["high_res"].commit.endswith("/000000.2.json")
    assert len(trace["low_res"].failures) == 1, "its past is kept"
    if dataset.folder.local:
        assert read_by_index(dataset) == keys, "exactly once, in the plan's order"


def test_what_fails_again_stays_in_the_ledger_and_can_be_asked_for_again(dataset: Dataset) -> None:
    retries, _ = retries_of(dataset)
    work(dataset, Mended(still_bad=["bad high_res"]), retries)
    assert not any(pending(dataset, retries=retries).values()), "the wish is fulfilled"
    rows = ledger_rows(dataset.commits("high_res"))
    assert [
        (row["key"], row["attempt_number"]) for row in sorted(rows, key=lambda row: int(row["attempt_number"]))
    ] == [
        (key_of(dataset, "bad high_res"), 1),
        (key_of(dataset, "bad high_res"), 2),
    ]
    assert write_manifest(dataset).samples == 5
    assert [row["attempt_number"] for row in report.failures(dataset)] == [2]
    found = status(dataset).stages[2]
    assert (found.samples_ok, found.samples_failed, found.retried) == (5, 1, 2)
    again, samples = retries_of(dataset)
    assert (again, samples) == ({"high_res": {"1": 3}}, 1)
    mended = Mended()
    (receipt, quality) = work(dataset, mended, again)
    assert (receipt.number, receipt.samples_ok) == (3, 3)
    assert (quality.stage, quality.number) == ("quality", 2), "it had nothing to do after the second"
    assert mended.done == {"high_res": ["bad high_res"], "quality": ["bad high_res"]}
    assert write_manifest(dataset).samples == 6
    if dataset.folder.local:
        assert len(set(read_by_index(dataset))) == 6


def test_a_record_counts_the_work_of_all_attempts(dataset: Dataset) -> None:
    first = dataset.commits("high_res").read(1)
    work(dataset, None, retries_of(dataset, stages=["high_res"])[0])
    second = dataset.commits("high_res").read(1)
    assert first is not None
    assert second is not None
    assert (first.provenance["unet"]["rows"], second.provenance["unet"]["rows"]) == (12, 16), "one sample more"
    assert second.seconds >= first.seconds


def test_only_the_shards_and_stages_asked_for(dataset: Dataset) -> None:
    assert retries_of(dataset, shards=[0]) == ({"low_res": {"0": 2}}, 1)
    retries, samples = retries_of(dataset, stages=["high_res"])
    assert (retries, samples) == ({"high_res": {"1": 2}}, 1)
    assert pending(dataset, retries=retries)["high_res"] == [1]
    assert part_of(retries, [0]) == {"high_res": {}}
    assert part_of(retries, [1, 2]) == retries
    assert part_of(None, [1]) is None


def test_racing_workers_make_one_attempt(dataset: Dataset) -> None:
    mended = Mended()

    def one(_: int) -> Receipt:
        return run_stage(
            dataset,
            "high_res",
            1,
            number=2,
            process=lambda config, samples: mended.process("high_res", config, samples),
        )

    with ThreadPoolExecutor(4) as pool:
        receipts = list(pool.map(one, range(4)))
    assert len({receipt.attempt for receipt in receipts}) == 1
    assert dataset.commits("high_res").numbers() == {0: 1, 1: 2}
    tars = [name for name in dataset.folder.names("high_res") if name.startswith("high_res/000001-")]
    assert len(tars) == 2, "the first attempt's and the winner's"


def test_a_build_that_comes_late_takes_what_was_mended_upstream_meanwhile(dataset: Dataset) -> None:
    """low_res is mended under a configuration whose later stages are not committed yet."""
    run_stage(
        dataset,
        "low_res",
        0,
        number=2,
        process=lambda config, samples: Mended().process("low_res", config, samples),
    )
    changed = create_or_open(
        dataset.config.model_copy(update={"captions": dataset.config.captions.model_copy(update={"style": "oil"})})
    )
    assert pending(changed) == {"low_res": [], "captions": [0, 1], "high_res": [0, 1], "quality": [0, 1]}
    work(changed, Mended())
    assert not any(pending(changed).values())
    assert write_manifest(changed).samples == 6
    numbers = {stage: receipt.number for stage, receipt in read_chain(changed, 0).committed.items()}
    assert numbers == {"low_res": 2, "captions": 1, "high_res": 1, "quality": 1}
    if changed.folder.local:
        assert len(read_by_index(changed)) == len(set(read_by_index(changed))) == 6


def test_a_run_that_was_killed_between_stages_goes_on_with_what_was_mended(dataset: Dataset) -> None:
    """Without the wish, which was its parameter: the records tell what is due."""
    run_stage(
        dataset,
        "low_res",
        0,
        number=2,
        process=lambda config, samples: Mended().process("low_res", config, samples),
    )
    assert pending(dataset) == {"low_res": [], "captions": [0], "high_res": [], "quality": []}, "the next one first"
    assert write_manifest(dataset).samples == 4, "a sample is published once every stage has it"
    work(dataset, Mended())
    assert write_manifest(dataset).samples == 5


def test_another_configuration_starts_afresh_and_the_first_finds_its_attempts_again(dataset: Dataset) -> None:
    work(dataset, Mended(), retries_of(dataset, stages=["high_res"])[0])
    changed = create_or_open(
        dataset.config.model_copy(update={"upscale": dataset.config.upscale.model_copy(update={"steps": 7})})
    )
    work(changed, Mended())
    assert write_manifest(changed).samples == 5
    assert write_manifest(create_or_open(dataset.config)).samples == 5
    assert changed.commits("high_res").numbers() == {0: 1, 1: 1}
