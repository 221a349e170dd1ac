"""What the file formats of a dataset's images cost: bytes, seconds of encoding, and what is lost.

    python benchmarks/image_formats.py FOLDER [--edge-px 2048]

FOLDER holds images of any kind that is read. They are scaled so that their longer side has `--edge-px` px (0: as they
are), encoded as a dataset encodes them, and decoded again. Encoders use the cores that they take by themselves.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from resmaster_stages.config.image_format import ImageFormat
from resmaster_stages.storage.images import SUFFIXES, decode_image, encode_image

CASES: tuple[tuple[str, ImageFormat, int], ...] = (
    ("PNG", "png", 100),
    ("WebP 100", "webp", 100),
    ("JPEG XL 100", "jxl", 100),
    ("AVIF 100", "avif", 100),
    ("WebP 95", "webp", 95),
    ("JPEG XL 95", "jxl", 95),
    ("AVIF 95", "avif", 95),
    ("AVIF 90", "avif", 90),
)
"""Format and quality, and how the table calls them."""


def images_of(folder: Path, edge_px: int) -> Iterator[Image.Image]:
    """The images of a folder, scaled."""
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            image = decode_image(path.read_bytes(), path.name)
            scale = edge_px / max(image.size) if edge_px else 1.0
            size = round(image.width * scale), round(image.height * scale)
            yield image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def row(images: Sequence[Image.Image], image_format: ImageFormat, quality: int) -> str:
    """The cells of a row of the table: bytes per pixel, seconds per megapixel, greatest error, mean PSNR."""
    encoded_bytes, seconds, worst, psnr = 0, 0.0, 0, []
    for image in images:
        start = time.perf_counter()
        data = encode_image(image, image_format, quality)
        seconds += time.perf_counter() - start
        encoded_bytes += len(data)
        lost = np.asarray(decode_image(data, "image"), np.float64) - np.asarray(image, np.float64)
        worst = max(worst, int(np.abs(lost).max()))
        psnr.append(10 * np.log10(255**2 / max((lost**2).mean(), 1e-12)))
    pixels = sum(image.width * image.height for image in images)
    loss = f"{np.mean(psnr):.1f} dB" if worst else "none"
    return f"{encoded_bytes / pixels:.3f} | {seconds / pixels * 1e6:.2f} | {worst} | {loss}"


def main(words: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--edge-px", type=int, default=2048)
    args = parser.parse_args(words)
    images = list(images_of(args.folder, args.edge_px))
    if not images:
        parser.error(f"{args.folder}: no images in it")
    print("| format and quality | bytes per px | seconds per megapixel | greatest error of 255 | PSNR |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, image_format, quality in CASES:
        print(f"| {name} | {row(images, image_format, quality)} |", flush=True)


if __name__ == "__main__":
    main()
