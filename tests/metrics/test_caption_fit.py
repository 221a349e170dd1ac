"""Captions against their views: whose caption wins, by how much, and what a batch may not change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from PIL import Image

from resmaster_stages.metrics import caption_fit
from resmaster_stages.metrics.caption_fit import Choice, best_captions, neighbours

MATERIALS = ("leaves", "water", "bricks")


class FakeClip:
    """Sees the share of each material in a crop's colour channels; reads a text as the share of its words."""

    def __init__(self) -> None:
        self.images: list[int] = []
        self.texts: list[list[str]] = []

    def image_embeddings(self, images: Sequence[Image.Image]) -> np.ndarray:
        self.images.append(len(images))
        return np.asarray([image.getpixel((0, 0)) for image in images], np.float32)

    def text_embeddings(self, texts: Sequence[str]) -> np.ndarray:
        self.texts.append(list(texts))
        return np.asarray([[text.split().count(word) for word in MATERIALS] for text in texts], np.float32)


def crop(*shares: int) -> Image.Image:
    """A view with these shares of leaves, water and bricks."""
    return Image.new("RGB", (4, 4), shares)


LEAVES, WATER, NOTHING = crop(100, 0, 0), crop(0, 100, 0), crop(0, 0, 0)


def choices(
    crops: Sequence[Image.Image], captions: Mapping[int, str], cols: int, margin: float = 3.0
) -> dict[int, tuple[int, float]]:
    found = best_captions(FakeClip(), crops, captions, neighbours(len(crops) // cols, cols), margin)
    return {view: (choice.view, round(choice.fit, 3)) for view, choice in found.items()}


def test_neighbours_are_those_above_left_right_and_below_inside_the_grid() -> None:
    assert neighbours(1, 1) == ((),)
    assert neighbours(1, 3) == ((1,), (0, 2), (1,))
    grid = neighbours(3, 4)
    assert grid[0] == (1, 4)
    assert grid[3] == (2, 7), "the next row's first view is no neighbour of the last"
    assert grid[5] == (1, 4, 6, 9)
    assert grid[11] == (7, 10)
    assert all(view in grid[other] for view, around in enumerate(grid) for other in around)


def test_a_foreign_material_gives_way_to_a_neighbours_caption_and_right_ones_stay() -> None:
    found = choices([WATER] * 9, {**dict.fromkeys(range(9), "water"), 4: "leaves"}, cols=3)
    assert found == {**{view: (view, 100.0) for view in range(9)}, 4: (1, 100.0)}
    corner = choices([WATER] * 9, {**dict.fromkeys(range(9), "water"), 8: "leaves"}, cols=3)
    assert corner[8] == (5, 100.0)


def test_what_only_one_view_shows_keeps_its_caption() -> None:
    crops = [WATER, LEAVES, WATER]
    found = choices(crops, {0: "water", 1: "leaves", 2: "water"}, cols=3, margin=0)
    assert {view: chosen for view, (chosen, _) in found.items()} == {0: 0, 1: 1, 2: 2}


def test_the_views_around_decide_where_the_own_crop_does_not() -> None:
    """Half leaves, half water: alone, either caption suits the view; between two views of water, water suits it
    better."""
    crops, captions = [WATER, crop(100, 100, 0), WATER], {0: "water", 1: "leaves", 2: "water"}
    assert choices(crops, captions, cols=3)[1] == (0, pytest.approx((70.711 + 100) / 2, abs=1e-3))
    assert choices([crops[1]], {0: "leaves"}, cols=1) == {0: (0, 70.711)}


def test_the_margin_must_be_exceeded() -> None:
    crops, captions = [LEAVES, LEAVES], {0: "leaves", 1: "leaves water"}
    better = 100 - 100 / 2**0.5
    assert choices(crops, captions, cols=2, margin=better - 0.01)[1] == (0, 100.0)
    assert choices(crops, captions, cols=2, margin=better + 0.01)[1] == (1, 70.711)
    assert choices([LEAVES] * 2, {0: "leaves", 1: "leaves leaves"}, cols=2, margin=0)[1] == (1, 100.0), (
        "a tie is no loss"
    )


def test_of_equal_neighbours_the_first_gives_and_of_unequal_ones_the_best() -> None:
    captions = dict.fromkeys(range(9), "bricks")
    assert choices([WATER] * 9, {**captions, 3: "water", 7: "water"}, cols=3)[4] == (3, 100.0)
    assert choices([WATER] * 9, {**captions, 3: "water leaves", 7: "water"}, cols=3)[4] == (7, 100.0)
    assert choices([WATER] * 9, {**captions, 0: "water"}, cols=3)[4] == (4, 0.0), "a corner's view is no neighbour"


def test_only_views_with_captions_give_and_take() -> None:
    crops = [WATER] * 3
    assert choices(crops, {1: "leaves"}, cols=3) == {1: (1, 0.0)}
    assert choices(crops, {0: "water", 1: "leaves"}, cols=3) == {0: (0, 100.0), 1: (0, 100.0)}
    assert choices(crops, {}, cols=3) == {}


def test_all_are_judged_by_what_was_written_for_them() -> None:
    """Otherwise the right caption of one end would wander to the other."""
    found = choices([WATER] * 4, {0: "water", 1: "leaves", 2: "leaves", 3: "leaves"}, cols=4)
    assert {view: chosen for view, (chosen, _) in found.items()} == {0: 0, 1: 0, 2: 2, 3: 3}


def test_a_crop_or_a_text_without_features_scores_nothing() -> None:
    assert choices([NOTHING, LEAVES], {0: "sky", 1: "leaves"}, cols=2) == {0: (1, 50.0), 1: (1, 50.0)}


def test_crops_and_distinct_texts_are_seen_once_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    crops = [crop(*shares) for shares in np.random.default_rng(0).integers(0, 256, (35, 3)).tolist()]
    captions = {view: MATERIALS[view % 3] + " leaves" * (view % 2) for view in range(35) if view % 5}
    around, clip = neighbours(5, 7), FakeClip()
    found = best_captions(clip, crops, captions, around, 0.0)
    assert clip.images == [32, 3]
    (texts,) = clip.texts
    assert sorted(texts) == sorted(set(captions.values()))
    assert any(choice.view != view for view, choice in found.items())
    monkeypatch.setattr(caption_fit, "BATCH", 4)
    assert best_captions(FakeClip(), crops, captions, around, 0.0) == found
    assert found.keys() == captions.keys()
    assert all(isinstance(choice, Choice) and 0 <= choice.fit <= 100 for choice in found.values())
