"""Makes a stand-in for a large dataset: any number of published samples that share the images of a few.

    python -m tests.gallery.standin FOLDER [--samples 100000] [--side 1024] [--captioned 10000]

Prints the dataset's folder, which `resmaster view` takes. The few samples are built by the pipeline's own functions.
The manifest then gets rows with keys, prompts, metrics and flags of their own, which lead to those images. Two samples
more have failed. The same arguments give the same samples.
"""

from __future__ import annotations

import argparse
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import described
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.publication import read_publication, write_publication
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.schemas import CAPTIONS_SCHEMA, manifest_schema
from resmaster_stages.dataset.stages import Process
from resmaster_stages.errors import ShardError
from resmaster_stages.keys import canonical_json
from resmaster_stages.publish.publish import publish
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.tables import decode_table
from tests.fake_stages import FAKES, planned

IMAGES = 6
SHARD_ROWS = 1000
BATCH_ROWS = 50_000
ADJECTIVES = ["small", "red", "old", "misty", "quiet", "bright", "broken", "wooden", "frozen", "golden"]
THINGS = ["house", "tree", "boat", "bridge", "garden", "tower", "market", "river", "hill", "lake", "horse", "kitchen"]
PLACES = ["by the sea", "at night", "in the rain", "under a clear sky", "in a crowded street", "on a hill"]
HOSTILE = "<img src=x onerror=alert(1)> \" ' & \u202egnp </script>"
"""The prompt of the sample with index 3."""


def drawn(key: str, side: int) -> bytes:
    """An image of `side` px in which places can be told apart."""
    line = (np.arange(side) * 256 // side).astype(np.float32)
    y, x = line[:, None], line[None, :]
    first = bytes.fromhex(key)[0]
    pixels = np.empty((side, side, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = (x + first) % 256, y
    pixels[..., 2] = (np.hypot(y - 128, x - 128) // 8 % 2 * 80 + first) % 256
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def low(side: int) -> int:
    """The side in px of the low-res images: a quarter, as far as the model of the configuration goes."""
    return min(side // 4, 1024)


def stages(side: int) -> dict[str, Process]:
    """The stand-in stages with images of `side` px."""

    def images(stage: str, px: int) -> Process:
        def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
            for output, sample in zip(FAKES[stage](config, samples), samples):
                meta = {"key": sample.key, "size": px, "seed": 7, "model": "stand-in"}
                files = {"webp": drawn(sample.key, px), "json": canonical_json(meta).encode()}
                yield output if output.error else replace(output, files={**files, "txt": sample.prompt.encode()})

        return process

    def captions(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        yield from (Output(sample.key, rows=captions_of(sample.key, sample.prompt, side)) for sample in samples)

    return {
        "low_res": images("low_res", low(side)),
        "captions": captions,
        "high_res": images("high_res", side),
        "quality": FAKES["quality"],
    }


def captions_of(key: str, prompt: str, side: int) -> list[dict[str, Any]]:
    """Captions of four patches."""
    facts = {"grid": f"{side}x{side}/{side // 2}/{side // 2}", "n_tokens": 5, "truncated": False, "status": "ok"}
    half = side // 2
    return [
        {
            **facts,
            "row": row,
            "col": col,
            **{"y0": half * row, "x0": half * col, "y1": half * row + half, "x1": half * col + half},
            "caption": f"corner {row}{col} of {prompt} {key[:4]}",
            "fit": 1.5,
        }
        for row in (0, 1)
        for col in (0, 1)
    ]


def built(root: Path | str, folder: Path, side: int = 64) -> Dataset:
    """A published dataset with a few samples, and two that failed. folder: for its file of prompts."""
    prompts = [f"a {ADJECTIVES[number]} {THINGS[number]}" for number in range(IMAGES)]
    prompts += ["bad low_res", "bad high_res"]
    dataset = planned(root, prompts, folder, samples_per_shard=4, low_res={"height": low(side), "width": low(side)})
    for shard in range(dataset.plan.shards):
        for stage, process in stages(side).items():
            run_stage(dataset, stage, shard, process=process)
    publish(dataset)
    return dataset


def standin(root: Path | str, folder: Path, samples: int, side: int = 64, captioned: int = 0) -> Dataset:
    """A dataset with `samples` published samples. The first `captioned` (in thousands) have captions of their own."""
    dataset = built(root, folder, side)
    if not dataset.folder.local:
        raise ShardError("a stand-in is made on this machine's disk")
    manifest = Path(dataset.folder.full(layout.MANIFEST))
    first = decode_table(manifest, manifest_schema(), layout.MANIFEST)
    with pq.ParquetWriter(manifest, manifest_schema(), compression="zstd") as file:
        for start in range(0, samples, BATCH_ROWS):
            count = min(BATCH_ROWS, samples - start)
            file.write_table(_rows(first, start, count, captioned))
    for shard in range(captioned // SHARD_ROWS):
        _write_captions(dataset, manifest, shard, side)
    record = read_publication(dataset.folder)
    assert record is not None
    files = [file for file in record.files if file.name != layout.MANIFEST]
    files.append(described(layout.MANIFEST, manifest.read_bytes()))
    write_publication(dataset.folder, replace(record, files=tuple(files)))
    return dataset


def key_of(index: int) -> str:
    """The key of a sample of a stand-in."""
    return f"{zlib.crc32(str(index).encode()):08x}{index:016x}"


def prompt_of(index: int) -> str:
    """The prompt of a sample of a stand-in."""
    if index == 3:
        return HOSTILE
    words = ADJECTIVES[index % 10], THINGS[index // 10 % 12], PLACES[index // 120 % 6]
    return f"a {words[0]} {words[1]} {words[2]}, number {index}"


def _rows(first: pa.Table, start: int, count: int, captioned: int) -> pa.Table:
    """`count` rows of the manifest that lead to the images of the rows `first`."""
    chance = np.random.default_rng(start)
    numbers = np.arange(start, start + count)
    table = first.take(pa.array(numbers % len(first)))
    worst = chance.random(count)
    agreement = chance.normal(26, 4, count)
    flags = [
        [name for name, raised in (("blank", low < 0.002), ("seam", low > 0.97), ("structure", psnr < 18)) if raised]
        for low, psnr in zip(worst, agreement)
    ]
    values = {
        "key": pa.array(map(key_of, numbers.tolist())),
        "index": pa.array(numbers),
        "shard": pa.array((numbers // SHARD_ROWS).astype(np.int32)),
        "prompt": pa.array(map(prompt_of, numbers.tolist())),
        "agreement_psnr": pa.array(agreement, mask=numbers % 97 == 0),
        "seam": pa.array(chance.gamma(2, 1, count)),
        "seam_worst": pa.array(worst * 3),
        "lost_worst": pa.array(chance.random(count)),
        "colour_worst": pa.array(chance.gamma(2, 2, count)),
        "clipped": pa.array(chance.random(count) / 10),
        "flags": pa.array(flags, pa.list_(pa.string())),
        "captions_object": pa.array(
            [_captions_name(number // SHARD_ROWS) if number < captioned else None for number in numbers.tolist()]
        ),
    }
    for name, column in values.items():
        field = table.schema.field(name)
        table = table.set_column(table.column_names.index(name), field, column.cast(field.type))
    return table


def _captions_name(shard: int) -> str:
    return layout.shard_object("captions", shard, f"{0xCA000000 + shard:08x}")


def _write_captions(dataset: Dataset, manifest: Path, shard: int, side: int) -> None:
    numbers = range(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS)
    rows = [
        {"key": key_of(number), **row}
        for number in numbers
        for row in captions_of(key_of(number), prompt_of(number), side)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=CAPTIONS_SCHEMA), dataset.folder.full(_captions_name(shard)))


def main() -> None:
    """Make a stand-in and print its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=1024, help="px of the high-res images")
    parser.add_argument("--captioned", type=int, default=10_000)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    print(standin(args.folder / "out", args.folder, args.samples, args.side, args.captioned).url)


if __name__ == "__main__":
    main()
