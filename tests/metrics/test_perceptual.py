"""Perceptual distance: closed forms on extractors that show pixels, and the pack's classifier on images that it
knows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from resmaster_stages.config.dataset import QualityConfig
from resmaster_stages.metrics import features
from resmaster_stages.metrics.crops import crops, tile_boxes
from resmaster_stages.metrics.features import ClassifierFeatures, load_extractor
from resmaster_stages.metrics.perceptual import layer_distances, perceptual_distance

RED, GREEN, BLACK = (200, 0, 0), (0, 90, 0), (0, 0, 0)


class Pixels:
    """Layers: the pixels, and `more` times their means over 2 x 2."""

    input_px = 4

    def __init__(self, more: int = 0) -> None:
        self.more = more

    def layers(self, images: Sequence[Image.Image]) -> list[NDArray[np.float32]]:
        values = np.stack([np.asarray(image, np.float32).transpose(2, 0, 1) for image in images])
        n, c, h, w = values.shape
        means = values.reshape(n, c, h // 2, 2, w // 2, 2).mean(axis=(3, 5))
        return [values, *[means] * self.more]


def halves(left: tuple[int, int, int], right: tuple[int, int, int]) -> Image.Image:
    """8 x 4 px: two squares of 4 px."""
    image = Image.new("RGB", (8, 4), left)
    image.paste(right, (4, 0, 8, 4))
    return image


@pytest.fixture(scope="module")
def classifier() -> ClassifierFeatures:
    found = load_extractor(QualityConfig(features="picturebook", device="cpu"))
    assert isinstance(found, ClassifierFeatures)
    return found


@pytest.fixture(scope="module")
def drawn() -> list[Image.Image]:
    """Three scenes, 256 px: four squares each."""
    pytest.importorskip("resvg_py")
    from resmaster_stages.picturebook import scenes
    from resmaster_stages.picturebook.render import render

    return [render(scenes.make_scene(seed), 256, 256, (0, 0, 512, 512)) for seed in (1, 2, 3)]


@pytest.mark.parametrize(
    ("a", "b", "layers", "expected"),
    [
        ((RED, RED), (RED, RED), 1, 0.0),
        ((RED, RED), (GREEN, GREEN), 1, 2.0),  # unit vectors at a right angle
        ((RED, RED), (GREEN, GREEN), 3, 6.0),  # layers are added
        ((RED, RED), (RED, GREEN), 1, 1.0),  # squares are averaged
        ((RED, RED), ((100, 0, 0), (3, 0, 0)), 1, 0.0),  # channels are scaled to length 1
        ((RED, RED), (BLACK, BLACK), 1, 1.0),  # no channel at all: a vector of length 0
        ((BLACK, BLACK), (BLACK, BLACK), 1, 0.0),
        (((3, 4, 0), RED), ((3, 0, 4), RED), 1, ((4 / 5) ** 2 * 2) / 2),
    ],
)
def test_closed_forms(a: tuple, b: tuple, layers: int, expected: float) -> None:
    extractor = Pixels(layers - 1)
    assert perceptual_distance(halves(*a), halves(*b), extractor) == pytest.approx(expected)
    assert perceptual_distance(halves(*b), halves(*a), extractor) == pytest.approx(expected)


def test_positions_are_averaged_after_the_channels_are_added() -> None:
    maps = np.zeros((1, 2, 1, 4), np.float32)
    maps[0, 0] = 5.0
    other = maps.copy()
    other[0, :, 0, 0] = (0.0, 7.0)  # one of four positions turns by a right angle
    assert layer_distances(maps, other) == pytest.approx([2.0 / 4])


def test_squares_lie_side_by_side_and_cover_a_multiple() -> None:
    boxes = tile_boxes(512, 512, 128)
    assert len(boxes) == 16
    seen = np.zeros((512, 512), int)
    for y0, x0, y1, x1 in boxes:
        seen[y0:y1, x0:x1] += 1
    assert seen.min() == seen.max() == 1
    assert boxes[:2] == [(0, 0, 128, 128), (0, 128, 128, 256)]
    assert tile_boxes(300, 140, 128) == [(0, 0, 128, 128), (128, 0, 256, 128)]
    assert tile_boxes(50, 120, 128) == [(0, 0, 50, 50), (0, 50, 50, 100)]
    with pytest.raises(ValueError, match="positive"):
        tile_boxes(0, 3, 4)


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="one size"):
        perceptual_distance(Image.new("RGB", (8, 4)), Image.new("RGB", (4, 8)), Pixels())


def test_the_classifier_shows_its_stem_and_its_four_stages(
    classifier: ClassifierFeatures, drawn: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [crop for image in drawn for crop in crops(image, tile_boxes(256, 256, 128))]
    found = classifier.layers(images)
    assert [maps.shape[2:] for maps in found] == [(32, 32), (32, 32), (16, 16), (8, 8), (4, 4)]
    assert all(len(maps) == 12 and maps.min() >= 0 for maps in found)
    pooled = classifier.extract(images).features
    assert np.abs(found[-1].mean(axis=(2, 3)) - pooled).max() < 1e-4
    monkeypatch.setattr(features, "BATCH", 5)
    for maps, again in zip(found, classifier.layers(images)):
        assert np.abs(maps - again).max() < 1e-4


def test_equal_images_have_no_distance_and_the_order_does_not_matter(
    classifier: ClassifierFeatures, drawn: list[Image.Image]
) -> None:
    a, b, _ = drawn
    assert perceptual_distance(a, a, classifier) == 0
    assert perceptual_distance(a, b, classifier) == pytest.approx(perceptual_distance(b, a, classifier), rel=1e-9)


def test_the_distance_grows_with_blur(classifier: ClassifierFeatures, drawn: list[Image.Image]) -> None:
    for image in drawn:
        found = [
            perceptual_distance(image.filter(ImageFilter.GaussianBlur(r)), image, classifier) for r in (0.5, 1, 2, 4)
        ]
        assert found == sorted(found)
        assert found[0] > 0
        assert found[-1] > 2 * found[0]


def test_images_of_others_are_farther_than_blurred_ones(
    classifier: ClassifierFeatures, drawn: list[Image.Image]
) -> None:
    """Pairs matter: truths in another order, squares in other places and mirrored images are no match."""
    blurred = [image.filter(ImageFilter.GaussianBlur(1)) for image in drawn]
    own = [perceptual_distance(a, b, classifier) for a, b in zip(blurred, drawn)]
    others = [perceptual_distance(a, b, classifier) for a, b in zip(blurred, [*drawn[1:], drawn[0]])]
    mirrored = [perceptual_distance(a, ImageOps.mirror(a), classifier) for a in drawn]
    assert max(own) < min(others)
    assert max(own) < min(mirrored)


def test_a_image_s_distance_is_the_mean_of_its_squares(
    classifier: ClassifierFeatures, drawn: list[Image.Image]
) -> None:
    a, b, _ = drawn
    boxes = tile_boxes(256, 256, 128)
    parts = [perceptual_distance(x, y, classifier) for x, y in zip(crops(a, boxes), crops(b, boxes))]
    assert perceptual_distance(a, b, classifier) == pytest.approx(np.mean(parts), rel=1e-5)
