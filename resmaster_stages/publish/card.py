"""Renders the dataset card, which describes a dataset to people who find its folder, from `templates/card.md`.

The header is YAML as the hub of Hugging Face takes it: https://huggingface.co/docs/hub/datasets-cards. It states no
licence and no language, because only the publisher knows them.

Invariant: no text of a sample, no path and no address is in the card. Of a file or folder it has the last name.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import yaml
from markupsafe import Markup

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.image_format import ImageFormat, lossless_format
from resmaster_stages.dataset.commit import StoredObject
from resmaster_stages.dataset.curation import Chosen
from resmaster_stages.dataset.labels import ENHANCED, high_res_source_type
from resmaster_stages.metrics import metric_columns
from resmaster_stages.metrics.flags import known_flags
from resmaster_stages.models.licences import licences_of, uses_base_model
from resmaster_stages.publish.template import fill

if TYPE_CHECKING:
    from resmaster_stages.dataset.plan import Plan

LISTED_TARS = 1_000
"""Up to so many tars, the card names each of them for dataset hubs (40 bytes a tar); else it gives a pattern."""

_SHOWN_NAME = re.compile(r"[\w .,+()-]{1,100}")
"""Names that mean nothing in Markdown."""


@dataclass(frozen=True)
class Publication:
    """The numbers of a published dataset, and its files."""

    samples: int
    """Samples that survived every stage."""
    shards: int
    """Shards committed in every stage."""
    shards_missing: int
    """Planned shards that are not committed in every stage, or that are damaged."""
    failures: dict[str, int]
    """Stage -> samples that failed in it, in published shards."""
    chosen: Chosen = field(default_factory=Chosen)
    """What people chose about these samples."""
    commits: str = field(default="", compare=False)
    """Digest of the published commits."""
    files: tuple[StoredObject, ...] = field(default=(), compare=False)
    """Manifest, index and dataset card."""


@dataclass(frozen=True)
class Contents:
    """What is known of a published dataset when its manifest is written."""

    sizes: Sequence[tuple[int, int]]
    """The (height, width) of the high-res images, in px, sorted."""
    flagged: int
    """Number of samples with a flag."""
    prompted: int
    """Number of samples with a prompt."""
    tars: Mapping[str, Sequence[StoredObject]]
    """Name of a view (high_res, low_res) -> its published tars that hold samples."""
    xmp: bool = False
    """Whether the image files name their digital source type in XMP."""


def dataset_card(config: DatasetConfig, plan: Plan, published: Publication, contents: Contents) -> str:
    """Render README.md: a YAML header for dataset hubs, facts, and code that reads the dataset."""
    return fill(
        "card.md",
        name=config.name,
        header=Markup(_header(config, published, contents)),
        listed=LISTED_TARS,
        facts=_facts(config, plan, published, contents),
        licences=[replace(each, model=without_folders(each.model)) for each in licences_of(config)],
        source_type=high_res_source_type(config),
        provenance=_provenance(config),
        xmp=contents.xmp,
        curated="curated" in contents.tars,
        chosen=published.chosen != Chosen(),
        images=_images(config.image_format),
        further=config.image_format if config.image_format in ("avif", "jxl") else "",
        captions=config.upscale.uses("captions"),
        recaptions=", ".join(f"`{style}`" for style in sorted(config.recaption.styles)),
        features=config.quality.features,
        columns=metric_columns(config.quality),
        flags=known_flags(config.quality).values(),
    )


def _images(image_format: ImageFormat) -> str:
    """The names of images in tars, as the card says them."""
    low = lossless_format(image_format)
    if image_format in ("webp", "png"):
        return "`KEY.webp` or `KEY.png`"
    return f"`KEY.{image_format}`" if low == image_format else f"`KEY.{image_format}` (low-resolution `KEY.{low}`)"


def _header(config: DatasetConfig, published: Publication, contents: Contents) -> str:
    """The YAML header."""
    listed = {view: data_files(view, [tar.name for tar in tars]) for view, tars in contents.tars.items() if tars}
    configs = [
        {
            "config_name": view,
            **({} if number else {"default": True}),
            "data_files": [{"split": "train", "path": list(names)}],
        }
        for number, (view, names) in enumerate(listed.items())
    ]
    generated = high_res_source_type(config) != ENHANCED
    header: dict[str, Any] = {
        "pretty_name": config.name,
        "size_categories": [_size_category(published.samples)],
        "task_categories": [*(["text-to-image"] if contents.prompted else []), "image-to-image"],
        "tags": [*(["synthetic"] if generated else []), "high-resolution", "webdataset"],
        **({"configs": configs} if configs else {}),
    }
    text: str = yaml.safe_dump(header, sort_keys=False)
    return text


def _facts(config: DatasetConfig, plan: Plan, published: Publication, contents: Contents) -> dict[str, Any]:
    """Label -> value, for the table at the top."""
    total_bytes = sum(tar.bytes for tar in contents.tars["high_res"])
    missing = f" ({published.shards_missing:,} still missing)" if published.shards_missing else ""
    rejected = sum(generation.rejected_count for generation in plan.generations)
    repeated = sum(generation.duplicates_count for generation in plan.generations)
    return {
        "Samples": f"{published.samples:,}",
        "Shards": f"{published.shards:,}{missing}",
        "High-resolution images": f"{_size_range(contents.sizes)} px, {spell_bytes(total_bytes)}",
        "Low-resolution images": "the user's own" if config.images else f"generated by `{_model(config)}`",
        "Upscaled by": f"`{config.upscale.method}`, scale {config.upscale.scale:g}{_by_model(config)}",
        "Input": _input(config, plan, published, contents),
        "Failed samples": ", ".join(f"{stage}: {count}" for stage, count in published.failures.items()),
        "Flagged by the quality stage": f"{contents.flagged:,} (kept; see the column `flags`)",
        "Inputs rejected or repeated": f"{rejected:,} rejected, {repeated:,} repeated (listed where the dataset was "
        "made, in `plan/`)",
        **({"Chosen by people": _chosen(published.chosen)} if published.chosen != Chosen() else {}),
        "Base seed": config.seed,
    }


def _input(config: DatasetConfig, plan: Plan, published: Publication, contents: Contents) -> str:
    """What the samples were made from: how much, from a file or folder of which name."""
    count = f"{plan.samples // config.replicas:,}"
    each = f", {config.replicas} images each" if config.replicas > 1 else ""
    if not config.images:
        return f"{count} prompts{_from(config.prompts)}{each}"
    silent = published.samples - contents.prompted
    return (
        f"{count} images{_from(config.images)}{each}; {contents.prompted:,} samples with a text beside the image, "
        f"{silent:,} without"
    )


def _from(place: str | None) -> str:
    """The last name of a file or folder of input, in a few words. Empty if there is none that can be shown."""
    name = last_name(place)
    return f" of `{name}`" if _SHOWN_NAME.fullmatch(name) else ""


def last_name(place: str | None) -> str:
    """The last name in a path or URL; empty if there is none."""
    place = place or ""
    if "://" in place:
        place = re.split("[?#]", place)[0]
    return place.rstrip("/").rpartition("/")[2]


def without_folders(model: str) -> str:
    """A model as others may see it: a hub id, or the last name of a folder or file."""
    return last_name(model) if model.startswith(("/", "~", ".")) or model.count("/") > 1 else model


def _chosen(chosen: Chosen) -> str:
    return f"{chosen.kept:,} kept, {chosen.rejected:,} rejected, {chosen.rated:,} rated"


def _provenance(config: DatasetConfig) -> list[str]:
    """How the images, texts and measures were made: one sentence each."""
    upscale, captions = config.upscale, config.captions
    networks = "".join(f", {part} `{without_folders(model)}`" for part, model, _ in upscale.networks())
    base = f"the base model `{_model(config)}`" if uses_base_model(config) else ""
    made = [
        "Low-resolution images: the publisher's own input. Where it comes from is the publisher's to say."
        if config.images
        else f"Low-resolution images: drawn from prompts by {base}.",
        f"High-resolution images: made from the low-resolution ones by the method `{upscale.method}`"
        + (f" with {base}" if upscale.base_model else " without a diffusion model")
        + f"{networks}.",
    ]
    if upscale.uses("captions"):
        captioner = without_folders(captions.model)
        writer = {
            "model": f"written by the captioner `{captioner}`, which saw the patch",
            "server": f"written by the captioner `{captioner}` on a server, which saw the patch",
            "attention": "words of the prompt, chosen by the attention of the base model",
            "prompt": "the prompt itself",
        }
        made.append(f"Captions of patches: {writer[captions.source]}. No person wrote them.")
    made.append(
        "Measures and flags: computed, as the tables below say. A flag is a hint, not the judgement of a person."
    )
    return made


def data_files(stage: str, names: Sequence[str]) -> Sequence[str]:
    """The files of a stage for a dataset hub: each by name, because a pattern would also match tars of attempts that
    were replaced or interrupted. A pattern for many tars, which would make a header of megabytes."""
    return names if len(names) <= LISTED_TARS else [f"{stage}/*.tar"]


def _size_range(sizes: Sequence[tuple[int, int]]) -> str:
    """The smallest and the largest of sizes (height, width), as width x height."""
    shown = [f"{width}x{height}" for height, width in sizes]
    return "no" if not shown else shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"


def spell_bytes(count: float) -> str:
    """`1234567` -> `1.2 MB`."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _model(config: DatasetConfig) -> str:
    """The model's id, with its revision if one is set."""
    model, revision = without_folders(config.model.id), config.model.revision
    return f"{model}@{revision}" if revision else model


def _by_model(config: DatasetConfig) -> str:
    """The model that upscaled, if the method has one."""
    return f", model `{_model(config)}`" if config.upscale.base_model else ""


def _size_category(samples: int) -> str:
    """The size category of dataset hubs for a number of samples."""
    limits = ["1K", "10K", "100K", "1M", "10M", "100M", "1B"]
    place = bisect_right([1_000 * 10**number for number in range(len(limits))], samples)
    if place == 0:
        return f"n<{limits[0]}"
    return f"{limits[place - 1]}<n<{[*limits, '10B'][place]}"
