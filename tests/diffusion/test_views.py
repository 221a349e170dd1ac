import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resmaster_stages.diffusion.fusing import WEIGHTS, Fuser, window_weights
from resmaster_stages.diffusion.views import Grid, view_grid, whole_canvas
from resmaster_stages.models.bases.base import Geometry


@pytest.mark.parametrize(
    ("height", "width", "views"),
    [(1024, 1024, 1), (2048, 2048, 9), (3072, 3072, 25), (2048, 4096, 21), (4096, 4096, 49), (8192, 8192, 225)],
)
def test_view_counts_of_sdxl_are_those_of_the_papers(height, width, views):
    assert len(view_grid(Geometry(1024, 8), height, width, 0.5)) == views


def test_last_window_is_pulled_back_to_the_border():
    grid = view_grid(Geometry(1024, 8), 1152, 2368, 0.5)
    assert grid.rows == (0, 16)
    assert grid.cols == (0, 64, 128, 168)
    assert grid.boxes[-1] == (16, 168, 144, 296)
    assert grid.name == "1152x2368/1024/512"


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 20), st.data())
def test_boxes_are_of_one_size_inside_the_canvas_and_cover_it(height, width, window, data):
    grid = Grid(height, width, window, data.draw(st.integers(1, window)))
    covered = torch.zeros(height, width)
    for y0, x0, y1, x1 in grid.boxes:
        assert (y1 - y0, x1 - x0) == (grid.window_height, grid.window_width)
        assert 0 <= y0 < y1 <= height
        assert 0 <= x0 < x1 <= width
        covered[y0:y1, x0:x1] += 1
    assert covered.min() >= 1
    assert len(set(grid.boxes)) == len(grid.boxes) == len(grid)


def test_stride_beyond_the_window_is_refused():
    with pytest.raises(ValueError, match="covers"):
        Grid(10, 10, 4, 5)


def test_pixel_boxes_are_clipped_where_the_canvas_was_padded():
    grid = view_grid(Geometry(64, 4), 101, 67, 0.5)
    assert (grid.height, grid.width) == (26, 17)
    assert grid.pixel_boxes[0] == (0, 0, 64, 64)
    assert grid.pixel_boxes[-1] == (40, 4, 101, 67)
    assert grid.canvas_boxes[-1] == (40, 4, 104, 68)


def test_whole_canvas_is_one_view():
    grid = whole_canvas(Geometry(64, 8), 100, 260)
    assert grid.boxes == ((0, 0, 13, 33),)


@settings(max_examples=40)
@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.integers(1, 9),
    st.sampled_from(WEIGHTS),
    st.data(),
)
def test_fusing_what_was_cut_gives_the_canvas_back(height, width, window, kind, data):
    grid = Grid(height, width, window, data.draw(st.integers(1, window)))
    canvas = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    fuser = Fuser(grid, kind)
    views = fuser.cut(canvas)
    assert views.shape == (2 * len(grid), 3, grid.window_height, grid.window_width)
    for number, (sample, (y0, x0, y1, x1)) in enumerate(itertools.product(range(2), grid.boxes)):
        assert torch.equal(views[number], canvas[sample, :, y0:y1, x0:x1])
    torch.testing.assert_close(fuser.fuse(views), canvas, atol=1e-5, rtol=1e-5)
    by_rows = torch.zeros_like(canvas)
    for row in range(len(grid.rows)):
        fuser.add_row(by_rows, fuser.cut_row(canvas, row), row)
    torch.testing.assert_close(by_rows, canvas, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_fusing_is_the_weighted_average_of_the_views(kind):
    grid = Grid(11, 14, 6, 3)
    fuser = Fuser(grid, kind)
    views = torch.randn(len(grid), 2, 6, 6, generator=torch.Generator().manual_seed(1))
    weight = window_weights(kind, 6, 3)
    window = weight[:, None] * weight[None, :]
    total, norm = torch.zeros(2, 11, 14, dtype=torch.float64), torch.zeros(11, 14, dtype=torch.float64)
    for view, (y0, x0, y1, x1) in zip(views, grid.boxes):
        total[:, y0:y1, x0:x1] += window * view
        norm[y0:y1, x0:x1] += window
    expected = (total / norm).float()
    torch.testing.assert_close(fuser.fuse(views)[0], expected, atol=1e-6, rtol=1e-5)
    by_rows = torch.zeros(1, 2, 11, 14)
    for row, of_row in enumerate(views.split(len(grid.cols))):
        fuser.add_row(by_rows, of_row, row)
    torch.testing.assert_close(by_rows[0], expected, atol=1e-6, rtol=1e-5)


def test_a_single_view_is_fused_without_rounding():
    canvas = torch.randn(1, 4, 9, 5)
    for kind in WEIGHTS:
        fuser = Fuser(Grid(9, 5, 9, 9), kind)
        assert torch.equal(fuser.fuse(fuser.cut(canvas)), canvas)


def test_weights_of_a_window_are_those_of_the_papers():
    """Mixture of Diffusers: exp(-(x - m)^2 / (2 * 0.01 * W^2)), m = (W - 1) / 2. PixelRush: a box blurred with sigma 8
    and 41 taps, zeros beyond."""
    place = torch.arange(128, dtype=torch.float64)
    middle = (128 - 1) / 2
    expected = torch.exp(-((place - middle) ** 2) / (2 * 0.01 * 128**2))
    torch.testing.assert_close(window_weights("narrow", 128, 64), expected)
    torch.testing.assert_close(window_weights("cosine", 128, 64), torch.cos(torch.pi * (place - middle) / 128))
    taps = torch.exp(-0.5 * (torch.arange(-20, 21, dtype=torch.float64) / 8) ** 2)
    padded = torch.nn.functional.pad(torch.ones(128, dtype=torch.float64), (20, 20))
    blurred = torch.stack([(padded[x : x + 41] * taps / taps.sum()).sum() for x in range(128)])
    torch.testing.assert_close(window_weights("feather", 128, 64), blurred)
    for kind in WEIGHTS:
        torch.testing.assert_close(window_weights(kind, 31, 8), window_weights(kind, 31, 8).flip(0))
    assert window_weights("feather", 2, 1).tolist() == [1.0, 1.0]  # too short for a blur


def test_unknown_weights_are_refused():
    with pytest.raises(ValueError, match="uniform, linear, gaussian"):
        window_weights("triangle", 8, 4)
