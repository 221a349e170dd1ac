"""The world: deterministic scenes, crops that agree with renders, sentences that the tokenizer knows."""

from random import Random

import numpy as np
import pytest
from PIL import Image

from resmaster_stages.errors import ConfigError
from resmaster_stages.picturebook import captions, scenes, truth
from resmaster_stages.picturebook.training import data

resvg_py = pytest.importorskip("resvg_py")

from resmaster_stages.picturebook.render import render  # noqa: E402


def test_a_seed_gives_the_same_scene_svg_and_pixels() -> None:
    first, second = scenes.make_scene(7), scenes.make_scene(7)
    assert first == second
    assert scenes.svg(first) == scenes.svg(second)
    assert render(first, 64, 64).tobytes() == render(second, 64, 64).tobytes()
    assert first != scenes.make_scene(8)


def test_scenes_keep_the_grammar() -> None:
    for seed in range(300):
        scene = scenes.make_scene(seed)
        assert 1 <= len(scene.things) <= 3
        assert scenes.HEIGHT <= scene.width <= 2 * scenes.HEIGHT
        assert scene.ground in scenes.GROUNDS
        assert scene.sky in scenes.SKIES
        for thing in scene.things:
            kind = scenes.KINDS[thing.kind]
            assert thing.colour in kind.colours
            left, top, right, bottom = scenes.drawing(thing).box
            assert left > -40
            assert right < scene.width + 40
            assert top > -10
            assert bottom <= scenes.HEIGHT


def test_every_kind_draws_every_colour_by_day_and_night() -> None:
    for kind in scenes.KINDS.values():
        for colour in kind.colours:
            for night in (False, True):
                thing = scenes.Thing(kind.name, colour, 256, 400, 200, 1)
                drawing = kind.draw(thing, Random(1), night)
                assert drawing.svg.startswith("<")
                assert all(part.name in captions.PART_WORDS for part in drawing.parts)


def test_the_world_is_rich() -> None:
    assert len(scenes.KINDS) >= 8
    assert len(scenes.COLOURS) >= 8
    assert len(scenes.GROUNDS) >= 5
    assert len(scenes.SKIES) >= 4
    shown = [scenes.make_scene(seed) for seed in range(400)]
    assert {thing.kind for scene in shown for thing in scene.things} == set(scenes.KINDS)
    assert {thing.colour for scene in shown for thing in scene.things} == set(scenes.COLOURS)
    assert {scene.ground for scene in shown} == set(scenes.GROUNDS)
    for scene in shown:
        assert all(scene.ground in scenes.KINDS[thing.kind].grounds for thing in scene.things)


def test_the_subject_of_a_view_is_what_covers_most_of_it() -> None:
    house = scenes.Thing("house", "red", 150, 420, 240, 3)
    tree = scenes.Thing("tree", "green", 400, 420, 150, 4)
    scene = scenes.Scene(1, 512.0, "meadow", "night", 300.0, (house, tree))
    assert captions.subject(scene) == "house"
    assert captions.subject(scene, (350, 280, 450, 380)) == "tree"
    assert captions.subject(scene, (250, 0, 350, 100)) == "night"
    assert captions.subject(scene, (255, 440, 320, 505)) == "meadow"


def test_the_true_scene_of_a_prompt_shows_what_the_prompt_says() -> None:
    for seed in range(200):
        scene = scenes.make_scene(seed)
        prompt = captions.caption(scene)
        drawn = truth.true_scene(prompt, scenes.HEIGHT)
        assert captions.pairs_in(drawn) == captions.pairs_in(scene)
        assert (drawn.ground, drawn.sky) == (scene.ground, scene.sky)
        assert truth.true_scene(prompt, scenes.HEIGHT) == drawn
    assert truth.true_scene(prompt, scenes.HEIGHT, replica=1) != drawn
    image = truth.true_image("a blue boat on the water at sunset", 64, 128)
    assert image.size == (128, 64)
    for height, width in ((128, 64), (64, 256)):
        with pytest.raises(ConfigError, match="square to twice as wide"):
            truth.true_image("a red cat", height, width)


@pytest.mark.parametrize("seed", [1, 5, 9])
def test_crop_of_a_render_is_a_render_of_the_crop(seed: int) -> None:
    scene = scenes.make_scene(seed)
    side = 128
    whole = np.asarray(render(scene, 512, round(512 * scene.width / scenes.HEIGHT)), np.float32)
    box = (160.0, 200.0, 160.0 + side, 200.0 + side)
    crop = np.asarray(render(scene, side, side, box), np.float32)
    difference = np.abs(whole[200 : 200 + side, 160 : 160 + side] - crop)
    assert difference.mean() < 1.0
    assert np.percentile(difference, 99) < 30


def test_fine_detail_is_a_blur_at_128_and_crisp_at_512() -> None:
    """Brick edges enlarged from 128 px are far weaker than those drawn at 512 px."""
    thing = scenes.Thing("house", "red", 256, 400, 220, 3)
    scene = scenes.Scene(1, 512.0, "meadow", "day", 300.0, (thing,))
    wall = (184, 350, 232, 390)
    large = render(scene, 512, 512).convert("L").crop(wall)
    small = render(scene, 128, 128).resize((512, 512), Image.Resampling.BICUBIC).convert("L").crop(wall)

    def edges(image: Image.Image) -> float:
        return float(np.abs(np.diff(np.asarray(image, np.float32), axis=0)).mean())

    assert edges(large) > 1.5 * edges(small)


def test_captions_are_short_and_name_what_is_there() -> None:
    for seed in range(400):
        photo = data.make_photo(seed)
        assert len(photo.caption.split()) <= 50
        assert captions.pairs(photo.caption) == captions.pairs_in(photo.scene, photo.box)
    scene = scenes.make_scene(0)
    assert captions.caption(scene) == captions.caption(scene)
    assert captions.caption(scene, None, Random(1)).split()[0] not in ("close-up", "detail")


def test_pairs_reads_decoded_text_with_spaced_hyphens() -> None:
    assert captions.pairs("a red hot - air balloon and a Blue brick house") == {("balloon", "red"), ("house", "blue")}


def test_photos_keep_the_meaning_of_micro_conditioning() -> None:
    for seed in range(200):
        photo = data.make_photo(seed)
        height, width, top, left, *_target = photo.time_ids
        assert 40 <= min(height, width) <= 1024
        assert top == 0 or left == 0
        assert photo.render_px == (min(height, width) if min(height, width) < 128 else 128)
        a, b, c, d = photo.box
        assert c - a == pytest.approx(d - b)
