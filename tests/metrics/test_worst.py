"""The worst places against closed forms, and planted faults in true drawings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from resmaster_stages.diffusion.views import view_grid
from resmaster_stages.metrics.oklab import oklab
from resmaster_stages.metrics.seam import seam_worst
from resmaster_stages.metrics.worst import Worst, worst_places
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.picturebook.render import render
from resmaster_stages.picturebook.scenes import HEIGHT, Scene
from resmaster_stages.picturebook.truth import true_scene

# Nothing with contours of its own, such as the sun, lies behind the first object.
PROMPTS = (
    "a red house and a yellow tree on a sandy beach on a cloudy day",
    "an orange boat on the water on a sunny day",
)
VIEWS = view_grid(Geometry(128, 8), 512, 512, 0.5).pixel_boxes
NO_FAULT = 0.5
"""Of `lost` and `added`: a third of the threshold of their flags."""


def pair(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The scene at 512 and at 128 px."""
    high, low = (np.asarray(render(scene, size, size)).astype(np.float32) for size in (512, 128))
    return high, low


@pytest.fixture(scope="module", params=PROMPTS)
def scene(request: pytest.FixtureRequest) -> Scene:
    return true_scene(request.param, HEIGHT)


# --------------------------------------------------------------------------------------------------------------- Oklab


def test_oklab_of_known_colours() -> None:
    colours = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 0, 255]])
    expected = [[0, 0, 0], [100, 0, 0], [62.80, 22.49, 12.58], [45.20, -3.25, -31.15]]
    assert oklab(colours) == pytest.approx(np.array(expected), abs=0.01)
    assert oklab(np.array([300.0, -5.0, 0.0])) == pytest.approx(oklab(np.array([255, 0, 0])))


# -------------------------------------------------------------------------------------------------------- worst places


def test_equal_images_have_no_worst_place() -> None:
    values = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.float32)
    assert worst_places(values, values) == Worst(0.0, 0.0, 0.0)
    blocks = values.repeat(4, axis=0).repeat(4, axis=1)
    worst = worst_places(blocks, values)
    assert (worst.lost, worst.added, worst.colour) == pytest.approx((0, 0, 0), abs=1e-4)


def test_a_constant_shift_is_its_distance_and_no_contour() -> None:
    low, high = np.full((128, 128, 3), (90.0, 120.0, 200.0)), np.full((512, 512, 3), (110.0, 120.0, 190.0))
    worst = worst_places(high, low)
    assert worst.colour == pytest.approx(np.linalg.norm(oklab(high[0, 0]) - oklab(low[0, 0])), rel=1e-3)
    assert (worst.lost, worst.added) == pytest.approx((0, 0), abs=1e-3)


def test_a_line_of_contour_is_its_step_over_the_window_and_lost_and_added_are_mirror_images() -> None:
    flat, step = np.full((128, 128, 3), 100.0), np.full((128, 128, 3), 100.0)
    step[:, 64:] = 150.0
    # a softened step's slopes sum up to its height; of 16 px of the window across the contour, these are the mean
    height = np.linalg.norm(oklab(step[0, 64]) - oklab(step[0, 0]))
    assert worst_places(flat, step).lost == pytest.approx(height / 16, rel=0.02)
    assert worst_places(flat, step).added == 0
    assert worst_places(step, flat).added == worst_places(flat, step).lost
    large = step.repeat(4, axis=0).repeat(4, axis=1)
    assert worst_places(large, flat.repeat(4, axis=0).repeat(4, axis=1)).added == pytest.approx(height / 16, rel=0.02)


def test_images_of_other_shapes_and_very_small_ones_have_finite_numbers() -> None:
    for high, low in (((8, 8), (2, 2)), ((4, 4), (1, 1)), ((300, 120), (75, 30)), ((96, 700), (48, 350))):
        values = np.random.default_rng(1).integers(0, 256, (*high, 3))
        worst = worst_places(values, np.full((*low, 3), 100.0))
        assert all(np.isfinite([worst.lost, worst.added, worst.colour]))


def test_fine_detail_alone_is_no_fault(scene: Scene) -> None:
    high, low = pair(scene)
    grain = np.random.default_rng(0).normal(0, 12, high.shape)
    bars = np.indices((512, 512)).sum(axis=0) // 2 % 2 * 30.0 - 15
    lanczos = np.asarray(Image.fromarray(low.astype(np.uint8)).resize((512, 512), Image.Resampling.LANCZOS))
    for image in (high, high + grain, high + bars[:, :, None], lanczos.astype(np.float32)):
        worst = worst_places(image.clip(0, 255), low)
        assert max(worst.lost, worst.added) < NO_FAULT
        assert worst.colour < 4
        assert seam_worst(image.clip(0, 255), low, VIEWS) < 1


def test_an_object_that_is_missing_smeared_or_too_many(scene: Scene) -> None:
    _, low = pair(scene)
    thing = scene.things[0]
    without = replace(scene, things=scene.things[1:])
    high_without, low_without = pair(without)
    missing = worst_places(high_without, low)
    assert missing.lost > 2
    assert missing.added < NO_FAULT
    too_many = worst_places(pair(scene)[0], low_without)
    assert too_many.added > 2
    assert too_many.lost < NO_FAULT
    blurred = render(scene, 512, 512).filter(ImageFilter.GaussianBlur(thing.size / 5))
    assert worst_places(blurred, low).lost > 2
    assert worst_places(blurred, low).added < NO_FAULT


def test_a_quarter_in_another_light_is_found_where_the_mean_of_the_image_hides_it(scene: Scene) -> None:
    high, low = pair(scene)
    high[:256, :256] = (high[:256, :256] * 0.75).clip(0, 255)
    assert worst_places(high, low).colour > 7
    assert worst_places(high[::-1, ::-1], low[::-1, ::-1]).colour == pytest.approx(worst_places(high, low).colour)


# -------------------------------------------------------------------------------------------------------- worst border


def planted(box: tuple[int, int, int, int], light: float, ground: float = 100.0) -> np.ndarray:
    values = np.full((512, 512, 3), ground)
    values[box[0] : box[2], box[1] : box[3]] += light
    return values


@pytest.mark.parametrize("light", [12.0, -12.0])
@pytest.mark.parametrize("box", [(128, 192, 256, 320), (64, 448, 128, 512), (0, 0, 128, 128)])
def test_a_rectangle_on_view_borders_is_its_step_in_grey_levels(box: tuple[int, int, int, int], light: float) -> None:
    low = np.full((128, 128, 3), 100.0)
    assert seam_worst(planted(box, light), low, VIEWS) == pytest.approx(12.0)
    one_channel = planted(box, light)
    one_channel[:, :, [0, 2]] = 100.0
    assert seam_worst(one_channel, low, VIEWS) == pytest.approx(12.0)


def test_a_step_beside_the_borders_in_the_low_res_image_or_on_a_small_part_is_no_seam() -> None:
    low = np.full((128, 128, 3), 100.0)
    assert seam_worst(planted((132, 196, 252, 316), 40.0), low, VIEWS) == 0
    real = planted((128, 192, 256, 320), 40.0)
    assert seam_worst(real, real[::4, ::4], VIEWS) == 0
    assert seam_worst(planted((128, 192, 152, 216), 40.0), low, VIEWS) == 0
    texture = np.full((512, 512, 3), 100.0)
    texture[::8] += 40.0  # bricks, some of whose joints lie on borders
    assert seam_worst(texture, low, VIEWS) == 0


def test_images_without_inner_borders_and_odd_sizes() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (132, 77, 3)).astype(np.float32)
    assert seam_worst(noise, noise[::4, ::4], view_grid(Geometry(160, 8), 132, 77, 0.5).pixel_boxes) == 0
    assert seam_worst(noise, noise[:1, :1], view_grid(Geometry(32, 8), 132, 77, 0.5).pixel_boxes) < 60
    assert np.isfinite(seam_worst(noise[:9, :9], noise[:20, :20], view_grid(Geometry(8, 1), 9, 9, 0.5).pixel_boxes))


def test_a_foreign_view_in_a_drawing_and_a_wall_on_a_border(scene: Scene) -> None:
    high, low = pair(scene)
    foreign = high.copy()
    foreign[192:320, 128:256] = high[320:448, 320:448][::-1]
    assert seam_worst(foreign, low, VIEWS) > 6
    wall = high.copy(), low.copy()
    wall[0][:320, 192:256], wall[1][:80, 48:64] = (120, 40, 30), (120, 40, 30)
    assert seam_worst(*wall, VIEWS) < 1
