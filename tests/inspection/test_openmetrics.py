"""`resmaster status --openmetrics`: text that a scraper's own parser takes, with the numbers of the commit records."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from resmaster_flows.cli.main import main
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.errors import PlanError, ShardError, UserError
from resmaster_stages.inspection.openmetrics import openmetrics
from resmaster_stages.runner.run import run_stage
from tests.fake_stages import FAKES, planned


def built(tmp_path: Path, prompts: list[str], **provenance: Any) -> Dataset:
    dataset = planned(tmp_path / "out", prompts, tmp_path)
    for shard in range(-(-len(prompts) // 2)):
        for stage, process in FAKES.items():
            try:
                run_stage(dataset, stage, shard, process=process, provenance=provenance)
            except ShardError:
                break
    return dataset


def scraped(text: str) -> dict[tuple[str, ...], float]:
    """(name, stage, value of any other label) -> value; of the whole dataset: (name,) -> value."""
    values: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("dataset") == "demo"
            assert labels.pop("root")
            stage = [labels.pop("stage")] if "stage" in labels else []
            values[sample.name, *stage, *labels.values()] = sample.value
    return values


def test_the_numbers_of_a_build_with_failures(tmp_path: Path) -> None:
    prompts = ["a", "bad high_res 1", "c", "d", "bad low_res 1", "bad low_res 2"]
    dataset = built(tmp_path, prompts, gpu='a "big" one')
    with pytest.raises(ShardError):
        run_stage(dataset, "low_res", 2, process=FAKES["low_res"])
    found = scraped(openmetrics(dataset))
    assert found["resmaster_planned_shards",] == 3
    assert found["resmaster_planned_samples",] == 6
    shards = {state: found["resmaster_shards", "low_res", state] for state in ("committed", "pending", "failed")}
    assert shards == {"committed": 2, "pending": 0, "failed": 1}
    assert found["resmaster_shards", "high_res", "pending"] == 1
    samples = {state: found["resmaster_samples", "high_res", state] for state in ("ok", "failed", "pending")}
    assert samples == {"ok": 3, "failed": 1, "pending": 2}
    assert found["resmaster_sample_failures_total", "low_res", "SampleError"] == 4, "two samples, tried twice"
    assert found["resmaster_sample_retries_total", "low_res"] == 2
    assert found["resmaster_sample_retries_total", "high_res"] == 0
    assert found["resmaster_unet_views_total", "high_res"] == 4 * 4, "the stand-in counts four a sample"
    gpu = found["resmaster_gpu_seconds_total", "high_res", 'a "big" one']
    assert gpu == pytest.approx(found["resmaster_compute_seconds_total", "high_res"])
    assert found["resmaster_stored_bytes", "high_res"] == sum(
        path.stat().st_size for path in Path(dataset.folder.full("high_res")).iterdir()
    )
    megapixels = 4 * (16 * 4) ** 2 / 1e6
    assert found["resmaster_seconds_per_megapixel", "high_res"] == pytest.approx(
        found["resmaster_compute_seconds_total", "high_res"] / megapixels
    )
    assert found["resmaster_last_commit_timestamp_seconds", "quality"] > 1.7e9


def down(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    raise UserError("caption server http://127.0.0.1:9/v1 cannot be used")
    yield


def test_a_stage_that_fails_as_a_whole_is_counted(tmp_path: Path) -> None:
    """So that an alert on failed shards fires in an outage. Reads no record: the names say enough."""
    dataset = planned(tmp_path / "out", ["a", "b", "c", "d", "e"], tmp_path)
    for shard in range(3):
        run_stage(dataset, "low_res", shard, process=FAKES["low_res"])
    for shard in (0, 0, 1):
        with pytest.raises(UserError):
            run_stage(dataset, "captions", shard, process=down)
    with pytest.raises(PlanError):
        run_stage(dataset, "quality", 0, process=FAKES["quality"])
    found = scraped(openmetrics(dataset))
    shards = {state: found["resmaster_shards", "captions", state] for state in ("committed", "pending", "failed")}
    assert shards == {"committed": 0, "pending": 1, "failed": 2}
    assert found["resmaster_failed_attempts_total", "captions", "UserError"] == 3
    assert found["resmaster_failed_attempts_total", "quality", "PlanError"] == 1
    assert not any(name[:2] == ("resmaster_failed_attempts_total", "low_res") for name in found)
    run_stage(dataset, "captions", 0, process=FAKES["captions"])
    found = scraped(openmetrics(dataset))
    assert found["resmaster_shards", "captions", "failed"] == 1
    assert found["resmaster_failed_attempts_total", "captions", "UserError"] == 3, "a counter never falls"


def test_a_dataset_without_commits(tmp_path: Path) -> None:
    found = scraped(openmetrics(planned(tmp_path / "out", ["a"], tmp_path)))
    assert found["resmaster_shards", "quality", "pending"] == 1
    assert found["resmaster_compute_seconds_total", "quality"] == 0
    assert not any(name[0] == "resmaster_last_commit_timestamp_seconds" for name in found)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = built(tmp_path, ["a", "b"])
    assert main(["status", dataset.url, "--openmetrics"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("# EOF\n")
    assert scraped(out)["resmaster_samples", "quality", "ok"] == 2
    with pytest.raises(SystemExit):
        main(["status", dataset.url, "--openmetrics", "--json"])
