"""Rasterises a scene, or any box of it, at any size. It needs `resvg_py` (the extra `train`), imported on first use."""

from __future__ import annotations

import io

from PIL import Image

from resmaster_stages.picturebook import scenes


def render(scene: scenes.Scene, height_px: int, width_px: int, box: scenes.Box | None = None) -> Image.Image:
    """Draw `box` (in scene units, default: the whole scene) as an RGB image of `height_px` x `width_px`.

    A box is drawn by another SVG viewBox, so a crop of a large render equals a render of the crop up to antialiasing.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError(
            "Drawing picturebook scenes needs resvg_py: pip install 'resmaster-pipeline[train]'"
        ) from error
    markup = scenes.svg(scene, box, width_px, height_px)
    data = resvg_py.svg_to_bytes(svg_string=markup, width=width_px, height=height_px, skip_system_fonts=True)
    return Image.open(io.BytesIO(data)).convert("RGB")
