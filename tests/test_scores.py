"""Datasets with and without scores by models: what is in their tables and on their pages, and what is read of older
ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from resmaster_stages import quality
from resmaster_stages.config.dataset import DatasetConfig, QualityConfig
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.schemas import manifest_schema, quality_schema
from resmaster_stages.evaluation.compare import compare_datasets
from resmaster_stages.evaluation.page import markdown
from resmaster_stages.evaluation.variants import Variant
from resmaster_stages.inspection.explain import explain, spelled
from resmaster_stages.inspection.status import status
from resmaster_stages.library.opened import OpenedDataset
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.models.identity import Weights, score_identity
from resmaster_stages.publish.publish import publish
from resmaster_stages.publish.report import write_report
from resmaster_stages.publish.summary import summary
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.tables import decode_table, encode_table
from tests import tiny_scores
from tests.evaluation.test_set_metrics import Means
from tests.fake_stages import FAKES, UNREAD, files_of, planned

SCORES = {"aesthetic_score", "unsafe_score", "watermark_score"}


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def weights(config: DatasetConfig) -> Weights:
        safety = config.quality.safety
        return Weights(config.model.id, scores=() if safety is None else (("safety", score_identity(safety)),))

    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", weights)
    monkeypatch.setattr("resmaster_stages.metrics.features.load_extractor", lambda config: Means())
    monkeypatch.setattr("resmaster_stages.metrics.features.inception_weights", lambda: None)
    for module in ("quality", "planning.checks"):
        monkeypatch.setattr(f"resmaster_stages.{module}.geometry_of", lambda model: Geometry(16, 8))
    monkeypatch.setattr("resmaster_stages.planning.checks.family_of", lambda model: UNREAD)


def built(folder: Path, **values: Any) -> Dataset:
    """Fake images, measured by the stage itself; published."""
    settings = {"clip": None, "features": "inception", "device": "cpu", **values}
    dataset = planned(folder / "out", ["a", "b", "bad high_res"], folder, quality=settings, model={"id": "tiny"})
    for shard in range(dataset.plan.shards):
        for stage in dataset.hashes:
            run_stage(dataset, stage, shard, process={**FAKES, "quality": quality.process}[stage])
    publish(dataset)
    return dataset


@pytest.fixture
def safety(tmp_path: Path) -> dict[str, str]:
    return {"model": str(tiny_scores.classifier(tmp_path / "classifier")), "label": "nsfw"}


def tables(dataset: Dataset) -> list[pq.ParquetFile]:
    paths = sorted((Path(dataset.folder.path) / "quality").glob("*[0-9a-f].parquet"))
    return [pq.ParquetFile(path) for path in paths if ".features." not in path.name]


def test_a_score_is_measured_flagged_and_told_of(tmp_path: Path, safety: dict[str, str]) -> None:
    dataset = built(tmp_path, safety=safety, max_unsafe=0.0)
    rows = pq.read_table(dataset.folder.url_of("manifest.parquet")).to_pylist()
    scores = [row["unsafe_score"] for row in rows]
    assert len({*scores}) == 2
    assert all(0 < score < 1 for score in scores)
    assert all(row["flags"][:1] == ["unsafe"] or "unsafe" in row["flags"] for row in rows)
    for names in (rows[0].keys(), *(file.schema_arrow.names for file in tables(dataset))):
        assert SCORES & {*names} == {"unsafe_score"}
    page = dataset.folder.read("report/index.html").decode()
    assert "<dt>unsafe ↓</dt>" in page
    assert "aesthetic" not in page
    card = dataset.folder.read("README.md").decode()
    assert "| `unsafe_score` | how unsafe for work" in card
    assert "| `unsafe` | probably not safe for work |" in card
    assert "watermark" not in card
    assert f"| safety score | `{Path(safety['model']).name}` |" in card
    assert "| unsafe ↓ | 0." in summary(dataset, status(dataset))
    assert "unsafe 2" in summary(dataset, status(dataset))
    assert f"unsafe_score {scores[0]:.4g}" in spelled(explain(dataset, rows[0]["key"]))
    assert [sample.metrics["unsafe_score"] for sample in OpenedDataset(dataset)] == scores


def test_a_comparison_has_the_mean_of_a_score(tmp_path: Path, safety: dict[str, str]) -> None:
    dataset = built(tmp_path, safety=safety)
    (row,) = compare_datasets([(Variant("resmaster", "4x4", dataset.config), dataset)]).rows
    scores = pq.read_table(dataset.folder.url_of("manifest.parquet"))["unsafe_score"].to_pylist()
    assert row["unsafe_score"] == pytest.approx(sum(scores) / 2)
    page = markdown("demo", [row], {})
    assert "| unsafe ↓ |" in page
    assert "aesthetic" not in page


def test_a_dataset_without_scores_has_no_trace_of_them(tmp_path: Path) -> None:
    dataset = built(tmp_path)
    manifest = pq.read_schema(dataset.folder.url_of("manifest.parquet"))
    for names in (manifest.names, *(file.schema_arrow.names for file in tables(dataset))):
        assert not SCORES & {*names}
    said = [dataset.folder.read(name).decode() for name in ("README.md", "report/index.html")]
    said += [summary(dataset, status(dataset)), spelled(explain(dataset, next(iter(OpenedDataset(dataset))).key))]
    for text in said:
        assert not re.search(r"aesthetic|unsafe(?!-inline| content)|watermark", text)


@pytest.mark.parametrize("scored", [False, True])
def test_a_later_attempt_keeps_the_scores_of_the_first(tmp_path: Path, safety: dict[str, str], scored: bool) -> None:
    dataset = built(tmp_path, **({"safety": safety} if scored else {}))
    before = {sample.prompt: sample.metrics for sample in OpenedDataset(dataset)}

    def mended(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for sample in samples:
            yield Output(sample.key, files=files_of(sample, 64))

    failed = next(sample.shard for shard in range(2) for sample in dataset.plan.read(shard) if "bad" in sample.prompt)
    for stage in dataset.hashes:
        processes = {**FAKES, "high_res": mended, "quality": quality.process}
        run_stage(dataset, stage, failed, number=2 if stage in ("high_res", "quality") else 1, process=processes[stage])
    after = {sample.prompt: sample.metrics for sample in OpenedDataset(dataset)}
    assert len(after) == 3
    assert {prompt: after[prompt] for prompt in before} == before
    assert ("unsafe_score" in after["bad high_res"]) is scored


def test_tables_of_older_versions_are_read(tmp_path: Path) -> None:
    """They lack the columns that came later: those of scores, and `near_duplicate_of`."""
    dataset = built(tmp_path)
    path = Path(dataset.folder.path) / "manifest.parquet"
    older = pq.read_table(path).drop_columns(["near_duplicate_of"])
    pq.write_table(older, path)
    table = decode_table(path, manifest_schema(), "manifest.parquet")
    for name in (*SCORES, "near_duplicate_of"):
        assert table[name].null_count == len(table) == 2
    write_report(dataset)
    assert "<dt>PSNR ↑</dt>" in dataset.folder.read("report/index.html").decode()
    (row,) = compare_datasets([(Variant("resmaster", "4x4", dataset.config), dataset)]).rows
    assert row["unsafe_score"] is None
    kept = tables(dataset)[0].read().to_pylist()
    data = encode_table(kept, quality_schema(QualityConfig()))
    assert [row["unsafe_score"] for row in decode_table(data, quality_schema(), "t").to_pylist()] == [None] * len(kept)
