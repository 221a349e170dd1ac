"""SDXL's conditions of size and crop: in every method that offers a choice of them, the choice matters."""

import pytest

from resmaster_stages.config.method import methods
from resmaster_stages.methods.settings import MicroConditioned
from resmaster_stages.methods.upscale import upscale_image
from tests.methods.common import DIFFUSION_METHODS, adapted, difference, plain, request, schedule, settings, some_image

CHOOSING = [name for name in DIFFUSION_METHODS if issubclass(methods()[name], MicroConditioned)]
WHOLE_CANVAS = ["direct", "scalecrafter", "hidiffusion"]


@pytest.mark.parametrize("method", CHOOSING)
def test_the_choice_changes_the_image(method):
    canvas, native = (
        upscale_image(
            adapted(), some_image(), "a cat", config=settings(method, scale=2, steps=2, micro_conditioning=micro)
        )
        for micro in ("canvas", "native")
    )
    assert difference(canvas, native) > 0


@pytest.mark.parametrize(
    ("small", "scale", "native"), [((96, 40), 1, (96, 40)), ((40, 40), 2, (64, 64)), ((24, 56), 2, (40, 96))]
)
@pytest.mark.parametrize("method", WHOLE_CANVAS)
def test_native_is_an_image_of_the_native_area_in_the_shape_of_the_canvas(method, small, scale, native):
    """64 px are native. Sizes are (width, height), and the six numbers have the height first."""

    def sizes(micro):
        asked = request(plain(), settings(method, scale=scale, micro_conditioning=micro), some_image(*small))
        return asked.config.compose(asked).groups[0].at(schedule(2)[0])[1].sizes.tolist()

    width, height = small[0] * scale, small[1] * scale
    assert sizes("canvas") == [[height, width, 0, 0, height, width]]
    assert sizes("native") == [[native[1], native[0], 0, 0, native[1], native[0]]]
