"""Compares methods at several sizes: one dataset per method and scale, with the same prompts, seeds and low-res images.

Each variant is a dataset of its own, `{name}-{method}-{scale}`. So a comparison stops and resumes like any build, and
every variant has a report. The caller passes in the function that builds a dataset. This module does not use Prefect.

Invariants:
- Variants of one low-res size have the same keys, seeds and low-res bytes. The low-res shards of the first variant are
  copied into the others.
- All numbers of a scale are over the same samples: those that every method has finished.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import Image

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import new_attempt
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.reading import fetch, shard_samples
from resmaster_stages.dataset.schemas import manifest_schema
from resmaster_stages.dataset.stages import stage_hashes
from resmaster_stages.errors import PlanError
from resmaster_stages.evaluation.chart import chart
from resmaster_stages.evaluation.columns import compare_schema, compared_metrics
from resmaster_stages.evaluation.drawn import DRAWN, renamed, true_enlargement, with_drawings
from resmaster_stages.evaluation.page import SheetRow, markdown, sheet
from resmaster_stages.evaluation.reference import (
    SURPLUS,
    Features,
    check_truth,
    object_counter,
    reference_features,
    true_features,
)
from resmaster_stages.evaluation.set_metrics import VIEWS, compare_sets, read_features, stacked
from resmaster_stages.evaluation.variants import Variant, variants
from resmaster_stages.inspection.status import pending, status
from resmaster_stages.keys import digest_of_keys
from resmaster_stages.metrics.repeats import Repeats, mentions, repeated_objects, repeats_of
from resmaster_stages.models.identity import PICTUREBOOK
from resmaster_stages.planning.checks import HERE, Around, check
from resmaster_stages.planning.drafts import draft_samples
from resmaster_stages.prompts import ingest
from resmaster_stages.redaction import without_credentials
from resmaster_stages.storage.filesystem import Folder, open_root
from resmaster_stages.storage.scratch import scratch_folder
from resmaster_stages.storage.tables import decode_table, encode_table

LOW_RES_VIEWS = ("r", "u")
"""The views that can be compared with low-res images. View `c` cannot, because a native-size crop of a low-res image is
the whole image."""


REAL = "(real images)"
"""Name of the row of drawn images. It is not a method, but shows the score of a perfect one."""


Build = Callable[[DatasetConfig], bool]
"""Builds and publishes the dataset of a configuration that is planned. Returns whether every shard is finished."""


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison."""

    measured: Compared
    page: str
    """Path or URL of compare.md."""
    finished: bool
    """Whether every shard of every dataset is finished. Samples of other shards are left out of the tables."""


def compare(
    config: DatasetConfig,
    methods: str,
    scales: str,
    build: Build,
    *,
    around: Around = HERE,
    reference: str | None = None,
    low_res: Literal["generated", "drawn"] = "generated",
) -> Comparison:
    """Build what is missing, measure, and write the folder `{name}-compare` under the root.

    methods, scales: comma-separated, as `variants` reads them.
    around: what is around the builds.
    reference: real images for FID and KID: a folder, shards or `picturebook`. None: each scale's own low-res images.
    low_res: with `drawn`, picturebook's prompts are drawn by vectors at the low-res size, so that their true
    enlargements are known.
    Raises ConfigError or UserError for an error in any of the datasets, before the first one is built.
    """
    drawn = low_res == DRAWN
    config = renamed(config) if drawn else config
    folder = compare_folder(config)
    wanted = variants(config, methods, scales)
    if drawn or reference == PICTUREBOOK:
        for variant in wanted:
            check_truth(variant.config)
    if drawn:
        wanted = [replace(variant, config=with_drawings(variant.config, folder)) for variant in wanted]
    for variant in wanted:
        check(variant.config, around)  # errors in any of them are found before the first one starts
    built, finished = _built(wanted, build, around)
    measured = compare_datasets(
        built,
        _reference(reference, folder),
        without_credentials(reference or ""),
        true_enlargement if drawn else None,
    )
    return Comparison(measured, write_comparison(folder, config.name, built, measured), finished)


def _built(wanted: Sequence[Variant], build: Build, around: Around) -> tuple[list[tuple[Variant, Dataset]], bool]:
    """Plans and builds the variants' datasets where needed. Returns them, and whether every shard is finished."""
    built: list[tuple[Variant, Dataset]] = []
    finished = True
    # a mistake ends it before the first build
    planned = [(variant, ingest(variant.config, around)) for variant in wanted]
    for variant, dataset in planned:
        for earlier, other in built:
            if earlier.config.low_res == variant.config.low_res:
                share_low_res(other, dataset)
                break
        if any(pending(dataset).values()) or not published(dataset):
            finished &= build(dataset.config)
        built.append((variant, dataset))
    return built, finished


# ----------------------------------------------------------------------------------------------------------------------
# the same low-res images for all


def share_low_res(source: Dataset, target: Dataset) -> int:
    """Commit the low-res shards of `source` in `target` if both would compute the same. Returns how many were copied.

    A shard is not copied if the configurations, weights or samples differ, or if samples failed. The target then
    computes the shard itself.
    """
    if _low_res_identity(source) != _low_res_identity(target):
        return 0
    plan, theirs, ours = target.plan, source.commits("low_res"), target.commits("low_res")
    copied = 0
    for shard in pending(target, stages=["low_res"])["low_res"]:
        receipt = theirs.read(shard)
        keys = [sample.key for sample in plan.read(shard)]
        if receipt is None or receipt.samples_failed or receipt.keys_digest != digest_of_keys(keys):
            continue
        attempt = new_attempt()
        with scratch_folder() as scratch:
            path = fetch(source, receipt.objects[0], scratch)
            own = replace(
                receipt,
                stage_hash=ours.stage_hash,
                attempt=attempt,
                number=1,
                generation=plan.generation_of(shard).number,
                provenance={**receipt.provenance, "copied_from": f"{source.config.name}/{receipt.objects[0].name}"},
            )
            ours.create(own, [(layout.shard_object("low_res", shard, attempt), path)])
        copied += 1
    return copied


def _low_res_identity(dataset: Dataset) -> str:
    """The low-res stage's identity without the dataset's name."""
    return stage_hashes(dataset.config.model_copy(update={"name": "any"}))["low_res"]


# ----------------------------------------------------------------------------------------------------------------------
# the reference


Reference = Callable[[Dataset, int, int], tuple[Features, Features | None]]
"""(a dataset of a scale, height and width of its images in px) -> the features to compare with, and those of other real
images, which get a row of their own, or None."""


def _reference(url: str | None, folder: Folder) -> Reference | None:
    """The reference that `--reference` names: picturebook's ground truth at each scale's size, the user's images, or
    None."""
    if url is None:
        return None
    if url == PICTUREBOOK:
        return lambda dataset, height, width: true_features(dataset.config, height, width, folder)
    return lambda dataset, height, width: (reference_features(dataset.config, url, folder), None)


# ----------------------------------------------------------------------------------------------------------------------
# the table


@dataclass(frozen=True)
class FinishedSample:
    """The prompt and images of a finished sample."""

    key: str
    prompt: str
    low_res: Image.Image
    high_res: Image.Image


@dataclass(frozen=True)
class Compared:
    """The numbers of a comparison."""

    rows: list[dict[str, Any]]
    """The rows of the table, as in `columns.compare_schema`."""
    keys: dict[str, list[str]]
    """Scale -> keys of the samples that all methods of the scale have finished."""


def compare_datasets(
    built: Sequence[tuple[Variant, Dataset]],
    reference: Reference | None = None,
    reference_name: str = "",
    truth: Callable[[str, int, int], Image.Image] | None = None,
) -> Compared:
    """Measure every variant over the samples that all methods of its scale have finished.

    reference: None means each scale's own low-res images.
    truth: gives the one true enlargement of a prompt's low-res image at a height and width in px, if there is one.
    Raises PlanError if the methods of a scale have no sample in common.
    """
    from resmaster_stages.picturebook.counting import LEAST

    rows: list[dict[str, Any]] = []
    common: dict[str, list[str]] = {}
    for scale in dict.fromkeys(variant.scale for variant, _ in built):
        group = [(variant, dataset, _manifest(dataset)) for variant, dataset in built if variant.scale == scale]
        asked = [sample.key for sample in draft_samples(group[0][0].config.keeping(group[0][1].config)).samples]
        keys = [key for key in asked if all(key in manifest for _, _, manifest in group)]
        if not keys:
            raise PlanError(f"scale {scale}: no sample was made by all methods; run: resmaster status on each dataset")
        common[scale] = keys
        real: Features | None = None
        views: Sequence[str] = VIEWS
        if reference is None:
            views, count = LOW_RES_VIEWS, len(keys)
            against = stacked(read_features(group[0][1], "low_res"), keys)
        else:
            first = group[0][2][keys[0]]
            own, real = reference(group[0][1], first["height"], first["width"])
            count, against = len(own), stacked(own)
        for variant, dataset, manifest in group:
            rows.append(
                {
                    **_facts(variant, dataset, [manifest[key] for key in keys]),
                    "reference": reference_name or "low-res images",
                    "reference_samples": count,
                    **compare_sets(stacked(read_features(dataset), keys), against, views),
                    **_repeats(dataset, keys),
                    "perceptual_distance": _distance(dataset, keys, truth),
                }
            )
        if real is not None:
            facts = dict.fromkeys(compare_schema().names)
            known = {name: rows[-1][name] for name in ("scale", "features", "height", "width", "reference")}
            drawn = {"method": REAL, "dataset": "", "samples": len(real), "reference_samples": count}
            sets = stacked(real)
            extra = [int(value[0]) for value in sets.pop(SURPLUS, ())]
            counted = _as_columns(repeats_of(extra, LEAST))
            rows.append({**facts, **known, **drawn, **compare_sets(sets, against, views), **counted})
    return Compared(rows, common)


def _manifest(dataset: Dataset) -> dict[str, dict[str, Any]]:
    table = decode_table(dataset.folder.read(layout.MANIFEST), manifest_schema(), layout.MANIFEST)
    return {row["key"]: row for row in table.to_pylist()}


def _facts(variant: Variant, dataset: Dataset, manifest: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row's sizes, means of the quality table, UNet cost and seconds per image."""
    config = dataset.config
    means: dict[str, Any] = {}
    for column in compared_metrics():
        values = [row[column.name] for row in manifest if row[column.name] is not None]
        means[column.name] = sum(values) / len(values) if values else None
    means["flagged"] = sum(bool(row["flags"]) for row in manifest) / len(manifest)
    cost: dict[str, Any] = {"seconds_captions": None}
    for stage in ("captions", "high_res"):
        if stage in dataset.hashes:
            receipts = dataset.commits(stage).read_all().values()
            samples = sum(receipt.samples_ok + receipt.samples_failed for receipt in receipts)
            cost[f"seconds_{stage}"] = sum(r.seconds for r in receipts) / samples if samples else None
            if stage == "high_res":
                for name in ("calls", "rows", "native_rows"):
                    counted = sum(receipt.provenance["unet"][name] for receipt in receipts)
                    cost[f"unet_{name}"] = counted / samples if samples else None
    return {
        "scale": variant.scale,
        "method": variant.method,
        "dataset": config.name,
        "features": config.quality.features,
        "samples": len(manifest),
        "height": manifest[0]["height"],
        "width": manifest[0]["width"],
        **means,
        **cost,
    }


def _repeats(dataset: Dataset, keys: Sequence[str]) -> dict[str, float | None]:
    """Repeated objects in a dataset's images. None if there is no counter, or if no prompt names an object."""
    counter = object_counter(dataset.config)
    if counter is None:
        return {"repeat_rate": None, "repeat_surplus": None}
    from resmaster_stages.picturebook.counting import LEAST
    from resmaster_stages.picturebook.scenes import KINDS

    wanted = ((sample.high_res, mentions(sample.prompt, KINDS)) for sample in finished_samples(dataset, keys))
    return _as_columns(repeated_objects(wanted, counter, LEAST))


def _distance(
    dataset: Dataset, keys: Sequence[str], truth: Callable[[str, int, int], Image.Image] | None
) -> float | None:
    """Mean perceptual distance of a dataset's images from the true images, by the embedded pack's classifier. None
    without `truth`."""
    if truth is None:
        return None
    from resmaster_stages.metrics.features import load_classifier
    from resmaster_stages.metrics.perceptual import perceptual_distance
    from resmaster_stages.models.identity import pack_folder

    extractor = load_classifier(pack_folder(), dataset.config.quality.device)
    found = [
        perceptual_distance(
            sample.high_res, truth(sample.prompt, sample.high_res.height, sample.high_res.width), extractor
        )
        for sample in finished_samples(dataset, keys)
    ]
    return sum(found) / len(found)


def _as_columns(found: Repeats) -> dict[str, float | None]:
    return {
        "repeat_rate": found.rate if found.images else None,
        "repeat_surplus": found.surplus if found.images else None,
    }


def finished_samples(dataset: Dataset, keys: Collection[str]) -> Iterator[FinishedSample]:
    """Yields the samples `keys` of a dataset with both images, in the plan's order. One shard is open at a time."""
    left = set(keys)
    for shard in range(dataset.plan.shards):
        if left.isdisjoint(sample.key for sample in dataset.plan.read(shard)):
            continue
        with shard_samples(dataset, shard, ["low_res", "high_res"]) as samples:
            for place, key in enumerate(samples.keys()):
                if key in left:
                    sample = samples[place]
                    assert sample.low_res is not None
                    assert sample.high_res is not None
                    yield FinishedSample(key, sample.prompt, sample.low_res.open(), sample.high_res.open())


def compare_folder(config: DatasetConfig) -> Folder:
    """The folder of a comparison's table, page and sheets, beside its datasets."""
    return open_root(config.root).sub(f"{config.name}-compare")


SHEET_SAMPLES = 4
"""Samples on a sheet."""


def published(dataset: Dataset) -> bool:
    """Whether the manifest and the report exist and match the commits and settings of the current configuration."""
    if not dataset.folder.exists(layout.REPORT_PAGE) or not dataset.folder.exists(layout.MANIFEST):
        return False
    table = decode_table(dataset.folder.read(layout.MANIFEST), manifest_schema(), layout.MANIFEST)
    own_hash = dataset.hashes["quality"]
    now = status(dataset)
    if now.published.problem == "stale" or len(table) != now.stages[-1].samples_ok:
        return False
    return all(found == own_hash for found in table["quality_hash"].to_pylist())


def write_comparison(folder: Folder, name: str, built: list[tuple[Variant, Dataset]], found: Compared) -> str:
    """Write compare.parquet, compare.md, and a sheet and a chart per scale. Returns the page's path or URL."""
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
                        row.prompt, row.low_res, {**row.images, variant.method: sample.high_res}
                    )
        buffer = io.BytesIO()
        sheet([rows[key] for key in chosen], methods).save(buffer, "PNG", optimize=True)
        sheets[scale] = f"sheet-{scale}.png"
        folder.write(sheets[scale], buffer.getvalue())
    charts: dict[str, str] = {}
    for scale in found.keys:
        own = [row for row in found.rows if row["scale"] == scale]
        drawn = chart(f"Quality and rows of each method at {scale}, {own[0]['samples']} samples", own)
        if drawn is not None:
            charts[scale] = f"chart-{scale}.svg"
            folder.write(charts[scale], drawn.encode())
    folder.write("compare.parquet", encode_table(found.rows, compare_schema()))
    folder.write("compare.md", markdown(f"{name}: methods compared", found.rows, sheets, charts).encode())
    return folder.url_of("compare.md")
