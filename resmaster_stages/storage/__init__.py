"""Bytes and formats: folder, tar, Parquet, arrays, images. These modules do not know the layout of a dataset."""
