"""Bytes and formats: folder, tar, Parquet, arrays, images. Knows no dataset."""
