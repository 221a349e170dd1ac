"""A metric that this module lists is measured, and found in every place that derives from the list."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from resmaster_stages import quality
from resmaster_stages.config.dataset import QualityConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.schemas import manifest_schema, quality_schema
from resmaster_stages.dataset.stages import stage_hashes
from resmaster_stages.evaluation.columns import compare_schema
from resmaster_stages.evaluation.compare import compare_datasets, write_comparison
from resmaster_stages.evaluation.variants import Variant
from resmaster_stages.inspection.explain import explain, spelled
from resmaster_stages.inspection.status import status
from resmaster_stages.metrics import METRICS, metric_columns
from resmaster_stages.metrics.flags import badness, known_flags
from resmaster_stages.metrics.metric import Column, Flag, Metric
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.models.identity import Weights
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.publish.report import write_report
from resmaster_stages.publish.summary import summary
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.filesystem import open_root
from tests.evaluation.test_set_metrics import Means
from tests.fake_stages import FAKES, UNREAD, planned

REDNESS = Metric(
    compute=lambda pair: (float(pair.high_rgb[:, :, 0].mean() / 255), None),
    columns=(
        Column(
            "redness",
            "mean of the red channel, from 0 to 1",
            label="red",
            form="{:.3f}",
            better="↓",
            compared=True,
            flag=Flag("red", "any red at all", above=-1.0),
            badness=(0.0, 1.0),
        ),
        Column("redness_of_nothing", "always empty"),
    ),
)


@contextmanager
def redness_listed() -> Iterator[None]:
    METRICS.append(REDNESS)
    try:
        yield
    finally:
        METRICS.remove(REDNESS)


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dataset]:
    """Fake images, measured by the stage itself; published."""
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))
    monkeypatch.setattr("resmaster_stages.metrics.features.load_extractor", lambda config: Means())
    monkeypatch.setattr("resmaster_stages.metrics.features.inception_weights", lambda: None)
    for module in ("quality", "planning.checks"):
        monkeypatch.setattr(f"resmaster_stages.{module}.geometry_of", lambda model: Geometry(16, 8))
    monkeypatch.setattr("resmaster_stages.planning.checks.family_of", lambda model: UNREAD)
    settings = {"quality": {"clip": None, "features": "inception"}, "model": {"id": "tiny"}}
    dataset = planned(tmp_path / "out", ["a", "b"], tmp_path, **settings)
    with redness_listed():
        for stage in dataset.hashes:
            run_stage(dataset, stage, 0, process={**FAKES, "quality": quality.process}[stage])
        write_manifest(dataset)
        write_report(dataset)
        yield dataset


def test_a_build_measures_it_and_tells_of_it(dataset: Dataset) -> None:
    rows = pq.read_table(dataset.folder.url_of("manifest.parquet")).to_pylist()
    colours = [int(row["key"][:2], 16) / 255 for row in rows]
    assert [row["redness"] for row in rows] == pytest.approx(colours), "fake images are of the key's colour"
    assert {row["redness_of_nothing"] for row in rows} == {None}
    assert all("red" in row["flags"] for row in rows)
    page = dataset.folder.read("report/index.html").decode()
    assert "<dt>red ↓</dt>" in page
    assert '<option value="redness -1">' in page
    assert '<option value="red">' in page
    assert '<li title="any red at all">red</li>' in page
    card = dataset.folder.read("README.md").decode()
    assert "| `redness` | mean of the red channel, from 0 to 1 |" in card
    assert "| `redness_of_nothing` | always empty |" in card
    assert "| `red` | any red at all |" in card
    assert "| red ↓ | 0." in summary(dataset, status(dataset))
    assert "red 2)" in summary(dataset, status(dataset))
    assert f"redness {rows[0]['redness']:.4g}" in spelled(explain(dataset, rows[0]["key"]))


def test_a_comparison_has_its_mean(dataset: Dataset, tmp_path: Path) -> None:
    built = [(Variant("resmaster", "4x4", dataset.config), dataset)]
    folder = open_root(str(tmp_path / "compared"))
    write_comparison(folder, "demo", built, compare_datasets(built))
    (row,) = pq.read_table(tmp_path / "compared" / "compare.parquet").to_pylist()
    measured = pq.read_table(dataset.folder.url_of("manifest.parquet"))["redness"].to_pylist()
    assert row["redness"] == pytest.approx(sum(measured) / 2)
    assert "redness_of_nothing" not in row
    page = folder.read("compare.md").decode()
    assert "| red ↓ |" in page
    assert f"| {row['redness']:.3f} |" in page
    assert "- red ↓: mean of the red channel, from 0 to 1\n" in page


def test_what_derives_from_the_list_follows_it() -> None:
    config, row = parse_config({"name": "d"}), {"redness": 0.5, "flags": ["red"]}
    before, hashes = badness({}), stage_hashes(config)
    with redness_listed():
        for schema in (quality_schema(), manifest_schema(), compare_schema()):
            assert "redness" in schema.names
        assert badness(row) == before + 0.5 + 2
        now = stage_hashes(config)
        assert [stage for stage in now if now[stage] != hashes[stage]] == ["quality"], "older tables lack its column"
    assert "redness" not in quality_schema().names


def test_columns_and_flags_have_names_of_their_own_and_thresholds_are_settings() -> None:
    names = [column.name for column in metric_columns()]
    flags = [column.flag for column in metric_columns() if column.flag]
    assert len({*names}) == len(names)
    assert len(known_flags()) == len(flags)
    settings = {limit for flag in flags for limit in (flag.below, flag.above) if isinstance(limit, str)}
    assert settings == {name for name in QualityConfig.model_fields if name.startswith(("min_", "max_"))}
