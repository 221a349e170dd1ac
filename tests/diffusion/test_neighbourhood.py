"""Attention to the neighbourhood of each place alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resmaster_stages.diffusion.guidance import NEGATIVE, TEXT, DenoiserCall
from resmaster_stages.diffusion.neighbourhood import Axis, Tiles, level, neighbourhood
from resmaster_stages.diffusion.patches import level_of, level_size
from tests.methods.common import forwards, schedule, sdxl_shaped

CPU = torch.device("cpu")


def a_call(index: int = 0) -> DenoiserCall:
    return DenoiserCall(schedule()[index], (NEGATIVE, TEXT))


def some(rows: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def near(query, key, value, heads, rows: Axis, cols: Axis):
    return level(rows, cols, CPU).attend(query, key, value, heads)


def window_of(place: int, length: int, window: int, shift: int) -> range:
    """The window of a token, found from the token alone."""
    if length <= window:
        return range(length)
    tile = max(1, window // 2)
    start = (place + shift) // tile * tile - shift - (window - tile) // 2
    start = min(max(start, 0), length - window)
    return range(start, start + window)


def brute_force(query, key, value, rows: Axis, cols: Axis):
    """Softmax of one head over the window of each token, token by token."""
    out = torch.empty_like(value)
    for y in range(rows.length):
        for x in range(cols.length):
            seen = [
                v * cols.length + u
                for v in window_of(y, rows.length, rows.window, rows.shift)
                for u in window_of(x, cols.length, cols.window, cols.shift)
            ]
            place = y * cols.length + x
            scores = (key[:, seen] @ query[:, place, :, None]).squeeze(-1) / query.shape[-1] ** 0.5
            out[:, place] = (scores.softmax(dim=-1)[:, None] @ value[:, seen]).squeeze(1)
    return out


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 13), st.integers(1, 13), st.integers(1, 9), st.data())
def test_each_token_attends_to_exactly_its_clamped_window(height, width, window, data):
    """Also where sides are no multiples of a tile, windows are odd, one side is short, and tiles are moved."""
    down, across = (
        Axis(side, window, data.draw(st.integers(0, max(1, window // 2) - 1)) if side > window else 0)
        for side in (height, width)
    )
    query, key, value = some(3, 2, height * width, 4)
    torch.testing.assert_close(
        near(query, key, value, 1, down, across), brute_force(query, key, value, down, across), atol=1e-5, rtol=1e-4
    )


def test_the_papers_tiles_and_windows():
    """On SDXL at 2048 px: 64 tokens at the first level with attention, 32 at the second, tiles of half of them."""
    tiles = Tiles(256, 256, 128)
    first, second = (tiles.axes(tokens) for tokens in (128 * 128, 64 * 64))
    assert first == (Axis(128, 64), Axis(128, 64))
    assert second == (Axis(64, 32), Axis(64, 32))
    axis = first[0]
    assert axis.starts().tolist() == [0, 32, 64, 96]
    assert axis.keys()[:, 0].tolist() == [0, 16, 48, 64]
    assert axis.keys()[:, -1].tolist() == [63, 79, 111, 127]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.integers(0, 200))
def test_every_token_is_in_one_place_of_a_tile_whose_window_holds_it(height, width, window, step):
    for axis in Tiles(height, width, window, jitter=True).axes(height * width, step):
        tile, place = axis.places().unbind(-1)
        token = torch.arange(axis.length)
        assert torch.equal(axis.queries()[tile, place], token)
        assert (axis.keys()[tile] == token[:, None]).any(dim=-1).all()
        assert axis.keys().min() >= 0
        assert axis.keys().max() < axis.length
        assert len(axis.queries()) == len(axis.keys()) == axis.tiles


def test_a_canvas_of_one_window_is_the_plain_layer():
    unet = sdxl_shaped()
    x, text = some(2, 4, 16, 16), some(2, 3, 8, seed=1)
    base = unet(x, torch.tensor(500), text, return_dict=False)[0]
    for jitter in (False, True):
        with neighbourhood(unet, a_call(7), Tiles(16, 16, 16, jitter)):
            assert torch.equal(unet(x, torch.tensor(500), text, return_dict=False)[0], base)
    query, key, value = some(3, 2, 16 * 16, 4)
    whole = near(query, key, value, 1, Axis(16, 16), Axis(16, 16))
    torch.testing.assert_close(whole, brute_force(query, key, value, Axis(16, 99), Axis(16, 99)), atol=1e-5, rtol=1e-4)


def test_away_from_borders_what_moves_by_a_tile_moves_the_result():
    query, key, value = some(3, 1, 32, 32, 4)
    moved = [each.roll((4, 8), dims=(1, 2)) for each in (query, key, value)]
    axes = (Axis(32, 8), Axis(32, 8))
    one, other = (
        near(*(each.flatten(1, 2) for each in parts), 2, *axes).unflatten(1, (32, 32))
        for parts in ((query, key, value), moved)
    )
    torch.testing.assert_close(other[:, 8:24, 12:24], one[:, 4:20, 4:16])
    assert (other[:, :4] - one.roll((4, 8), dims=(1, 2))[:, :4]).abs().max() > 0.01


def test_branch_by_branch_is_the_same_as_all_together():
    unet = sdxl_shaped()
    layer = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1
    x = some(4, 18 * 18, 16)
    with neighbourhood(unet, a_call(3), Tiles(36, 36, 16, jitter=True)):
        together = layer(x)
        apart = torch.cat([layer(each) for each in x.split(1)])
        swapped = layer(x.flip(0)).flip(0)
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(together, swapped, atol=1e-6, rtol=1e-5)


def test_a_layer_is_its_projections_around_its_neighbourhoods():
    unet = sdxl_shaped()
    layer = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1
    x = some(1, 10 * 18, 16)
    with neighbourhood(unet, a_call(), Tiles(20, 36, 16)):
        ours = layer(x)
    query, key, value = (project(x).unflatten(2, (layer.heads, -1)) for project in (layer.to_q, layer.to_k, layer.to_v))
    heads = [
        brute_force(query[:, :, head], key[:, :, head], value[:, :, head], Axis(10, 8), Axis(18, 8))
        for head in range(layer.heads)
    ]
    torch.testing.assert_close(ours, layer.to_out[0](torch.cat(heads, dim=-1)), atol=1e-5, rtol=1e-4)
    assert (ours - layer(x)).abs().max() > 1e-4


def test_parts_of_tiles_hold_no_more_tokens_than_the_canvas(monkeypatch):
    gathered = []

    def attended(query, key, value, heads):
        gathered.append(key.shape[0] * key.shape[1])
        return query

    monkeypatch.setattr("resmaster_stages.diffusion.neighbourhood.attend", attended)
    x = some(1, 32 * 32, 2)
    assert torch.equal(near(x, x, x, 1, Axis(32, 8), Axis(32, 8)), x)
    assert gathered == [32 * 32] * 4  # 64 tiles with windows of 64 tokens


def test_jitter_moves_the_tiles_from_step_to_step_and_levels_together():
    moving = Tiles(64, 64, 32, jitter=True)
    first = [moving.axes(64 * 64, step) for step in range(5)]
    assert len({(down.shift, across.shift) for down, across in first}) == 5
    assert all(0 <= axis.shift < axis.tile for axes in first for axis in axes)
    for step in range(50):
        fine, coarse = moving.axes(64 * 64, step), moving.axes(32 * 32, step)
        assert all(each.shift // 2 == other.shift for each, other in zip(fine, coarse))
    assert moving.axes(64 * 64, 3) == moving.axes(64 * 64, 3)
    still = Tiles(64, 64, 32)
    assert still.axes(64 * 64, 3) == still.axes(64 * 64, 4)


def test_layers_are_restored_after_exceptions():
    unet = sdxl_shaped()
    x, text = some(2, 4, 32, 32), some(2, 3, 8, seed=1)
    base = unet(x, torch.tensor(500), text, return_dict=False)[0]
    with pytest.raises(RuntimeError, match="boom"), neighbourhood(unet, a_call(), Tiles(32, 32, 16)):  # noqa: PT012
        assert (unet(x, torch.tensor(500), text, return_dict=False)[0] - base).abs().max() > 1e-5
        raise RuntimeError("boom")
    assert torch.equal(unet(x, torch.tensor(500), text, return_dict=False)[0], base)
    assert forwards(unet) == {}


def test_levels_are_told_by_their_tokens():
    assert [level_of(37, 20, tokens) for tokens in (37 * 20, 19 * 10, 10 * 5)] == [0, 1, 2]
    assert level_size(37, 20, 190) == (19, 10)
    with pytest.raises(ValueError, match="no level"):
        level_of(37, 20, 7)
