"""Comparing methods at several sizes: one dataset per method and scale, with the same prompts, seeds and low-res images.

Each variant is a dataset of its own, `{name}-{method}-{scale}`, so a comparison stops and resumes like any other, and every
variant has its report. Knows nothing about Prefect: who builds the datasets is the caller's business.

Invariants:
- Variants of one low-res size have the same keys, seeds and low-res bytes: the first one's are copied into the others.
- All numbers of a scale are over the same samples: those that survived in every method.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np
import yaml
from PIL import Image

from resmaster_stages.config import LONGEST_NAME, DatasetConfig, parse_config, with_method
from resmaster_stages.errors import ConfigError, PlanError, SampleError, UserError
from resmaster_stages.identity import digest, digest_of_keys, image_key
from resmaster_stages.lineage import stage_hashes
from resmaster_stages.metrics.repeats import Repeats, mentions, repeated_objects, repeats_of, surplus
from resmaster_stages.models.geometry import latent_factor, native_px
from resmaster_stages.models.identity import PICTUREBOOK
from resmaster_stages.preview import check_sizes
from resmaster_stages.prompts import draft_samples
from resmaster_stages.quality import picture_features
from resmaster_stages.reading import fetch, shard_samples
from resmaster_stages.scratch import scratch_folder
from resmaster_stages.set_metrics import VIEWS, compare_sets, read_features, stacked
from resmaster_stages.standing import pending
from resmaster_stages.storage import layout
from resmaster_stages.storage.arrays import Arrays, decode_arrays, encode_arrays
from resmaster_stages.storage.commit import commit, list_commits, new_attempt, read_commit
from resmaster_stages.storage.dataset import Dataset
from resmaster_stages.storage.filesystem import Folder, open_root
from resmaster_stages.storage.images import decode_image, find_images
from resmaster_stages.storage.plan import read_plan
from resmaster_stages.storage.tables import COMPARE_SCHEMA, MANIFEST_SCHEMA, decode_table

SWITCHES = {"sg": "structure", "tip": "image_prompt", "etp": "text_prompt"}
"""ResMaster's parts: structural guidance, tailored image prompts, enhanced text prompts."""

LOW_RES_VIEWS = ("r", "u")
"""What the low-res images can be compared by: a native-size crop of one is the whole image."""

TRUE_PICTURES = 256
"""Pictures drawn as ground truth, at least; every prompt equally often."""

REAL = "(real pictures)"
"""What the row of drawn pictures is called: no method, but what a perfect one would score."""

SURPLUS = "surplus"
"""Beside the features of a drawn picture: how many objects too many are counted in it."""

Features = dict[str, Arrays]
"""Key -> view -> features."""

MEANS = ("clip_score", "agreement_psnr", "agreement_ssim", "detail_energy", "seam", "seam_worst")
"""Columns of the quality table whose means are compared."""


@dataclass(frozen=True)
class Variant:
    """One method at one scale."""

    method: str
    """As it was written, e.g. `resmaster+sg`."""
    scale: str
    """Height x width over the native size, e.g. `2x4`."""
    config: DatasetConfig
    """The dataset that it is."""


# ----------------------------------------------------------------------------------------------------------------------
# which datasets


def variants(config: DatasetConfig, methods: str, scales: str) -> list[Variant]:
    """The datasets that `--methods` and `--scales` (comma-separated) ask for, by scale, then method.

    Raises ConfigError for unknown methods, switches, keys or scales, and for names that would be the same.
    """
    found: list[Variant] = []
    for scale in _listed(scales, "--scales"):
        sized = at_scale(config, scale)
        for method in _listed(methods, "--methods"):
            found.append(Variant(method, scale, _with_method(sized, method, scale)))
    names = [variant.config.name for variant in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--methods {methods}: two of them would be the dataset {min(twice)!r}; leave one out")
    return found


def _listed(text: str, option: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise ConfigError(f"{option}: is empty; give a comma-separated list")
    return items


def at_scale(config: DatasetConfig, scale: str) -> DatasetConfig:
    """`config` for a target of `HxW` native sizes, e.g. `2x4` (twice as high, four times as wide).

    The low-res image has the target's shape, the native area as nearly as the latent grid allows, and one factor enlarges
    both sides. The user's own images keep their size, so both numbers must be equal: it is their factor.
    """
    parts = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", scale)
    if not parts:
        raise ConfigError(f"--scales {scale}: give height x width in native sizes, e.g. 2x2,2x4,4x4")
    rows, cols = int(parts[1]), int(parts[2])
    if config.images:
        if rows != cols:
            raise ConfigError(f"--scales {scale}: your own images keep their shape; give equal numbers, e.g. 2x2,4x4")
        return _changed(config, f"--scales {scale}", {"scale": rows}, {})
    native, factor = native_px(config.model), latent_factor(config.model)
    height, width = low_res_size(rows, cols, native, factor)
    return _changed(config, f"--scales {scale}", {"scale": rows * native / height}, {"height": height, "width": width})


def low_res_size(rows: int, cols: int, native: int, factor: int) -> tuple[int, int]:
    """(height, width) in px in the ratio `rows`:`cols`, multiples of `factor`, whose area is nearest to `native` squared."""
    common = gcd(rows, cols)
    tall, wide = rows // common * factor, cols // common * factor
    nearest = max(1, round(native / (tall * wide) ** 0.5))
    unit = min((nearest - 1 or 1, nearest, nearest + 1), key=lambda n: (abs(n * n * tall * wide - native**2), n))
    return unit * tall, unit * wide


def _with_method(config: DatasetConfig, text: str, scale: str) -> DatasetConfig:
    """`config` with a method such as `multidiffusion`, `resmaster+sg+tip`, `resmaster-etp` or `resmaster:stride=0.75`."""
    head, *settings = text.split(":")
    parts = re.fullmatch(r"([a-z_]+)((?:\+[a-z]+)*|(?:-[a-z]+)*)", head)
    if not parts:
        raise ConfigError(
            f"--methods {text}: write a method, e.g. multidiffusion, resmaster, resmaster+sg, resmaster-etp"
        )
    method, named = parts[1], re.findall(r"[a-z]+", parts[2])
    for name in named:
        if name not in SWITCHES or method != "resmaster":
            raise ConfigError(f"--methods {text}: no switch {name!r} here; resmaster has {', '.join(SWITCHES)}")
    upscale: dict[str, Any] = {"method": method}
    if named:
        keep = parts[2][0] == "+"
        for name, part in SWITCHES.items():
            upscale[part] = {"enabled": (name in named) == keep}
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--methods {text}: write settings as key=value, e.g. resmaster:stride=0.75")
        inner = upscale
        *above, last = path.split(".")
        for name in above:
            inner = inner.setdefault(name, {})
        inner[last] = yaml.safe_load(value)
    label = re.sub(r"[^A-Za-z0-9-]+", "_", text)
    room = LONGEST_NAME - len(f"{config.name}--{scale}")
    if len(label) > room:
        mark = digest(text)[:8]
        label = f"{label[: max(0, room - len(mark) - 1)]}-{mark}"
    own = "picturebook" if config.model.id == PICTUREBOOK else "clip"
    quality = {"features": own} if config.quality.features == "none" else {}
    named_config = config.model_copy(update={"name": f"{config.name}-{label}-{scale}"})
    return _changed(named_config, f"--methods {text}", upscale, {}, quality)


def _changed(
    config: DatasetConfig,
    source: str,
    upscale: Mapping[str, Any],
    low_res: Mapping[str, Any],
    quality: Mapping[str, Any] | None = None,
) -> DatasetConfig:
    values = config.model_dump(mode="json", exclude_unset=True)  # what nobody set is for the method's preset to say
    if "method" in upscale:
        values["upscale"] = with_method(values.get("upscale", {}), upscale["method"])
    for name, change in (("upscale", upscale), ("low_res", low_res), ("quality", quality or {})):
        part = values.setdefault(name, {})
        for key, value in change.items():
            old = part.get(key)
            if isinstance(value, dict) and isinstance(old, dict):
                value = value if "preset" in value else {**old, **value}
            part[key] = value
    return parse_config(values, source)


# ----------------------------------------------------------------------------------------------------------------------
# the same low-res images for all


def share_low_res(source: Dataset, target: Dataset) -> int:
    """Commit `source`'s low-res shards in `target`, where both would compute the same. Returns how many were copied.

    Nothing is copied where the configurations, weights or samples differ, or samples failed: the target then does its own.
    """
    if _low_res_identity(source) != _low_res_identity(target):
        return 0
    theirs, ours = stage_hashes(source.config)["low_res"], stage_hashes(target.config)["low_res"]
    plan = read_plan(target.folder)
    copied = 0
    for shard in pending(target, stages=["low_res"])["low_res"]:
        receipt = read_commit(source.folder, "low_res", theirs, shard)
        keys = [sample.key for sample in plan.read(shard)]
        if receipt is None or receipt.samples_failed or receipt.keys_digest != digest_of_keys(keys):
            continue
        attempt = new_attempt()
        with scratch_folder() as scratch:
            path = fetch(source, receipt, receipt.objects[0], scratch)
            own = replace(
                receipt,
                stage_hash=ours,
                attempt=attempt,
                generation=plan.generation_of(shard).number,
                provenance={**receipt.provenance, "copied_from": f"{source.config.name}/{receipt.objects[0].name}"},
            )
            commit(target.folder, own, [(layout.shard_object("low_res", shard, attempt), path)], None)
        copied += 1
    return copied


def _low_res_identity(dataset: Dataset) -> str:
    """The low-res stage's identity but for the dataset's name."""
    return stage_hashes(dataset.config.model_copy(update={"name": "any"}))["low_res"]


# ----------------------------------------------------------------------------------------------------------------------
# the reference


def reference_features(config: DatasetConfig, url: str, cache: Folder) -> dict[str, Arrays]:
    """Key -> view -> features of the images at `url` (a folder or WebDataset tars), kept in the folder `cache`.

    The cache is named by the images' content, the network and the native size. Raises UserError if there are no images.
    """
    from resmaster_stages.metrics.features import load_extractor

    extractor, native = load_extractor(config.quality), native_px(config.model)
    keys = sorted({image_key(image.data, "") for image in find_images(url)})
    weights = stage_hashes(config.model_copy(update={"name": "any"}))["quality"]
    name = f"reference-{digest([keys, extractor.name, native, weights])[:16]}.features.parquet"
    if cache.exists(name):
        known, arrays = decode_arrays(cache.read(name), cache.url_of(name))
        return {key: {view: values[row] for view, values in arrays.items()} for row, key in enumerate(known)}
    found: dict[str, Arrays] = {}
    for image in find_images(url):
        key = image_key(image.data, "")
        if key not in found:
            try:
                found[key] = picture_features(extractor, decode_image(image.data, image.source), key, native)
            except SampleError as error:
                raise UserError(f"--reference {url}: {error}; remove or mend it") from None
    cache.write(name, encode_arrays(list(found), list(found.values())))
    return found


def check_truth(config: DatasetConfig) -> None:
    """Raise ConfigError where picturebook's ground truth cannot be drawn for a dataset."""
    from resmaster_stages.picturebook.truth import check

    if config.images:
        raise ConfigError("--reference picturebook: your own images have no prompts to draw; give a folder of images")
    height, width = (round(side * config.upscale.scale) for side in check_sizes(config))
    check((sample.prompt for sample in draft_samples(config).samples), height, width)


def true_features(config: DatasetConfig, height: int, width: int, cache: Folder) -> tuple[Features, Features]:
    """Features of picturebook's ground truth for a dataset's prompts at a size in px: (the reference, other drawings).

    The reference has every prompt drawn in as many layouts as make `TRUE_PICTURES`; the other drawings, one per prompt,
    are what a perfect method would score against it. Both are kept in the folder `cache`.
    Raises ConfigError as `check_truth`.
    """
    from resmaster_stages.metrics.features import load_extractor
    from resmaster_stages.picturebook.scenes import KINDS
    from resmaster_stages.picturebook.truth import true_picture

    samples = draft_samples(config).samples
    extractor, native, counter = load_extractor(config.quality), native_px(config.model), _object_counter(config)
    layouts = -(-TRUE_PICTURES // len(samples))
    weights = stage_hashes(config.model_copy(update={"name": "any"}))["quality"]
    prompts = {sample.key: sample.prompt for sample in samples}
    found: list[Features] = []
    for part, replicas in (("reference", range(layouts)), ("real", range(layouts, layouts + 1))):
        named = digest([prompts, height, width, layouts, extractor.name, native, weights])[:16]
        name = f"{part}-{named}.features.parquet"
        if cache.exists(name):
            known, arrays = decode_arrays(cache.read(name), cache.url_of(name))
            found.append({key: {v: values[row] for v, values in arrays.items()} for row, key in enumerate(known)})
            continue
        features: Features = {}
        for replica in replicas:
            for key, prompt in prompts.items():
                picture = true_picture(prompt, height, width, replica)
                own = f"{key}-{replica}"
                features[own] = picture_features(extractor, picture, own, native)
                if part == "real" and counter is not None:
                    extra = surplus(counter(picture), mentions(prompt, KINDS))
                    features[own] = {**features[own], SURPLUS: np.array([extra], np.float16)}
        cache.write(name, encode_arrays(list(features), list(features.values())))
        found.append(features)
    return found[0], found[1]


# ----------------------------------------------------------------------------------------------------------------------
# the table


@dataclass(frozen=True)
class FinishedSample:
    """A sample's prompt and pictures."""

    key: str
    prompt: str
    low_res: Image.Image
    high_res: Image.Image


@dataclass(frozen=True)
class Compared:
    """What a comparison found."""

    rows: list[dict[str, Any]]
    """One per variant, as `tables.COMPARE_SCHEMA`."""
    keys: dict[str, list[str]]
    """Scale -> samples that all its methods have."""


def compare_datasets(
    built: Sequence[tuple[Variant, Dataset]],
    reference: Callable[[Dataset, int, int], tuple[Features, Features | None]] | None = None,
    reference_name: str = "",
    truth: Callable[[str, int, int], Image.Image] | None = None,
) -> Compared:
    """Measure every variant over the samples that all methods of its scale have.

    `reference` gives, for a scale's dataset and its pictures' height and width in px, the features to compare with and
    perhaps those of other real pictures, which get a row of their own; None means each scale's own low-res images.
    `truth` gives, for a prompt and a height and width in px, the one true enlargement of its low-res image, where there is one.
    Raises PlanError if a scale has no sample in common.
    """
    from resmaster_stages.picturebook.counting import LEAST

    rows: list[dict[str, Any]] = []
    common: dict[str, list[str]] = {}
    for scale in dict.fromkeys(variant.scale for variant, _ in built):
        group = [(variant, dataset, _manifest(dataset)) for variant, dataset in built if variant.scale == scale]
        asked = [sample.key for sample in draft_samples(group[0][0].config).samples]
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
            facts = dict.fromkeys(COMPARE_SCHEMA.names)
            known = {name: rows[-1][name] for name in ("scale", "features", "height", "width", "reference")}
            drawn = {"method": REAL, "dataset": "", "samples": len(real), "reference_samples": count}
            sets = stacked(real)
            extra = [int(value[0]) for value in sets.pop(SURPLUS, ())]
            counted = _as_columns(repeats_of(extra, LEAST))
            rows.append({**facts, **known, **drawn, **compare_sets(sets, against, views), **counted})
    return Compared(rows, common)


def _manifest(dataset: Dataset) -> dict[str, dict[str, Any]]:
    table = decode_table(dataset.folder.read(layout.MANIFEST), MANIFEST_SCHEMA, layout.MANIFEST)
    return {row["key"]: row for row in table.to_pylist()}


def _facts(variant: Variant, dataset: Dataset, manifest: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sizes, means of the quality table, UNet cost and seconds per picture."""
    config = dataset.config
    means: dict[str, Any] = {}
    for name in MEANS:
        values = [row[name] for row in manifest if row[name] is not None]
        means[name] = sum(values) / len(values) if values else None
    means["flagged"] = sum(bool(row["flags"]) for row in manifest) / len(manifest)
    cost: dict[str, Any] = {"seconds_captions": None}
    hashes = stage_hashes(config)
    for stage in ("captions", "high_res"):
        if stage in hashes:
            receipts = list_commits(dataset.folder, stage, hashes[stage]).values()
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


def _object_counter(config: DatasetConfig) -> Callable[[Image.Image], Mapping[str, int]] | None:
    """Counts objects as picturebook's captioner sees them, tile by tile; None for other models, whose objects it does not
    know."""
    if config.model.id != PICTUREBOOK:
        return None
    from resmaster_stages.models.captioner import load_captioner
    from resmaster_stages.picturebook.counting import count_objects

    own = {"source": "model", "model": PICTUREBOOK, "revision": None}
    captioner = load_captioner(config.captions.model_copy(update=own), config.model.device)
    assert captioner is not None
    native = native_px(config.model)
    return lambda image: count_objects(image, captioner.caption, native)


def _repeats(dataset: Dataset, keys: Sequence[str]) -> dict[str, float | None]:
    """Repeated objects of a dataset's pictures; None where nothing counts them or no prompt names any."""
    counter = _object_counter(dataset.config)
    if counter is None:
        return {"repeat_rate": None, "repeat_surplus": None}
    from resmaster_stages.picturebook.counting import LEAST
    from resmaster_stages.picturebook.scenes import KINDS

    wanted = ((sample.high_res, mentions(sample.prompt, KINDS)) for sample in finished_samples(dataset, keys))
    return _as_columns(repeated_objects(wanted, counter, LEAST))


def _distance(
    dataset: Dataset, keys: Sequence[str], truth: Callable[[str, int, int], Image.Image] | None
) -> float | None:
    """Mean perceptual distance of a dataset's pictures from the true ones, by the embedded pack's classifier; None without."""
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
    """The samples `keys` of a dataset with both pictures, in the plan's order; one shard is open at a time."""
    plan, left = read_plan(dataset.folder), set(keys)
    for shard in range(plan.shards):
        if left.isdisjoint(sample.key for sample in plan.read(shard)):
            continue
        with shard_samples(dataset, dataset.config, plan, shard, ["low_res", "high_res"]) as samples:
            for place, key in enumerate(samples.keys()):
                if key in left:
                    sample = samples[place]
                    assert sample.low_res is not None
                    assert sample.high_res is not None
                    yield FinishedSample(key, sample.prompt, sample.low_res.open(), sample.high_res.open())


def compare_folder(config: DatasetConfig) -> Folder:
    """Where a comparison's table, page and sheets go: beside its datasets."""
    return open_root(config.root).sub(f"{config.name}-compare")
