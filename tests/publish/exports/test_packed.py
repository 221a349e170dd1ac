"""MDS and LitData: the layouts by readers of our own, and by the libraries where they are installed."""

import io
import itertools
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.publish.exports import chunks
from resmaster_stages.publish.exports.export import export
from resmaster_stages.publish.exports.record import Options
from tests.publish.exports.common import NAMES, built, image_of

UNFIT = "{} is not installed: it would replace packages that this project pins (docs/exporting.md)"


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return built(tmp_path / "out", tmp_path)


def records(data: bytes) -> Iterator[bytes]:
    """The records of a chunk, by its own offsets."""
    (count,) = struct.unpack_from("<I", data)
    offsets = struct.unpack_from(f"<{count + 1}I", data, 4)
    assert offsets[-1] == len(data)
    yield from (data[begin:end] for begin, end in itertools.pairwise(offsets))


def fields(record: bytes, names: list[str]) -> dict[str, bytes]:
    sizes = struct.unpack_from(f"<{len(names)}I", record)
    found, at = {}, 4 * len(names)
    for name, size in zip(names, sizes, strict=True):
        found[name] = record[at : at + size]
        at += size
    assert at == len(record)
    return found


def samples(folder: Path) -> list[dict[str, bytes]]:
    """The samples of an export in either format, as its index says."""
    index = json.loads((folder / "index.json").read_text())
    found: list[dict[str, bytes]] = []
    for entry in index.get("shards", index.get("chunks")):
        if "raw_data" in entry:
            name, count, size = entry["raw_data"]["basename"], entry["samples"], entry["raw_data"]["bytes"]
            names = entry["column_names"]
            assert names == sorted(names)
        else:
            name, count, size = entry["filename"], entry["chunk_size"], entry["chunk_bytes"]
            kind, spec = json.loads(index["config"]["data_spec"])
            assert (kind, spec["type"]) == (1, "builtins.dict")
            names = json.loads(spec["context"])
        data = (folder / name).read_bytes()
        assert len(data) == size
        here = [fields(record, names) for record in records(data)]
        assert len(here) == count
        found += here
    return found


@pytest.mark.parametrize("form", ["mds", "litdata"])
@pytest.mark.parametrize("limit", [chunks.CHUNK_BYTES, 1])
def test_every_sample_lies_where_the_index_says(
    dataset: Dataset, tmp_path: Path, form: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", limit)
    export(dataset, str(tmp_path / "x"), Options(form))
    found = samples(tmp_path / "x")
    assert [sample["prompt"].decode() for sample in found] == NAMES
    assert [sample["image"] for sample in found] == [image_of(dataset, name) for name in NAMES]
    assert [json.loads(sample["facts"])["key"] for sample in found] == [sample["key"].decode() for sample in found]
    packed = [path for path in (tmp_path / "x").iterdir() if path.suffix in (".mds", ".bin")]
    assert len(packed) == (3 if limit > 1 else 4), "shards of the dataset are not mixed"


@pytest.mark.parametrize("sizes", [[1], [40, 60], [40, 61], [200, 1, 99, 1]])
def test_chunks_end_before_they_are_too_large(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 100)
    given = [bytes([number]) * size for number, size in enumerate(sizes)]
    found = list(chunks.chunks(given, b"header"))
    assert [record for chunk in found for record in records(chunk.data)] == given
    assert [chunk.samples for chunk in found] == {(1,): [1], (40, 60): [2], (40, 61): [1, 1]}.get(
        tuple(sizes), [1, 2, 1]
    )


def check(found: list[dict[str, Any]], opened: list[Image.Image]) -> None:
    assert [sample["prompt"] for sample in found] == NAMES
    assert [image.size for image in opened] == [(64, 64), (96, 64), (64, 64), (64, 64)]


def test_streaming_reads_mds(dataset: Dataset, tmp_path: Path) -> None:
    streaming = pytest.importorskip("streaming", reason=UNFIT.format("mosaicml-streaming"))
    export(dataset, str(tmp_path / "x"), Options("mds"))
    read = streaming.StreamingDataset(
        remote=str(tmp_path / "x"), local=str(tmp_path / "local"), batch_size=1, validate_hash="sha256"
    )
    found = list(read)
    check(found, [sample["image"] for sample in found])
    assert [sample["facts"]["prompt"] for sample in found] == NAMES


def test_litdata_reads_litdata(dataset: Dataset, tmp_path: Path) -> None:
    litdata = pytest.importorskip("litdata", reason=UNFIT.format("litdata"))
    export(dataset, str(tmp_path / "x"), Options("litdata"))
    found = list(litdata.StreamingDataset(str(tmp_path / "x")))
    check(found, [Image.open(io.BytesIO(sample["image"])) for sample in found])
    assert [json.loads(sample["facts"])["prompt"] for sample in found] == NAMES
