"""Arrays per sample: round trip, reproducible bytes, and what is refused."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from resmaster_stages.errors import ShardError
from resmaster_stages.storage.arrays import decode_arrays, encode_arrays


@settings(max_examples=30)
@given(st.data(), st.integers(1, 4), st.sampled_from(["float16", "float32", "float64"]))
def test_what_is_written_is_read(data: st.DataObject, count: int, kind: str) -> None:
    shape = data.draw(hnp.array_shapes(max_dims=3, max_side=4))
    finite = hnp.arrays(kind, shape, elements={"allow_nan": False, "allow_infinity": False})
    samples = [{"a": data.draw(finite), "b.c": np.full((2,), i, np.float16)} for i in range(count)]
    keys = [f"{i:02x}" for i in range(count)]
    encoded = encode_arrays(keys, samples, {"stage_hash": "x"})
    assert encoded == encode_arrays(keys, samples, {"stage_hash": "x"})
    found = decode_arrays(encoded, "n")
    assert list(found) == keys
    for own, sample in zip(found.values(), samples):
        assert own["a"].dtype == kind
        assert np.array_equal(own["a"], sample["a"])
        assert own["b.c"].shape == (2,)


def test_any_parquet_reader_reads_it() -> None:
    encoded = encode_arrays(["aa"], [{"r": np.array([[1, 2], [3, 4]], np.float16)}])
    table = pq.read_table(io.BytesIO(encoded))
    assert table.to_pylist() == [{"key": "aa", "r": [1.0, 2.0, 3.0, 4.0]}]


def test_what_does_not_fit_is_refused() -> None:
    one = {"r": np.zeros(3, np.float16)}
    for other, message in (
        ({}, "has arrays"),
        ({"r": np.zeros(4, np.float16)}, "float16 .4,."),
        ({"r": np.zeros(3, np.float32)}, "float32"),
        ({"r": np.array([0, np.nan, 0], np.float16)}, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_arrays(["a", "b"], [one, other])
    with pytest.raises(ValueError, match="int64"):
        encode_arrays(["a"], [{"r": np.zeros(3, np.int64)}])
    with pytest.raises(ValueError, match="at least one"):
        encode_arrays([], [])


@pytest.mark.parametrize("data", [b"", b"PAR1 nonsense PAR1"])
def test_a_damaged_file_is_named(data: bytes) -> None:
    with pytest.raises(ShardError, match=r"quality/x\.features\.parquet"):
        decode_arrays(data, "quality/x.features.parquet")
