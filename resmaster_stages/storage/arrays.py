"""Reads and writes arrays per sample (feature vectors) as a Parquet file: one row per key, one column per array.

Invariants:
- Equal arrays give equal bytes (with the same pyarrow): no time, host or random name is in a file.
- Within a file, an array has the same type and shape for every sample. The shape is in the column's metadata.
- Only plain numbers are read back, never pickled objects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resmaster_stages.errors import ShardError, first_line
from resmaster_stages.storage.tables import ROW_GROUP_ROWS

Arrays = Mapping[str, NDArray[Any]]
DTYPES = ("float16", "float32", "float64")


def encode_arrays(keys: Sequence[str], samples: Sequence[Arrays], metadata: Mapping[str, str] | None = None) -> bytes:
    """Encode the arrays of each key as a Parquet file (zstd), with the values row-major in one list per sample.

    Raises ValueError unless every sample has the same arrays, each of one type and shape, with finite values.
    """
    if not samples or len(keys) != len(samples):
        raise ValueError(f"arrays of at least one sample expected, one set per key; got {len(samples)} of {len(keys)}")
    for key, sample in zip(keys, samples):
        if sample.keys() != samples[0].keys():
            raise ValueError(f"sample {key} has arrays {sorted(sample)}, the first one {sorted(samples[0])}")
    fields, columns = [pa.field("key", pa.string(), nullable=False)], [pa.array(keys, pa.string())]
    for name, first in samples[0].items():
        kind, shape = first.dtype.name, first.shape
        if kind not in DTYPES:
            raise ValueError(f"array {name!r} is of type {kind}; use one of {', '.join(DTYPES)}")
        for key, sample in zip(keys, samples):
            if sample[name].dtype.name != kind or sample[name].shape != shape:
                found = f"{sample[name].dtype.name} {sample[name].shape}"
                raise ValueError(f"array {name!r} of sample {key} is {found}, that of the first {kind} {shape}")
            if not np.isfinite(sample[name]).all():
                raise ValueError(f"array {name!r} of sample {key} is not finite")
        values = np.stack([sample[name] for sample in samples]).reshape(len(samples), -1)
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        fields.append(pa.field(name, column.type, nullable=False, metadata={"shape": json.dumps(shape)}))
        columns.append(column)
    table = pa.table(columns, schema=pa.schema(fields, metadata={"table": "arrays", **(metadata or {})}))
    sink = BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=ROW_GROUP_ROWS, use_dictionary=["key"])
    return sink.getvalue()


def decode_arrays(source: bytes | Path | IO[bytes], name: str, only: Sequence[str] | None = None) -> dict[str, Arrays]:
    """The inverse of `encode_arrays`: key -> arrays, in order. only: read these arrays alone.

    Raises ShardError, naming `name`, for other files and if one of `only` is missing.
    """
    try:
        file = pq.ParquetFile(BytesIO(source) if isinstance(source, bytes) else source)
        table = file.read(None if only is None else ["key", *only])
        if missing := set(only or ()) - set(table.column_names):
            raise ShardError(f"{name}: lacks the array {min(missing)}; it was written by another version")
        arrays: dict[str, NDArray[Any]] = {}
        for field in table.schema:
            if field.name != "key":
                shape = json.loads((field.metadata or {})[b"shape"])
                flat = table[field.name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
                arrays[field.name] = flat.reshape(len(table), *shape)
        keys = table["key"].to_pylist()
        return {key: {each: values[row] for each, values in arrays.items()} for row, key in enumerate(keys)}
    except (pa.ArrowException, OSError, KeyError, ValueError, AttributeError) as error:
        raise ShardError(f"{name}: not a readable file of arrays ({first_line(error)})") from error
