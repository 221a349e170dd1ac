"""Plain enlargement by Lanczos interpolation, as image programs do it. Every method is compared with it.

It uses no network and no prompt. The image's own pixels are weighted by Pillow's windowed sinc of three lobes, in 8
bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from PIL import Image

from resmaster_stages.config.method import register
from resmaster_stages.methods.settings import Enlargement

if TYPE_CHECKING:
    import torch

    from resmaster_stages.diffusion.loop import Progress


@register
class Lanczos(Enlargement):
    """Plain interpolation: the same pixels, larger."""

    method: Literal["lanczos"] = "lanczos"

    def enlarge(
        self,
        image: Image.Image,
        height: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress | None = None,
    ) -> Image.Image:
        """`image` at `height` x `width` px, RGB."""
        return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
