"""Counting objects in large images, tile by tile."""

import pytest
from PIL import Image

from resmaster_stages.picturebook.counting import count_objects, tiles, whole_objects


@pytest.mark.parametrize(
    ("sentence", "counted"),
    [
        ("a red house and an orange cat on the grass", {"house": 1, "cat": 1}),
        ("a picture of a red house, a blue house and a tree", {"house": 2}),
        ("close - up of a red house with roof tiles, and part of a green tree, before clouds", {"house": 1}),
        ("close-up of roof tiles of a red house, around it blue sky", {}),
        ("a detail of part of an orange boat", {}),
        ("a yellow hot - air balloon at night", {"balloon": 1}),
    ],
)
def test_only_whole_objects_count(sentence: str, counted: dict[str, int]) -> None:
    assert whole_objects(sentence) == counted


@pytest.mark.parametrize(
    ("size", "native", "levels"),
    [((512, 512), 128, [1, 4, 16]), ((512, 256), 128, [2, 8]), ((128, 128), 128, [1]), ((100, 200), 128, [2])],
)
def test_tiles_are_square_and_down_to_the_native_size(size: tuple[int, int], native: int, levels: list[int]) -> None:
    found = tiles(Image.new("RGB", size), native)
    assert [len(level) for level in found] == levels
    for level in found:
        assert all(0.8 < tile.width / tile.height < 1.25 for tile in level)
        assert all(min(tile.size) < 2 * native for tile in level)


def test_the_most_of_any_level_counts() -> None:
    """Sixteen small red patches are sixteen houses; one large patch is one, though its quarters are all red too."""

    def describe(images):
        return ["a red house" if image.resize((1, 1)).getpixel((0, 0))[0] > 100 else "clouds" for image in images]

    small = Image.new("RGB", (64, 64))
    for x in range(0, 64, 16):
        for y in range(0, 64, 32):
            small.paste("red", (x, y, x + 16, y + 16))
    assert count_objects(small, describe, 16) == {"house": 8}

    def knows_parts(images):
        found = []
        for image in images:
            box = image.getbbox()
            whole = box and box[0] > 0 and box[1] > 0 and box[2] < image.width and box[3] < image.height
            found.append("a red house" if whole else "part of a red house" if box else "clouds")
        return found

    large = Image.new("RGB", (64, 64))
    large.paste("red", (8, 16, 40, 48))
    assert count_objects(large, knows_parts, 16) == {"house": 1}
