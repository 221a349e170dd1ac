from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resmaster_stages.config.dataset import QualityConfig
from resmaster_stages.dataset.schemas import CAPTIONS_SCHEMA, REJECTED_SCHEMA, quality_schema
from resmaster_stages.errors import ShardError
from resmaster_stages.storage import tables
from resmaster_stages.storage.tables import TableWriter, decode_table, encode_table, rows_at

SCHEMA = quality_schema(QualityConfig())
"""The columns that every dataset has."""

ROW = {
    "key": "k",
    "width": 4,
    "height": 4,
    "clip_score": None,
    "agreement_psnr": 1.0,
    "agreement_ssim": 1.0,
    "detail_energy": 1.0,
    "seam": 1.0,
    "seam_worst": 0.0,
    "lost_worst": 0.2,
    "added_worst": 0.2,
    "colour_worst": 2.0,
    "clipped": 0.0,
    "phash": "0" * 16,
    "luminance_mean": 1.0,
    "luminance_std": 1.0,
    "flags": ["seam"],
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=30)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "key": TEXT,
                "grid": TEXT,
                **{name: st.integers(-(2**15), 2**15 - 1) for name in ("row", "col", "n_tokens")},
                **{name: st.integers(-(2**31), 2**31 - 1) for name in ("y0", "x0", "y1", "x1")},
                "caption": TEXT,
                "truncated": st.booleans(),
                "model": st.none() | TEXT,
                "revision": st.none() | TEXT,
                "status": TEXT,
                "prompt_hash": st.none() | TEXT,
                "fit": st.none() | st.floats(0, 100),
            }
        ),
        max_size=4,
    )
)
def test_round_trip(rows: list[dict]) -> None:
    data = encode_table(rows, CAPTIONS_SCHEMA, {"stage_hash": "0"})
    assert data == encode_table(rows, CAPTIONS_SCHEMA, {"stage_hash": "0"})
    assert decode_table(data, CAPTIONS_SCHEMA, "x").to_pylist() == rows


def test_plain_pyarrow_reads_it(tmp_path) -> None:
    (tmp_path / "t.parquet").write_bytes(encode_table([ROW], SCHEMA))
    table = pq.read_table(tmp_path / "t.parquet")
    assert table.to_pylist() == [ROW]
    assert table.schema.metadata[b"schema_version"] == b"1"
    assert pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(0).column(0).compression == "ZSTD"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latency": 3}, "unknown columns"),
        ({"width": None}, "'width' is missing"),
        ({"width": "wide"}, "quality"),
        ({"width": 2**40}, "quality"),
    ],
)
def test_rows_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_table([{**ROW, **change}], SCHEMA)
    without = {name: value for name, value in ROW.items() if name != "key"}
    with pytest.raises(ValueError, match="'key' is missing"):
        encode_table([without], SCHEMA)


def test_schemas_only_grow() -> None:
    grown = SCHEMA.append(pa.field("new", pa.float64()))
    old, new = encode_table([ROW], SCHEMA), encode_table([{**ROW, "new": 1.0}], grown)
    assert decode_table(old, grown, "x").to_pylist() == [{**ROW, "new": None}]
    assert decode_table(new, SCHEMA, "x").to_pylist() == [ROW]
    must = SCHEMA.append(pa.field("must", pa.float64(), nullable=False))
    with pytest.raises(ShardError, match="x: has no column 'must'"):
        decode_table(old, must, "x")


@pytest.mark.parametrize("data", [b"", b"PAR1", b"hello" * 100])
def test_damaged_files_are_named(data: bytes) -> None:
    with pytest.raises(ShardError, match=r"t\.parquet: not a readable Parquet file"):
        decode_table(data, SCHEMA, "t.parquet")


@pytest.mark.parametrize("sizes", [[], [0], [3], [2, 3, 4], [1] * 9, [10, 0, 1]])
def test_a_table_written_in_pieces_is_the_table_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    monkeypatch.setattr(tables, "ROW_GROUP_ROWS", 4)
    monkeypatch.setattr(tables, "PACKED_ROWS", 3)
    rows = [{"source": f"{number}", "text": "t", "reason": "r"} for number in range(sum(sizes))]
    path = tmp_path / "t.parquet"
    left = list(rows)
    with TableWriter(path, REJECTED_SCHEMA) as writer:
        for size in sizes:
            writer.write(left[:size])
            del left[:size]
            assert len(writer._rows) < 3, "rows do not stay Python objects"
            assert sum(map(len, writer._pending)) < 4, "full row groups go to disk"
    assert writer.rows == len(rows)
    assert decode_table(path, REJECTED_SCHEMA, "t").to_pylist() == rows
    groups = [pq.ParquetFile(path).metadata.row_group(i).num_rows for i in range(pq.ParquetFile(path).num_row_groups)]
    assert all(size == 4 for size in groups[:-1])
    positions = [number for number in range(len(rows)) if number % 3 == 0]
    assert rows_at(path, REJECTED_SCHEMA, "t", positions) == [rows[position] for position in positions]
    assert decode_table(path, REJECTED_SCHEMA, "t", ["text"]).column_names == ["text"]


def test_a_row_that_does_not_fit_ends_the_writing(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="unknown columns"),
        TableWriter(tmp_path / "t.parquet", REJECTED_SCHEMA) as writer,
    ):
        writer.write([{"colour": 1}])
    with pytest.raises(ShardError, match="t: not a readable Parquet file"):
        rows_at(b"PAR1", REJECTED_SCHEMA, "t", [0])


def test_rows_are_found_across_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROW_GROUP_ROWS", 2)
    data = encode_table([{**ROW, "width": number} for number in range(5)], SCHEMA)
    for positions in ([0, 2, 4], [1, 2], [3], [4], []):
        assert [row["width"] for row in rows_at(data, SCHEMA, "t", positions)] == positions
