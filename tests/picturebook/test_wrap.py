"""Images of the embedded model that wrap: textures and panoramas without a seam."""

import numpy as np
import pytest
from PIL import Image

from resmaster_stages import generate, upscale
from resmaster_stages.library.models import PICTUREBOOK_UPSCALE

PROMPT = "a scene with an orange boat on the water on a sunny day"


def border_and_inside(image: Image.Image) -> tuple[float, float]:
    """Grey levels of the mean step from the last column to the first, and of nine tenths of the steps inside."""
    values = np.asarray(image).astype(float)
    steps = np.abs(values - np.roll(values, -1, axis=1)).mean(axis=(0, 2))
    return float(steps[-1]), float(np.percentile(steps[:-1], 90))


@pytest.mark.slow
@pytest.mark.parametrize(("width", "wrap"), [(128, "both"), (256, "horizontal")])
def test_the_border_is_like_any_other_place(width: int, wrap: str) -> None:
    sampling = {"steps": 10, "guidance_scale": 4.0}
    for setting in ("none", wrap):
        (low,) = generate(PROMPT, seed=1, height=128, width=width, wrap=setting, **sampling)
        high = upscale(low, PROMPT, wrap=setting, **{**PICTUREBOOK_UPSCALE, "steps": 10})
        assert high.size == (4 * width, 512)
        border, inside = border_and_inside(high)
        if setting == "none":
            assert border > 2 * inside
        else:
            assert border < inside
