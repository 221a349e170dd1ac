"""Plain enlargement by Lanczos interpolation, as image programs do it. Every method is compared with it.

It uses no network and no prompt. The image's own pixels are weighted by Pillow's windowed sinc of three lobes, in 8
bits, or in floats where the result is not to be rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from PIL import Image

from resmaster_stages.config.method import register
from resmaster_stages.methods.settings import Enlargement

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from resmaster_stages.diffusion.loop import Progress


@register
class Lanczos(Enlargement):
    """Plain interpolation: the same pixels, larger."""

    in_floats: ClassVar[bool] = True
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

    def unrounded(
        self,
        image: Image.Image,
        height: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress | None = None,
    ) -> Tensor:
        """As `enlarge`, before values are rounded to 8 bits: [3, height, width], float32 from 0 to 1."""
        import numpy as np
        import torch

        channels = [each.convert("F") for each in image.convert("RGB").split()]
        large = [np.array(each.resize((width, height), Image.Resampling.LANCZOS)) for each in channels]
        return torch.from_numpy(np.stack(large)).div_(255).clamp_(0, 1)
