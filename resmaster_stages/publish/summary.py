"""Summarises a build as Markdown: samples, quality, flags, failures, and what to do next. Prefect shows the page.

This module reads the manifest and the ledger, and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.schemas import manifest_schema
from resmaster_stages.inspection.failures import failures
from resmaster_stages.inspection.spending import NOT_COUNTED, Spent, spell_money, spell_time
from resmaster_stages.inspection.status import Status
from resmaster_stages.metrics import shown_columns
from resmaster_stages.metrics.flags import known_flags
from resmaster_stages.publish.links import view_lines
from resmaster_stages.publish.markdown import cell, table
from resmaster_stages.publish.report import SIZE_COLUMNS, facts
from resmaster_stages.redaction import printable, quoted, without_credentials
from resmaster_stages.storage.tables import decode_table

SHOWN_FAILURES = 20
"""Maximum number of failures that the page lists. Further failures are only counted."""


def summary(dataset: Dataset, found: Status) -> str:
    """The page of a dataset whose manifest is written. found: its status."""
    columns = [*(column.name for column in shown_columns()), "flags", *SIZE_COLUMNS]
    manifest = decode_table(dataset.folder.read(layout.MANIFEST), manifest_schema(), layout.MANIFEST, columns)
    url = printable(without_credentials(dataset.url))
    parts = [
        f"# {cell(dataset.config.name)}",
        _table(("", ""), list(facts(dataset.config, manifest).items())),
        "## Stages",
        _stages(found),
        *_failed_shards(found),
        "## Cost",
        _cost(found.spent),
        "## Quality",
        _quality(manifest),
        f"Flagged: {_flags(manifest)}. Flags point at samples to look at; nothing is deleted.",
        *_failures(failures(dataset)),
        "## Where",
        "\n".join(
            f"- {line}"
            for line in (
                f"dataset: `{url}`",
                *view_lines(dataset),
                f"missing or failed: `resmaster repair {quoted(url)}`",
                f"one sample: `resmaster explain {quoted(url)} KEY`",
            )
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _stages(found: Status) -> str:
    """A table of the status of each stage."""
    head = ("stage", "shards committed", "pending", "failed", "samples ok", "samples failed", "compute")
    rows = [
        (s.stage, s.committed, s.pending, s.failed, s.samples_ok, s.samples_failed, f"{s.seconds:.0f} s")
        for s in found.stages
    ]
    return _table(head, rows)


def _cost(spent: Spent) -> str:
    """A table of the device time of each stage, with the money if there is a price, and the total."""
    head = ["stage", "device time", "of it failed attempts", "of it other configurations"]
    rows: list[list[object]] = [[s.stage, *map(spell_time, (s.seconds, s.failed, s.others))] for s in spent.stages]
    if spent.price is not None:
        head.append("cost")
        rows = [[*row, spell_money(s.seconds / 3600 * spent.price)] for row, s in zip(rows, spent.stages, strict=True)]
    return f"{_table(head, rows)}\n\nIn all: {spent.line()}. {NOT_COUNTED}"


def _failed_shards(found: Status) -> list[str]:
    """The section of failed shards, as parts of the page: the last error of each class; empty if no shard failed."""
    head = ("stage", "shards", "error", "reason", "last", "run", "host")
    rows = [
        (
            stage.stage,
            len(error.shards),
            error.error_class,
            last.message,
            last.failed_at,
            last.flow_run_name or "",
            last.host,
        )
        for stage in found.stages
        for error in stage.errors
        for last in [error.last]
    ]
    return ["## Failed shards", _table(head, rows)] if rows else []


def _quality(manifest: pa.Table) -> str:
    """A table with mean, median and worst twentieth of each metric."""
    rows = []
    for column in shown_columns():
        values = manifest[column.name].drop_null().to_numpy()
        values = values[np.isfinite(values)]
        if values.size:
            worst = np.percentile(values, 95 if column.better == "↓" else 5)
            numbers = (column.form.format(float(value)) for value in (values.mean(), np.median(values), worst))
            rows.append((column.heading, *numbers, column.meaning))
    return _table(("measure", "mean", "median", "worst twentieth", "meaning"), rows) if rows else "No sample yet."


def _flags(manifest: pa.Table) -> str:
    """The number of samples with a flag, and the number with each flag."""
    found = pc.value_counts(pc.list_flatten(manifest["flags"])).to_pylist()
    counts = {each["values"]: each["counts"] for each in found}
    flagged = pc.sum(pc.greater(pc.list_value_length(manifest["flags"]), 0)).as_py() or 0
    shown = ", ".join(f"{flag} {counts[flag]}" for flag in known_flags() if flag in counts)
    return f"{flagged} of {len(manifest)}" + (f" ({shown})" if shown else "")


def _failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The section of failures, as parts of the page; empty if there are no failures."""
    if not rows:
        return []
    shown = [(row["key"], row["stage"], row["error_class"], row["message"]) for row in rows[:SHOWN_FAILURES]]
    more = f"\n\n... and {len(rows) - len(shown)} more" if len(rows) > len(shown) else ""
    return [f"## {len(rows)} failed samples", _table(("key", "stage", "error", "reason"), shown) + more]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; cells are escaped."""
    return table(head, [[cell(each) for each in row] for row in rows])
