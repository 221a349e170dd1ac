"""Perceptual hash: 64 bits that stay nearly the same when an image is resized, recompressed or slightly changed."""

from __future__ import annotations

import numpy as np
from PIL import Image

from resmaster_stages.metrics.luminance import WEIGHTS, Array
from resmaster_stages.metrics.metric import Column, Flag, Metric
from resmaster_stages.metrics.resize import resize


def phash(image: Image.Image | Array) -> str:
    """64-bit DCT hash as 16 hex digits, the lowest frequency in the highest bit (Zauner 2010, as in the library
    imagehash).

    The luma is resized to 32 x 32 px. Of its 2-D DCT-II, the 8 x 8 lowest frequencies are each compared with their
    median.
    """
    from scipy.fft import dctn

    small = resize(image, 32, 32, "lanczos") @ WEIGHTS
    low = dctn(small.astype(np.float64), type=2)[:8, :8]
    # 0.5 is an amplitude of 1e-4 grey levels, which are rounding errors of one colour and not information
    low = np.where(np.abs(low) < 0.5, 0.0, low)
    bits = (low > np.median(low)).ravel()
    return f"{int(''.join('1' if bit else '0' for bit in bits), 2):016x}"


def distance(a: str, b: str) -> int:
    """Number of bits (0 to 64) in which two hashes differ."""
    return (int(a, 16) ^ int(b, 16)).bit_count()


METRIC = Metric(
    compute=lambda pair: (phash(pair.high_rgb),),
    columns=(
        Column(
            "phash",
            "perceptual hash, 16 hex digits",
            kind="string",
            # raised at publishing, which knows all samples
            flag=Flag("near_duplicate", "looks nearly the same as an earlier sample of the dataset"),
        ),
    ),
)
