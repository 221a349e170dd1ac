"""A stage from outside: one row in the table of stages, and everything knows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resmaster_flows.cli.main import parser
from resmaster_flows.watch.page import headline
from resmaster_flows.watch.progress import Progress
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.schemas import table_schema
from resmaster_stages.dataset.stages import STAGES, Stage, register, stage_hashes
from resmaster_stages.inspection.explain import explain, spelled
from resmaster_stages.inspection.openmetrics import openmetrics
from resmaster_stages.inspection.status import pending, status
from resmaster_stages.inspection.verify import verify
from resmaster_stages.models.identity import Weights
from resmaster_stages.progress import ShardStarted
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.publish.report import write_report
from resmaster_stages.publish.summary import summary
from resmaster_stages.runner.run import run_stage
from resmaster_tasks.stages import stage_task
from tests.fake_stages import FAKES, planned

COLOURS = table_schema("colours", [("key", pa.string(), False), ("red", pa.int32(), False)])


def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    """How red the first pixel of a high-res image is."""
    for sample in samples:
        assert sample.high_res is not None
        red, _, _ = sample.high_res.open().getpixel((0, 0))  # type: ignore[misc]
        yield Output(sample.key, rows=[{"red": red}])


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))
    register(
        Stage(
            "colours",
            process="tests.extending.test_stage:process",
            identity=lambda config, weights: {"colours": "first pixel"},
            doing="looking at colours",
            reads=("high_res",),
            schema=lambda: COLOURS,
        )
    )
    yield
    del STAGES["colours"]


@pytest.fixture
def dataset(colours: None, tmp_path: Path) -> Dataset:
    """Two shards, built."""
    dataset = planned(tmp_path / "root", ["a", "b", "c"], tmp_path)
    for stage in dataset.hashes:
        for shard in pending(dataset, stages=[stage])[stage]:
            run_stage(dataset, stage, shard, process=FAKES.get(stage))
    return dataset


def test_it_is_built_as_any_other(dataset: Dataset) -> None:
    assert list(dataset.hashes) == ["low_res", "captions", "high_res", "quality", "colours"]
    (receipt, _) = dataset.commits("colours").read_all().values()
    assert layout.is_attempt(receipt.objects[0].name)
    assert receipt.upstream.keys() == {"high_res"}
    table = pq.read_table(dataset.folder.open(receipt.objects[0].name))
    first, second = dataset.plan.read(0)
    assert table.to_pylist() == [{"key": each.key, "red": bytes.fromhex(each.key)[0]} for each in (first, second)]
    assert not any(pending(dataset).values())
    assert not verify(dataset).damage
    assert stage_task("colours").name == "colours"


def test_its_settings_and_what_it_reads_decide_whether_it_is_done_again(colours: None, tmp_path: Path) -> None:
    dataset = planned(tmp_path / "root", ["a"], tmp_path)
    before = stage_hashes(dataset.config)["colours"]
    steps = dataset.config.upscale.model_copy(update={"steps": 7})
    assert stage_hashes(dataset.config.model_copy(update={"upscale": steps}))["colours"] != before
    quality = dataset.config.quality.model_copy(update={"max_seam": 9.0})
    assert stage_hashes(dataset.config.model_copy(update={"quality": quality}))["colours"] == before


def test_every_room_shows_it(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["repair", "--help"])
    assert "recaptions,colours" in capsys.readouterr().out
    assert status(dataset).stages[-1].samples_ok == 3
    labels = f'dataset="demo",root="{dataset.url.removesuffix("/demo")}",stage="colours",state="committed"'
    assert f"resmaster_shards{{{labels}}} 2" in openmetrics(dataset)
    key = dataset.plan.read(0)[0].key
    assert "colours" in spelled(explain(dataset, key))
    assert write_manifest(dataset).failures["colours"] == 0
    write_report(dataset)
    assert "| colours | 2 |" in summary(dataset, status(dataset))
    assert "colours: 0" in dataset.folder.read(layout.CARD).decode()
    progress = Progress({"colours": 3}, [0, 1])
    progress.hear(ShardStarted("colours", 0, 2))
    assert "looking at colours" in headline(progress)


def test_what_it_loses_is_not_published(colours: None, tmp_path: Path) -> None:
    dataset = planned(tmp_path / "root", ["a", "b"], tmp_path)

    def picky(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for sample in samples:
            error = ValueError("not this one") if sample.prompt == "b" else None
            yield Output(sample.key, rows=[] if error else [{"red": 1}], error=error)

    for stage in dataset.hashes:
        run_stage(dataset, stage, 0, process={**FAKES, "colours": picky}[stage])
    assert write_manifest(dataset).samples == 1
