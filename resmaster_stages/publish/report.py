"""Writes the folder `report/` of a dataset, the page and the contact sheets, from committed samples.

Invariants:
- Only samples of the manifest are shown, so the report never shows samples that readers do not get.
- One shard is opened at a time, and only if it holds a sample that is shown.

This module reads and writes the store. `page.py` and `sheets.py` make the page and the sheets.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import StoredObject, described
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.reading import shard_samples
from resmaster_stages.dataset.schemas import manifest_schema
from resmaster_stages.inspection.explain import explain_command
from resmaster_stages.inspection.failures import failures
from resmaster_stages.metrics.flags import badness, badness_columns
from resmaster_stages.models.licences import licences_of, uses_base_model
from resmaster_stages.publish.page import ReportSample, choose, render_report
from resmaster_stages.publish.sheets import contact_sheets
from resmaster_stages.redaction import quoted
from resmaster_stages.storage.tables import decode_table, rows_at

SIZE_COLUMNS = ["low_res_width", "low_res_height", "width", "height"]
"""Columns of the manifest that `facts` reads."""
SHOWN_SAMPLES = 200
"""Maximum samples on the page, because larger pages open slowly. Half are the worst, half are spread over the rest."""


def write_report(dataset: Dataset) -> tuple[StoredObject, ...]:
    """Write report/index.html and contact sheets from the manifest. Returns the written files."""
    manifest = dataset.folder.read(layout.MANIFEST)
    table = decode_table(manifest, manifest_schema(), layout.MANIFEST, (*badness_columns(), *SIZE_COLUMNS))
    bad = [badness(row) for batch in table.to_batches(10_000) for row in batch.to_pylist()]
    rows = rows_at(manifest, manifest_schema(), layout.MANIFEST, choose(bad, SHOWN_SAMPLES))
    shown = {row["key"]: row for row in rows}
    samples = sorted(_samples(dataset, shown), key=lambda sample: -badness(sample.quality))
    page = render_report(
        dataset.config.name,
        facts(dataset.config, table),
        samples,
        failures(dataset),
        total=len(bad),
        view_command=f"resmaster view {quoted(dataset.url)}",
    )
    files = [(layout.REPORT_PAGE, page.encode())]
    for number, sheet in enumerate(contact_sheets(samples, title=dataset.config.name)):
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG", optimize=True)
        files.append((layout.contact_sheet(number), buffer.getvalue()))
    for name, data in files:
        dataset.folder.write(name, data)
    return tuple(described(name, data) for name, data in files)


def _samples(dataset: Dataset, rows: dict[str, dict[str, Any]]) -> Iterator[ReportSample]:
    """The samples of some rows of the manifest (key -> row), in the order of their shards."""
    stages = [stage for stage in ("low_res", "captions", "high_res") if stage in dataset.hashes]
    for shard in sorted({row["shard"] for row in rows.values()}):
        with shard_samples(dataset, shard, stages) as samples:
            for sample in samples:
                if sample.key not in rows or sample.low_res is None or sample.high_res is None:
                    continue
                yield ReportSample(
                    key=sample.key,
                    prompt=sample.prompt,
                    low_res=sample.low_res.data,
                    high_res=sample.high_res.data,
                    captions=sample.captions,
                    quality=rows[sample.key],
                    meta={"seed": sample.high_res.meta.get("seed"), "shard": shard},
                    command=explain_command(dataset.url, sample.key),
                )


def facts(config: DatasetConfig, manifest: pa.Table) -> dict[str, Any]:
    """Label -> value, for the header of the page. `manifest`: must have the `SIZE_COLUMNS`."""
    upscale = config.upscale
    found = manifest.select(SIZE_COLUMNS).group_by(SIZE_COLUMNS).aggregate([])
    sizes = sorted(tuple(row[name] for name in SIZE_COLUMNS) for row in found.to_pylist())
    first = f"{sizes[0][0]} x {sizes[0][1]} px to {sizes[0][2]} x {sizes[0][3]} px" if sizes else "none yet"
    return {
        "samples": manifest.num_rows,
        "sizes": first + (f" and {len(sizes) - 1} more" if len(sizes) > 1 else ""),
        "method": upscale.label(),
        **({"model": config.model.id} if uses_base_model(config) else {}),
        **{f"licence of the {each.part}": each.licence.sentence() for each in licences_of(config)},
        **upscale.facts(),
        "seed": config.seed,
    }
