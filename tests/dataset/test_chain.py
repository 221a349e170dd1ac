"""`repair --retry-errors`: failed samples get another attempt, in supplements; what is committed is never touched."""

import json
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from resmaster_stages.config.dataset import STAGES, DatasetConfig, Stage
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.chain import list_links, read_chain
from resmaster_stages.dataset.commit import Receipt, list_commits
from resmaster_stages.dataset.dataset import Dataset, create_or_open
from resmaster_stages.dataset.ledger import ledger_rows
from resmaster_stages.dataset.plan import read_plan
from resmaster_stages.dataset.reading import shard_samples
from resmaster_stages.dataset.retry import request_retries
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.stages import stage_hashes
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
        self.still_bad, self.done = still_bad, dict[Stage, list[str]]()

    def process(self, stage: Stage, config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for sample in samples:
            self.done.setdefault(stage, []).append(sample.prompt)
            if sample.prompt in self.still_bad and stage in sample.prompt:
                yield from FAKES[stage](config, [sample])
            elif stage in ("low_res", "high_res"):
                yield Output(sample.key, files=files_of(sample, 16 if stage == "low_res" else 64))
            else:
                yield from FAKES[stage](config, [sample])


def work(dataset: Dataset, mended: Mended | None = None) -> list[Receipt]:
    """Do all that is pending, stage by stage."""
    receipts = []
    for stage in STAGES:
        for shard in pending(dataset, stages=[stage])[stage]:

            def process(config: DatasetConfig, samples: Sequence[Sample], stage: Stage = stage) -> Iterator[Output]:
                return (mended.process(stage, config, samples)) if mended else FAKES[stage](config, samples)

            receipts.append(run_stage(dataset, dataset.config, stage, shard, process=process))
    return receipts


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
    plan = read_plan(dataset.folder)
    return next(s.key for shard in range(plan.shards) for s in plan.read(shard) if s.prompt == prompt)


def test_what_failed_and_is_mended_comes_in_supplements_and_nothing_else_changes(dataset: Dataset) -> None:
    write_manifest(dataset)
    before = snapshot(dataset)
    assert not any(pending(dataset).values()), "a failed sample is no reason to work"
    assert request_retries(dataset) == 2
    assert request_retries(dataset) == 2, "asked for already: nothing new"
    assert pending(dataset) == {"low_res": [0], "captions": [], "high_res": [1], "quality": []}
    mended = Mended()
    receipts = work(dataset, mended)
    assert mended.done == {
        "low_res": ["bad low_res"],
        "captions": ["bad low_res"],
        "high_res": ["bad low_res", "bad high_res"],
        "quality": ["bad low_res", "bad high_res"],
    }
    assert {(r.stage, r.shard, r.supplement, len(r.keys)) for r in receipts} == {
        ("low_res", 0, 1, 1), ("captions", 0, 1, 1), ("high_res", 0, 1, 1), ("quality", 0, 1, 1),
        ("high_res", 1, 1, 1), ("quality", 1, 1, 1),
    }  # fmt: skip
    after = snapshot(dataset)
    assert {name: after[name] for name in before} == before, "what was there is untouched to the byte"
    assert not any(pending(dataset).values())
    assert request_retries(dataset) == 0

    keys = [sample.key for shard in (0, 1) for sample in read_plan(dataset.folder).read(shard)]
    published = write_manifest(dataset)
    assert (published.samples, published.failures) == (6, dict.fromkeys(STAGES, 0))
    rows = pq.read_table(dataset.folder.open(layout.MANIFEST)).to_pylist()
    assert [row["key"] for row in rows] == keys, "in the plan's order"
    for row in rows:
        data = dataset.folder.read(row["high_res_object"])
        assert data[row["high_res_offset"] :].startswith(b"\x89PNG")
    for shard in (0, 1):
        with shard_samples(dataset, dataset.config, read_plan(dataset.folder), shard, STAGES) as samples:
            assert [sample.key for sample in samples] == keys[3 * shard : 3 * shard + 3]
            assert all(s.high_res and s.high_res.open().size == (64, 64) and len(s.captions) == 4 for s in samples)
    found = {each.stage: (each.samples_ok, each.samples_failed, each.supplements) for each in status(dataset).stages}
    assert found == {"low_res": (6, 0, 1), "captions": (6, 0, 1), "high_res": (6, 0, 2), "quality": (6, 0, 2)}
    assert report.failures(dataset) == []
    trace = {each.stage: each for each in explain(dataset, key_of(dataset, "bad low_res")).stages}
    assert {each.state for each in trace.values()} == {"committed"}
    assert trace["high_res"].commit.endswith("/000000.s01.json")
    assert len(trace["low_res"].failures) == 1, "its past is kept"
    if dataset.folder.local:
        assert sorted(read_by_index(dataset)) == sorted(keys)


def test_what_fails_again_stays_in_the_ledger_and_can_be_asked_for_again(dataset: Dataset) -> None:
    request_retries(dataset)
    work(dataset, Mended(still_bad=["bad high_res"]))
    assert not any(pending(dataset).values()), "the request is answered"
    rows = ledger_rows(dataset.folder, "high_res")
    assert [
        (row["key"], row["attempt_number"]) for row in sorted(rows, key=lambda row: int(row["attempt_number"]))
    ] == [
        (key_of(dataset, "bad high_res"), 1),
        (key_of(dataset, "bad high_res"), 2),
    ]
    assert write_manifest(dataset).samples == 5
    assert [row["attempt_number"] for row in report.failures(dataset)] == [2]
    found = status(dataset).stages[2]
    assert (found.samples_ok, found.samples_failed, found.supplements) == (5, 1, 2)
    assert request_retries(dataset) == 1
    mended = Mended()
    (receipt, quality) = work(dataset, mended)
    assert (receipt.supplement, receipt.request, receipt.samples_ok) == (2, 2, 1)
    assert (quality.stage, quality.supplement) == ("quality", 1)
    assert mended.done == {"high_res": ["bad high_res"], "quality": ["bad high_res"]}
    assert write_manifest(dataset).samples == 6
    if dataset.folder.local:
        assert len(set(read_by_index(dataset))) == 6


def test_only_the_shards_and_stages_asked_for(dataset: Dataset) -> None:
    assert request_retries(dataset, shards=[0]) == 1
    assert pending(dataset) == {"low_res": [0], "captions": [], "high_res": [], "quality": []}
    assert request_retries(dataset, stages=["high_res"]) == 1
    assert pending(dataset)["high_res"] == [1]


def test_racing_workers_make_one_supplement(dataset: Dataset) -> None:
    request_retries(dataset, stages=["high_res"])
    mended = Mended()

    def one(_: int) -> Receipt:
        return run_stage(
            dataset,
            dataset.config,
            "high_res",
            1,
            process=lambda config, samples: mended.process("high_res", config, samples),
        )

    with ThreadPoolExecutor(4) as pool:
        receipts = list(pool.map(one, range(4)))
    assert len({receipt.attempt for receipt in receipts}) == 1
    link = list_links(dataset.folder, "high_res", stage_hashes(dataset.config)["high_res"])[1]
    assert [each.keys for each in link.supplements] == [(key_of(dataset, "bad high_res"),)]


def test_a_build_that_comes_late_takes_what_was_mended_upstream_meanwhile(dataset: Dataset) -> None:
    """low_res is mended under a configuration whose later stages are not committed yet: commit and supplement, one
    after the other."""
    request_retries(dataset, stages=["low_res"])
    run_stage(
        dataset,
        dataset.config,
        "low_res",
        0,
        process=lambda config, samples: Mended().process("low_res", config, samples),
    )
    changed = create_or_open(
        dataset.config.model_copy(update={"captions": dataset.config.captions.model_copy(update={"style": "oil"})})
    )
    assert pending(changed) == {"low_res": [], "captions": [0, 1], "high_res": [0, 1], "quality": [0, 1]}
    work(changed, Mended())
    assert not any(pending(changed).values())
    assert write_manifest(changed).samples == 6
    chain = read_chain(changed.folder, stage_hashes(changed.config), 0, "quality")
    assert [len(link.supplements) for link in chain.links.values()] == [1, 1, 1, 1]
    if changed.folder.local:
        assert len(read_by_index(changed)) == len(set(read_by_index(changed))) == 6


def test_another_configuration_knows_nothing_of_supplements_and_the_first_finds_them_again(dataset: Dataset) -> None:
    request_retries(dataset, stages=["high_res"])
    work(dataset, Mended())
    changed = create_or_open(
        dataset.config.model_copy(update={"upscale": dataset.config.upscale.model_copy(update={"steps": 7})})
    )
    work(changed, Mended())
    assert write_manifest(changed).samples == 5
    assert write_manifest(create_or_open(dataset.config)).samples == 5
    assert set(list_commits(changed.folder, "high_res", stage_hashes(changed.config)["high_res"])) == {0, 1}
