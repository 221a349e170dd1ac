"""`resmaster compare`: builds one dataset per method and scale, then measures them together."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from resmaster_stages.compare import (
    Compared,
    Variant,
    check_truth,
    compare_datasets,
    compare_folder,
    finished_samples,
    reference_features,
    share_low_res,
    true_features,
    variants,
)
from resmaster_stages.compare_report import SheetRow, cell, markdown, sheet, shown
from resmaster_stages.config import DatasetConfig
from resmaster_stages.disclosure import without_credentials
from resmaster_stages.lineage import stage_hashes
from resmaster_stages.models.identity import PICTUREBOOK
from resmaster_stages.picturebook.drawn import DRAWN, renamed, true_enlargement, with_drawings
from resmaster_stages.preview import Preview, preview
from resmaster_stages.prompts import ingest
from resmaster_stages.standing import status
from resmaster_stages.storage import layout
from resmaster_stages.storage.arrays import Arrays
from resmaster_stages.storage.dataset import Dataset, create_or_open
from resmaster_stages.storage.filesystem import Folder
from resmaster_stages.storage.tables import COMPARE_SCHEMA, MANIFEST_SCHEMA, decode_table, encode_table

SHEET_SAMPLES = 4
"""Samples on a sheet."""

Build = Callable[[Preview], int]
"""Builds the dataset that a preview describes, and returns the command line's exit status."""


def compare(config: DatasetConfig, args: argparse.Namespace, build: Build, console: Console) -> int:
    """Build what is missing, measure, write the folder `{name}-compare` under the root, and print the table."""
    drawn = args.low_res == DRAWN
    config = renamed(config) if drawn else config
    folder = compare_folder(config)
    wanted = variants(config, args.methods, args.scales)
    if drawn or args.reference == PICTUREBOOK:
        for variant in wanted:
            check_truth(variant.config)
    if drawn:
        wanted = [replace(variant, config=with_drawings(variant.config, folder)) for variant in wanted]
    for variant in wanted:
        preview(variant.config)  # what is wrong with any of them is found before the first one starts
    built: list[tuple[Variant, Dataset]] = []
    worst = 0
    for variant in wanted:
        dataset = create_or_open(variant.config)
        ingest(dataset, variant.config)
        for earlier, other in built:
            if earlier.config.low_res == variant.config.low_res:
                share_low_res(other, dataset)
                break
        look = preview(variant.config)
        if any(look.pending_samples().values()) or not published(dataset):
            console.print(look.headline(), highlight=False, soft_wrap=True)
            worst = max(worst, build(look))
        built.append((variant, dataset))
    reference, truth = _reference(args.reference, folder), true_enlargement if drawn else None
    found = compare_datasets(built, reference, without_credentials(args.reference or ""), truth)
    page = write_comparison(folder, config.name, built, found)
    print_tables(found)
    print(f"comparison: {page}")
    return worst


def _reference(
    url: str | None, folder: Folder
) -> Callable[[Dataset, int, int], tuple[dict[str, Arrays], dict[str, Arrays] | None]] | None:
    """What `--reference` names: picturebook's ground truth at each scale's size, the user's images, or nothing."""
    if url is None:
        return None
    if url == PICTUREBOOK:
        return lambda dataset, height, width: true_features(dataset.config, height, width, folder)
    return lambda dataset, height, width: (reference_features(dataset.config, url, folder), None)


def published(dataset: Dataset) -> bool:
    """Whether the manifest and the report are those of what is committed under the current configuration."""
    if not dataset.folder.exists(layout.REPORT_PAGE) or not dataset.folder.exists(layout.MANIFEST):
        return False
    table = decode_table(dataset.folder.read(layout.MANIFEST), MANIFEST_SCHEMA, layout.MANIFEST)
    own_hash = stage_hashes(dataset.config)["quality"]
    finished = status(dataset).stages[-1].samples_ok
    return len(table) == finished and all(found == own_hash for found in table["quality_hash"].to_pylist())


def write_comparison(folder: Folder, name: str, built: list[tuple[Variant, Dataset]], found: Compared) -> str:
    """Write compare.parquet, compare.md and a sheet per scale. Returns the page's path or URL."""
    sheets: dict[str, str] = {}
    for scale, keys in found.keys.items():
        rows: dict[str, SheetRow] = {}
        chosen = keys[:SHEET_SAMPLES]
        methods = [variant.method for variant, _ in built if variant.scale == scale]
        for variant, dataset in built:
            if variant.scale == scale:
                for sample in finished_samples(dataset, chosen):
                    row = rows.setdefault(sample.key, SheetRow(sample.prompt, sample.low_res, {}))
                    rows[sample.key] = SheetRow(
                        row.prompt, row.low_res, {**row.pictures, variant.method: sample.high_res}
                    )
        buffer = io.BytesIO()
        sheet([rows[key] for key in chosen], methods).save(buffer, "PNG", optimize=True)
        sheets[scale] = f"sheet-{scale}.png"
        folder.write(sheets[scale], buffer.getvalue())
    folder.write("compare.parquet", encode_table(found.rows, COMPARE_SCHEMA))
    folder.write("compare.md", markdown(f"{name}: methods compared", found.rows, sheets).encode())
    return folder.url_of("compare.md")


def print_tables(found: Compared) -> None:
    """The tables on standard output, one per scale: a line per metric, a column per method, so that terminals hold them."""
    out = Console()
    for scale in found.keys:
        rows = [row for row in found.rows if row["scale"] == scale]
        table = Table(box=None, pad_edge=False)
        table.add_column(f"{scale}, n = {rows[0]['samples']}", no_wrap=True)
        for row in rows:
            table.add_column(row["method"], justify="right", overflow="fold")
        for name, heading, form in shown(rows):
            if name != "method":
                table.add_row(heading, *(cell(row, name, form) for row in rows))
        out.print(table)
        out.print()
