"""Flow `compare`: what `resmaster compare` does, started from a server; its datasets are built like any other."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from rich.console import Console
from rich.table import Table

from resmaster_flows.build import build_dataset
from resmaster_flows.outcome import incomplete, outcome
from resmaster_flows.server_runs import cancel_children
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.dataset import Dataset, create_or_open
from resmaster_stages.evaluation.compare import (
    Compared,
    compare_datasets,
    compare_folder,
    published,
    share_low_res,
    write_comparison,
)
from resmaster_stages.evaluation.drawn import DRAWN, renamed, true_enlargement, with_drawings
from resmaster_stages.evaluation.page import cell, shown
from resmaster_stages.evaluation.reference import check_truth, reference_features, true_features
from resmaster_stages.evaluation.variants import Variant, variants
from resmaster_stages.models.identity import PICTUREBOOK
from resmaster_stages.planning.preview import Preview, preview
from resmaster_stages.prompts import ingest
from resmaster_stages.redaction import without_credentials
from resmaster_stages.storage.arrays import Arrays
from resmaster_stages.storage.filesystem import Folder


@flow(name="compare", flow_run_name="compare {config.name}: {methods}", on_cancellation=[cancel_children])
def compare_methods(
    config: DatasetConfig,
    methods: str,
    scales: str = "4x4",
    reference: str | None = None,
    low_res: Literal["generated", "drawn"] = "generated",
) -> str | State[Any]:
    """Build the same samples by several methods, and measure them together.

    Args:
        config: what to build and where; see the fields' descriptions.
        methods: comma-separated, e.g. `multidiffusion,resmaster+sg,resmaster`.
        scales: height x width in native sizes, comma-separated, e.g. `2x2,4x4`.
        reference: real images for FID and KID: a folder, shards, or `picturebook`; default: the low-res images.
        low_res: `drawn`: picturebook's prompts are drawn at the low-res size, and their true enlargements are known.

    Returns the URL of the page with the tables.
    """

    def build(look: Preview) -> int:
        return 1 if outcome(build_dataset(look.config, return_state=True)).errors else 0

    wanted = argparse.Namespace(methods=methods, scales=scales, reference=reference, low_res=low_res)
    worst = compare(config, wanted, build, Console(stderr=True))
    page = compare_folder(renamed(config) if low_res == DRAWN else config).url_of("compare.md")
    return incomplete(f"some shards are missing; the others are compared in {page}", page) if worst else page


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


def print_tables(found: Compared) -> None:
    """The tables on standard output, one per scale: a line per metric, a column per method, so that terminals hold them."""
    out = Console()
    for scale in found.keys:
        rows = [row for row in found.rows if row["scale"] == scale]
        table = Table(box=None, pad_edge=False)
        table.add_column(f"{scale}, n = {rows[0]['samples']}", no_wrap=True)
        for row in rows:
            table.add_column(row["method"], justify="right", overflow="fold")
        for column in shown(rows):
            table.add_row(column.heading, *(cell(row, column) for row in rows))
        out.print(table)
        out.print()
