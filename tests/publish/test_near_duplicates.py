"""Near-duplicates: every pair of close samples is found, whatever the batches, and groups do not chain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from resmaster_stages.config.dataset import DatasetConfig, QualityConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset.dataset import Dataset, planned_dataset
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.stages import stage_hashes
from resmaster_stages.errors import ShardError
from resmaster_stages.evaluation.compare import published as is_published
from resmaster_stages.inspection.status import status
from resmaster_stages.models.identity import Weights
from resmaster_stages.publish import near_duplicates
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.publish.near_duplicates import HashIndex, opened, unit
from resmaster_stages.publish.publish import publish
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.arrays import decode_arrays, encode_arrays
from tests.fake_stages import FAKES, planned


def key_of(number: int) -> str:
    return f"{number:024x}"


def joined(
    folder: Path,
    hashes: NDArray[np.uint64],
    bits: int = 4,
    features: NDArray[np.float32] | None = None,
    cosine: float | None = None,
    batch: int = 100,
) -> list[int | None]:
    """The original of each sample, as the module finds it in batches."""
    found: list[str | None] = []
    with opened(bits, cosine, folder) as originals:
        for start in range(0, len(hashes), batch):
            part = slice(start, min(start + batch, len(hashes)))
            keys = [key_of(number) for number in range(part.start, part.stop)]
            found += originals.join(keys, hashes[part], None if features is None else features[part])
    return [None if key is None else int(key, 16) for key in found]


def by_hand(close: NDArray[np.bool_]) -> list[int | None]:
    """The same, sample by sample, from the table of all pairs."""
    originals: list[int] = []
    result: list[int | None] = []
    for number in range(len(close)):
        first = next((each for each in originals if close[each, number]), None)
        result.append(first)
        if first is None:
            originals.append(number)
    return result


def pairs(hashes: NDArray[np.uint64], bits: int) -> NDArray[np.bool_]:
    return np.array([[(int(a) ^ int(b)).bit_count() <= bits for b in hashes] for a in hashes])


def crowded(count: int, seed: int) -> NDArray[np.uint64]:
    """Random hashes, most of them a few bits from one of a few: many chains of close hashes."""
    random = np.random.default_rng(seed)
    hashes = random.integers(0, 2**63, 12, dtype=np.uint64)[random.integers(0, 12, count)]
    for _ in range(5):
        changed, places = random.integers(0, 2, count), random.integers(0, 64, count)
        hashes = hashes ^ (changed.astype(np.uint64) << places.astype(np.uint64))
    return hashes


@pytest.mark.parametrize("bits", range(9))
def test_all_pairs_are_found_by_every_batch(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = crowded(300, seed=bits)
    expected = by_hand(pairs(hashes, bits))
    assert 0 < sum(each is not None for each in expected) < 300
    for batch in (1, 7, 300):
        assert joined(tmp_path, hashes, bits, batch=batch) == expected
    monkeypatch.setattr(near_duplicates, "CANDIDATES", 1)
    assert joined(tmp_path, hashes, bits, batch=64) == expected


def test_what_has_no_flag_holds_no_close_pair_and_groups_do_not_chain(tmp_path: Path) -> None:
    hashes = crowded(400, seed=40)
    close, found = pairs(hashes, 4), joined(tmp_path, hashes)
    originals = [number for number, first in enumerate(found) if first is None]
    assert close[np.ix_(originals, originals)].sum() == len(originals)
    for number, first in enumerate(found):
        assert first is None or (first in originals and first < number and close[first, number])


@pytest.mark.parametrize("bits", [0, 1, 4, 8])
def test_as_many_bits_and_no_bit_more(bits: int, tmp_path: Path) -> None:
    """Planted far from each other among random hashes, wherever the bits are."""
    random = np.random.default_rng(bits)
    hashes = random.integers(0, 2**64, 5000, dtype=np.uint64)
    for number in range(50):
        for at, count in ((1000 + number, bits), (2000 + number, bits + 1)):
            places = random.choice(64, count, replace=False)
            hashes[at] = int(hashes[number]) ^ sum(1 << int(place) for place in places)
    found = joined(tmp_path, hashes, bits, batch=1024)
    assert {number: first for number, first in enumerate(found) if first is not None} == {
        1000 + number: number for number in range(50)
    }


def test_the_order_decides_who_is_the_original_and_nothing_else_does(tmp_path: Path) -> None:
    """Of groups that are far apart, the members stay the same in any order."""
    random = np.random.default_rng(7)
    centres = random.integers(0, 2**64, 40, dtype=np.uint64)
    members = [int(centre) ^ (1 << number) for number in range(3) for centre in centres]  # all within 2 bits
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(members))
        found = joined(tmp_path, np.array([members[each] for each in order], np.uint64), bits=4, batch=50)
        assert [None if first is None else order[first] % 40 for first in found] == [
            None if first is None else order[number] % 40 for number, first in enumerate(found)
        ]
        assert sum(first is None for first in found) == 40


def test_nothing_and_one(tmp_path: Path) -> None:
    assert joined(tmp_path, np.zeros(0, np.uint64)) == []
    assert joined(tmp_path, np.zeros(1, np.uint64)) == [None]
    with opened(4, None, tmp_path) as originals:
        assert originals.join([], np.zeros(0, np.uint64), None) == []


def test_many_equal_hashes_are_one_original(tmp_path: Path) -> None:
    assert joined(tmp_path, np.full(20_000, 99, np.uint64), batch=1024) == [None] + [0] * 19_999


def test_the_index_keeps_few_runs(tmp_path: Path) -> None:
    index = HashIndex(4)
    for number in range(200):
        index.add(np.random.default_rng(number).integers(0, 2**64, 10, dtype=np.uint64))
    sizes = [len(run.hashes) for run in index._runs]
    assert sum(sizes) == 2000
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) <= 8


def test_features_are_compared_by_their_cosine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together with the hashes: either makes two samples close."""
    random = np.random.default_rng(3)
    vectors = random.normal(size=(30, 16))[random.integers(0, 30, 300)] + 0.2 * random.normal(size=(300, 16))
    features, hashes = unit(list(vectors.astype(np.float16))), crowded(300, seed=3)
    assert np.linalg.norm(features, axis=1) == pytest.approx(1, abs=1e-6)
    cosines = features.astype(np.float64) @ features.T.astype(np.float64)
    for bits, cosine in ((0, 0.95), (4, 0.97)):
        alike = cosines >= cosine
        np.fill_diagonal(alike, True)
        expected = by_hand(pairs(hashes, bits) | alike)
        alone = by_hand(pairs(hashes, bits))
        assert sum(each is not None for each in expected) > sum(each is not None for each in alone)
        for block, batch in ((8192, 300), (16, 1), (16, 70)):
            monkeypatch.setattr(near_duplicates, "BLOCK", block)
            monkeypatch.setattr(near_duplicates, "PAIRS", block)
            assert joined(tmp_path, hashes, bits, features, cosine, batch) == expected


def test_a_cosine_at_the_limit_is_rounded_alike_in_every_batch(tmp_path: Path) -> None:
    random = np.random.default_rng(11)
    base = random.normal(size=48)
    vectors = unit([base + scale * random.normal(size=48) for scale in np.linspace(0.0, 0.3, 400)])
    hashes = np.arange(400, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    limit = float((vectors[0].astype(np.float64) * vectors[200].astype(np.float64)).sum())
    found = [joined(tmp_path, hashes, 0, vectors, limit, batch) for batch in (1, 33, 400)]
    assert found[0] == found[1] == found[2]
    assert found[0][200] == 0, "at the limit is close"


# ------------------------------------------------------------------------------------------------------ in a dataset


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))


LOOKS: dict[str, tuple[str | None, list[str]]] = {
    "a": ("0000000000000000", []),
    "b": ("ffff000000000000", []),
    "c": ("000000000000000f", ["seam"]),  # 4 bits from a
    "d": ("00000000000000ff", []),  # 4 bits from c, 8 from a
    "e": ("0000000000000000", ["blank"]),
    "f": (None, []),
    "g": ("ffff000000000001", []),
}


def built(folder: Path, features: dict[str, list[float]] | None = None, **values: Any) -> Dataset:
    def quality(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for sample, output in zip(samples, FAKES["quality"](config, samples), strict=True):
            phash, flags = LOOKS[sample.prompt]
            arrays = {}
            if features is not None:
                arrays = {name: np.array(features[sample.prompt], np.float16) for name in ("high_res.r", "low_res.r")}
            yield replace(output, rows=[{**output.rows[0], "phash": phash, "flags": flags}], arrays=arrays)

    dataset = planned(folder, list(LOOKS), folder, **values)
    for shard in range(dataset.plan.shards):
        for stage in dataset.hashes:
            run_stage(dataset, stage, shard, process=quality if stage == "quality" else FAKES[stage])
    return dataset


def rows(folder: Path) -> dict[str, tuple[str | None, list[str]]]:
    """Prompt -> prompt of its original, flags."""
    found = pq.read_table(folder / "demo" / "manifest.parquet").to_pylist()
    prompts = {row["key"]: row["prompt"] for row in found}
    return {row["prompt"]: (prompts.get(row["near_duplicate_of"]), row["flags"]) for row in found}


def test_the_manifest_names_the_original(tmp_path: Path) -> None:
    """Blank images and images without a hash are left out."""
    write_manifest(built(tmp_path))
    assert rows(tmp_path) == {
        "a": (None, []),
        "b": (None, []),
        "c": ("a", ["seam", "near_duplicate"]),
        "d": (None, []),
        "e": (None, ["blank"]),
        "f": (None, []),
        "g": ("b", ["near_duplicate"]),
    }


def test_shards_and_batches_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for number, size in enumerate((1, 2, 7)):
        monkeypatch.setattr(near_duplicates, "BATCH", size)
        folder = tmp_path / str(number)
        folder.mkdir()
        write_manifest(built(folder, samples_per_shard=size))
        found.append(rows(folder))
    assert found[0] == found[1] == found[2]
    assert found[0]["c"] == ("a", ["seam", "near_duplicate"])


CLIP = {"clip": "picturebook", "features": "clip"}
VIEWS = {"a": [1, 0], "b": [0, 1], "c": [0, -1], "d": [3, 0.3], "e": [1, 0], "f": [1, 0], "g": [0.1, 2]}


def test_features_that_a_dataset_keeps_are_compared(tmp_path: Path) -> None:
    write_manifest(built(tmp_path, VIEWS, quality={**CLIP, "near_duplicate_cosine": 0.99}))
    found = rows(tmp_path)
    assert found["d"] == ("a", ["near_duplicate"]), "8 bits from a, and a cosine of 0.995"
    assert found["g"][0] == "b"
    assert {found[name][0] for name in "abef"} == {None}


def test_features_that_are_gone_or_of_another_kind_are_named(tmp_path: Path) -> None:
    dataset = built(tmp_path, VIEWS, quality={**CLIP, "near_duplicate_cosine": 0.99})
    (path, *_) = sorted((tmp_path / "demo" / "quality").glob("*.features.parquet"))
    kept = path.read_bytes()
    path.unlink()
    with pytest.raises(ShardError, match=rf"{path.name} is gone; run: resmaster verify \S+, then: resmaster repair"):
        write_manifest(dataset)
    path.write_bytes(kept[:-20])
    with pytest.raises(ShardError, match=f"{path.name}: not a readable file of arrays"):
        write_manifest(dataset)


def test_other_limits_need_no_stage_but_another_publication(tmp_path: Path) -> None:
    dataset = built(tmp_path)
    publish(dataset)
    assert status(dataset).published.problem == ""
    stricter = dataset.config.model_copy(update={"quality": QualityConfig(near_duplicate_bits=0)})
    other = planned_dataset(stricter)
    assert other.hashes == dataset.hashes
    state = status(other)
    assert (state.complete, state.published.problem) == (True, "stale")
    assert (is_published(dataset), is_published(other)) == (True, False), "a comparison publishes it again"
    assert "made from other commits or settings" in state.publication_line(other.url)
    publish(other)
    assert status(other).published.problem == ""
    assert {first for first, _ in rows(tmp_path).values()} == {None}
    back = planned_dataset(dataset.config)
    publish(back)
    assert status(back).published.problem == ""
    assert rows(tmp_path)["g"][0] == "b"


def test_the_limits_are_in_no_stages_hash() -> None:
    plain = parse_config({"name": "d", "quality": CLIP})
    other = parse_config({"name": "d", "quality": {**CLIP, "near_duplicate_bits": 2, "near_duplicate_cosine": 0.9}})
    assert stage_hashes(plain) == stage_hashes(other)
    assert plain.quality.publication() == {}
    assert other.quality.publication() == {"near_duplicate_bits": 2, "near_duplicate_cosine": 0.9}


@pytest.mark.parametrize(
    "values", [{"near_duplicate_bits": 9}, {"near_duplicate_bits": -1}, {**CLIP, "near_duplicate_cosine": 1.5}]
)
def test_limits_have_limits(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        QualityConfig(**values)


def test_a_cosine_without_features_is_one_line() -> None:
    with pytest.raises(ValidationError, match="near_duplicate_cosine needs features: clip; set that"):
        QualityConfig(near_duplicate_cosine=0.97)


def test_features_of_another_network_are_named() -> None:
    data = encode_arrays(["k"], [{"high_res.u": np.zeros(2, np.float16)}])
    with pytest.raises(ShardError, match=r"f\.parquet: lacks the array high_res\.r"):
        decode_arrays(data, "f.parquet", ("high_res.r",))
    assert decode_arrays(data, "f.parquet", ("high_res.u",)).keys() == {"k"}
