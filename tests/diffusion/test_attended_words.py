"""Words per view from the base model's attention: which words, where, and that a prediction stays as it was."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scipy import ndimage

from resmaster_stages.diffusion.attended_words import (
    Word,
    attention_maps,
    covered,
    layers,
    mask_of,
    texts_of,
    words_of,
)
from resmaster_stages.diffusion.cost import counting
from resmaster_stages.diffusion.views import native_size, view_grid
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from tests.methods.common import adapted, forwards, plain, sdxl_shaped, some_image
from tests.tiny_models import make_stable_diffusion
from tests.tiny_pixart import make_pixart

PICTUREBOOK_TOKENS = 77


@pytest.fixture(scope="module")
def picturebook():
    """CLIP's own tokenizer, whose words have several pieces, and a UNet with two levels of attention."""
    from resmaster_stages.config.model import ModelConfig

    return load_models(ModelConfig())


def found(models: Models, prompt: str) -> list[tuple[str, list[str]]]:
    """Each word, with the tokens at its states."""
    tokenizer = models.base.tokenizers[0]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)
    return [
        (word.text, [tokens[state].removesuffix("</w>") for state in word.states])
        for word in words_of(prompt, models.base.count, models.base.tokens)
    ]


# ------------------------------------------------------------------------------------------------------- words


def test_a_word_has_the_states_of_its_pieces(picturebook):
    prompt = "a zeppelin over Xylophonia"
    words = found(picturebook, prompt)
    assert [text for text, _ in words] == prompt.split()
    assert ["".join(pieces) for _, pieces in words] == prompt.lower().split()
    assert max(len(pieces) for _, pieces in words) > 2, "else nothing is tried here"


def test_punctuation_goes_with_its_word_and_has_no_state_of_its_own(picturebook):
    words = found(picturebook, 'a "red" house, close - up (night): don\'t!')
    assert [text for text, _ in words] == ["a", '"red"', "house,", "close -", "up", "(night):", "don't!"]
    assert ["".join(pieces) for _, pieces in words] == ["a", "red", "house", "close", "up", "night", "don't"]
    assert [text for text, _ in found(picturebook, "- a , b")] == ["- a ,", "b"]
    assert [text for text, _ in found(picturebook, " ... !? ")] == ["... !?"]


def test_words_that_the_text_encoders_do_not_read_are_left_out(picturebook):
    prompt = " ".join(f"{colour} house" for colour in ["red", "blue"] * 40)
    words = words_of(prompt, picturebook.base.count, PICTUREBOOK_TOKENS)
    assert [word.text for word in words] == prompt.split()[: PICTUREBOOK_TOKENS - 2]
    assert words[-1].states == range(75, 76), "the last place before the end mark"
    long = "zeppelin " * 74 + "xylophonia"
    assert words_of(long, picturebook.base.count, PICTUREBOOK_TOKENS)[-1].text == "zeppelin"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("красный дом у реки", ["красный", "дом", "у", "реки"]),
        ("एक लाल घर", ["एक", "लाल", "घर"]),
        ("بيت أحمر", ["بيت", "أحمر"]),
        ("一只红色的房子", ["一只红色的房子"]),  # no blanks: one word, so every view gets it
        ("tree 🙂 x", ["tree 🙂", "x"]),
    ],
)
def test_words_of_other_scripts(picturebook, prompt, expected):
    words = words_of(prompt, picturebook.base.count, PICTUREBOOK_TOKENS)
    assert [word.text for word in words] == expected
    places = [place for word in words for place in word.states]
    assert places == sorted(set(places))
    assert all(word.states for word in words)


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_an_empty_prompt_has_no_words(picturebook, prompt):
    assert words_of(prompt, picturebook.base.count, PICTUREBOOK_TOKENS) == []


@given(st.text(max_size=60))
@examples(max_examples=60, deadline=None)
def test_words_are_the_prompts_in_order_whatever_it_is(prompt):
    def one_each(texts: Sequence[str]) -> list[int]:
        return [2 + len(text.split()) for text in texts]

    words = words_of(prompt, one_each, 200)
    assert " ".join(word.text for word in words).split() == [part for word in words for part in word.text.split()]
    assert set(" ".join(word.text for word in words).split()) <= set(prompt.split())


# -------------------------------------------------------------------------------------------------------- maps


def test_on_sdxl_the_layers_have_32_x_32_tokens_and_are_not_in_the_middle():
    names = layers(sdxl_shaped(), 128)
    assert {name.split(".attentions")[0] for name in names} == {"down_blocks.2", "up_blocks.0"}
    assert len(names) == 5
    finer = layers(sdxl_shaped(), 16)
    assert {name.split(".attentions")[0] for name in finer} == {"down_blocks.1", "up_blocks.1"}
    first = layers(make_stable_diffusion().unet, 64)
    assert {name.split(".attentions")[0] for name in first} == {"down_blocks.2", "up_blocks.1"}, "16 x 16 of 64 x 64"
    assert len(layers(make_pixart().transformer, 64)) == len(make_pixart().transformer.transformer_blocks)


def by_diffusers(models: Models, image, prompt: str, levels: int) -> np.ndarray:
    """The mean map, from the scores that diffusers computes for what reaches the layers."""
    unet, scores = models.base.network, []

    def look(attention, args, kwargs):
        text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        text = text[0] if isinstance(text, tuple) else text
        query, key = (attention.head_to_batch_dim(part) for part in (attention.to_q(args[0]), attention.to_k(text)))
        probabilities = attention.get_attention_scores(query, key)  # [heads, tokens, states]
        side = int(probabilities.shape[1] ** 0.5)
        scores.append(probabilities.mean(dim=0).T.unflatten(1, (side, side)))

    chosen = layers(unet, models.geometry.native).values()
    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in chosen]
    try:
        attention_maps(models, image, prompt, levels)
    finally:
        for handle in handles:
            handle.remove()
    assert len(scores) == levels * len(chosen)
    return torch.stack(scores).mean(dim=0).numpy()


@pytest.mark.parametrize("models", [plain, adapted], ids=["plain", "with an adapter"])
def test_maps_are_the_mean_of_the_attention_over_heads_layers_and_levels(models):
    expected = by_diffusers(models(), some_image(), "a cat", 3)
    maps = attention_maps(models(), some_image(), "a cat", 3)
    assert maps.shape == (77, 8, 8)
    np.testing.assert_allclose(maps, expected, atol=1e-6)
    np.testing.assert_allclose(maps.sum(axis=0), np.ones((8, 8)), atol=1e-5)


def test_maps_cost_a_row_per_level_and_leave_nothing_behind():
    models = plain()
    with counting() as cost:
        first = attention_maps(models, some_image(64, 32), "a cat", 4)
    assert (cost.calls, cost.rows, cost.native_rows) == (4, 4, 2.0)
    assert forwards(models.base.denoiser) == {}
    assert first.shape == (77, 4, 8)
    assert np.array_equal(first, attention_maps(models, some_image(64, 32), "a cat", 4)), "the noise is always the same"
    assert not np.array_equal(first, attention_maps(models, some_image(64, 32), "a dog", 4))
    with counting() as cost:
        large = attention_maps(models, some_image(300, 150), "a cat", 2)
    assert cost.native_rows <= 2.1, "a large image is looked at in the native area"
    assert large.shape[2] > large.shape[1]


def test_a_large_image_is_looked_at_in_the_native_area():
    geometry = Geometry(1024, 8)
    assert native_size(geometry, 1024, 1024) == (1024, 1024)
    assert native_size(geometry, 512, 768) == (512, 768)
    assert native_size(geometry, 4096, 4096) == (1024, 1024)
    assert native_size(geometry, 3000, 1500) == (1448, 728)
    assert native_size(geometry, 1, 3) == (8, 8)
    assert native_size(Geometry(1024, 8, 2), 1000, 1000) == (992, 992)


def test_transformers_with_cross_attention_have_maps_too():
    models = Models.from_pipeline(make_pixart())
    words = words_of("a b", models.base.count, models.base.tokens)
    maps = attention_maps(models, some_image(64, 64), "a b", 2)
    assert len(words) == 2
    assert words[0].states.start == 0, "no mark at the beginning"
    read = models.base.count(["a b"])[0]
    np.testing.assert_allclose(maps[:read].sum(axis=0), 1, atol=1e-5)
    assert not maps[read:].any(), "padding is not read"


def test_on_picturebook_the_nouns_of_objects_lie_on_the_objects(picturebook):
    """In drawn scenes, where it is known what a view shows."""
    pytest.importorskip("resvg_py")
    from resmaster_stages.picturebook.captions import visible
    from resmaster_stages.picturebook.truth import true_image, true_scene

    kept, grid = {True: [], False: []}, view_grid(picturebook.geometry, 512, 512, 0.5)
    for prompt in (
        "a white balloon on a cobbled road under a starry night sky",
        "a yellow bird and a purple tree on a sandy beach at sunset",
        "a red house and a white boat on the water on a sunny day",
    ):
        scene = true_scene(prompt, 512)
        kinds = {thing.kind for thing in scene.things}
        words = words_of(prompt, picturebook.base.count, picturebook.base.tokens)
        nouns = [word for word in words if word.text in kinds]
        assert len(nouns) == len(kinds)
        maps = attention_maps(picturebook, true_image(prompt, 128, 128), prompt, 5)
        for text, (y0, x0, y1, x1) in zip(texts_of("-", [*nouns, words[0]], maps, grid, 0.3), grid.pixel_boxes):
            shown = {thing.kind for thing, _, _ in visible(scene, (x0, y0, x1, y1))}
            for noun in nouns:
                kept[noun.text in shown].append(text == "-" or noun.text in text.split())
    assert np.mean(kept[True]) > 0.4
    assert np.mean(kept[False]) < 0.15


# ------------------------------------------------------------------------------------------------------- views


def test_a_mask_is_what_lies_above_the_mean_opened_on_large_maps():
    small = np.zeros((8, 8), dtype=np.float32)
    small[2, 3] = small[6, 6] = 1
    assert np.array_equal(mask_of(small), small == 1), "8 cells: no opening"
    large = np.zeros((32, 48), dtype=np.float32)
    large[4:14, 5:20] = 1  # large enough for two openings by 3 x 3
    large[20, 20] = large[25:28, 30:33] = 1  # a cell, and a square of 3: opened away
    large[27:32, 43:48] = 1  # cut by the corner
    expected = np.zeros((32, 48), dtype=bool)
    expected[4:14, 5:20] = expected[27:32, 43:48] = True
    assert np.array_equal(mask_of(large), expected)
    inside = np.zeros((32, 32), dtype=np.float32)
    inside[3:29, 3:29] = np.random.default_rng(0).random((26, 26)) ** 0.2
    assert np.array_equal(
        mask_of(inside), ndimage.binary_opening(inside > inside.mean(), np.ones((3, 3)), iterations=2)
    )


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 1, 1), 0.25),
        ((0, 0, 0.5, 0.5), 1.0),
        ((0.5, 0.5, 1, 1), 0.0),
        ((0.25, 0.25, 0.75, 0.75), 0.25),
        ((0, 0, 0.5, 0.6), 0.5 / 0.6),
        ((0.1, 0.4, 0.3, 0.6), 0.5),
    ],
)
def test_the_share_of_a_box_is_its_area(box, expected):
    mask = np.zeros((8, 8), dtype=bool)
    mask[:4, :4] = True
    assert covered(mask, box) == pytest.approx(expected)


def drawn(*masks: np.ndarray) -> tuple[list[Word], np.ndarray]:
    """Words "a", "b", ... with these masks as maps; the begin mark has no word."""
    words = [Word(chr(97 + number), range(number + 1, number + 2)) for number in range(len(masks))]
    return words, np.stack([np.zeros_like(masks[0]), *masks]).astype(np.float32)


def test_views_keep_the_words_that_cover_enough_of_them_in_the_prompts_order():
    left, top, dot = (np.zeros((8, 8)) for _ in range(3))
    left[:, :4], top[:4], dot[0, 0] = 1, 1, 1
    words, maps = drawn(left, top, dot)
    grid = view_grid(Geometry(64, 4), 128, 128, 1.0)  # four quarters
    assert texts_of("a  b c", words, maps, grid, 0.3) == ["a b", "b", "a", ""]
    assert texts_of("a  b c", words, maps, grid, 1 / 16) == ["a  b c", "b", "a", ""], "all words: the prompt as it is"
    overlapping = view_grid(Geometry(64, 4), 128, 128, 0.5)  # three by three
    assert texts_of("a  b c", words, maps, overlapping, 0.5)[4] == "a b", "half of the middle view is enough"
    assert texts_of("a  b c", words, maps, overlapping, 0.51)[4] == ""


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
@examples(max_examples=30, deadline=None)
def test_coverage_0_gives_every_view_the_prompt(seed, count):
    maps = np.random.default_rng(seed).random((count + 1, 8, 8), dtype=np.float32)
    words = [Word(f"w{number}", range(number, number + 1)) for number in range(count)]
    grid = view_grid(Geometry(64, 4), 150, 200, 0.5)
    assert texts_of(" the  prompt ", words, maps, grid, 0.0) == [" the  prompt "] * len(grid)


def test_permuted_words_are_kept_all_the_same():
    generator = np.random.default_rng(0)
    maps = generator.random((6, 8, 8), dtype=np.float32)
    words = [Word(f"w{number}", range(number, number + 1)) for number in range(6)]
    grid = view_grid(Geometry(64, 4), 256, 256, 0.5)
    there = texts_of("-", words, maps, grid, 0.45)
    back = texts_of("-", words[::-1], maps, grid, 0.45)
    assert [text.split() for text in there] == [text.split()[::-1] for text in back]
    assert len(set(there)) > 1
