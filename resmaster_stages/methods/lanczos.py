"""Plain enlargement by Lanczos interpolation: what every image program does, and what every method is compared with.

No network and no prompt: the picture's own pixels, weighted by Pillow's windowed sinc of three lobes, in 8 bits.
"""

from __future__ import annotations

from PIL import Image


def enlarge(image: Image.Image, height: int, width: int) -> Image.Image:
    """`image` at `height` x `width` px, RGB."""
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
