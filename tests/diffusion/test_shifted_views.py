"""Grids that move from step to step."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resmaster_stages.config.load import parse_config
from resmaster_stages.diffusion.conditions import make_conditions
from resmaster_stages.diffusion.cost import counting
from resmaster_stages.diffusion.shifted_views import nearest_views, shift_at
from resmaster_stages.diffusion.views import Grid, view_grid
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.resmaster import ResMaster
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases.base import Geometry
from tests.methods.common import adapted, schedule, some_image
from tests.methods.common import settings as method


@settings(max_examples=80)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 20), st.data())
def test_every_shift_has_as_many_windows_which_cover_the_canvas(height, width, window, data):
    grid = Grid(height, width, window, data.draw(st.integers(1, window)))
    counts = set()
    for shift in range(grid.stride):
        moved = replace(grid, shift=(shift, grid.stride - 1 - shift))
        covered = torch.zeros(height, width)
        for y0, x0, y1, x1 in moved.boxes:
            assert (y1 - y0, x1 - x0) == (grid.window_height, grid.window_width)
            assert 0 <= y0 < y1 <= height
            assert 0 <= x0 < x1 <= width
            covered[y0:y1, x0:x1] += 1
        assert covered.min() >= 1
        counts.add(len(moved))
    assert len(counts) == 1


def test_shifts_visit_the_whole_stride_evenly():
    shifts = [shift_at(number, 8) for number in range(64)]
    for axis in (0, 1):
        counts = [sum(shift[axis] == value for shift in shifts) for value in range(8)]
        assert min(counts) >= 6
        assert max(counts) <= 10
    assert len(set(shifts)) > 40


def test_moved_views_are_fused_back_and_take_the_nearest_views_conditions():
    models, grid = adapted(), view_grid(Geometry(64, 8), 128, 192, 0.5)
    texts = [f"{number}" for number in range(2 * len(grid))]  # two samples
    conditions = make_conditions(models, grid, texts, [""] * len(texts), guidance_scale=5.0)
    at = ResMaster(preset="exact", shift="every_step").placed(grid, conditions, models.device)
    canvas = torch.randn(2, 4, grid.height, grid.width)
    seen = set()
    for step in schedule(6):
        views, moved = at(step)
        cut = views.cut(canvas)
        assert len(cut) == len(moved)
        torch.testing.assert_close(views.fuse(cut), canvas)
        there = replace(grid, shift=shift_at(step.index, grid.stride))
        near = nearest_views(there, grid)
        assert torch.equal(
            moved.text.index, conditions.text.index[torch.tensor([*near, *(len(grid) + n for n in near)])]
        )
        for (y, x, _, _), view in zip(there.boxes, near):
            best = min(abs(y - row) for row in grid.rows) + min(abs(x - col) for col in grid.cols)
            assert abs(y - grid.boxes[view][0]) + abs(x - grid.boxes[view][1]) == best
        seen.add(there.boxes)
    assert len(seen) > 3


@pytest.mark.parametrize("name", ["resmaster", "multidiffusion"])
def test_moving_grids_change_the_image_but_not_where_one_view_is_all(name):
    exact = {"preset": "exact"} if name == "resmaster" else {}

    def draw(image, **values):
        return upscale_image(adapted(), image, "a cat", config=method(name, **exact, **values), seed=3).tobytes()

    assert draw(some_image(), steps=3, shift="every_step") != draw(some_image(), steps=3)
    small = some_image(32, 32)  # twice 32 px is the tiny model's native size
    assert draw(small, shift="every_step") == draw(small)


def test_every_step_costs_the_same():
    config = method("multidiffusion", steps=3, shift="every_step", view_batch=1, stride=1.0)
    with counting() as cost:
        upscale_image(adapted(), some_image(), "a cat", config=config)
    assert cost.calls == 3 * 9  # 2 x 2 windows stand still, 3 x 3 move


def test_methods_without_a_moving_grid_refuse_it():
    with pytest.raises(ConfigError, match=r"unknown key 'upscale\.shift' .*; method direct knows"):
        parse_config({"name": "d", "upscale": {"method": "direct", "shift": "every_step"}})
    assert ResMaster(preset="exact", shift="every_step").identity()["shift"] == "every_step"


def test_moving_views_may_lie_further_apart_and_stand_still_at_the_end():
    models, grid = adapted(), view_grid(Geometry(64, 8), 128, 192, 0.5)
    texts = [f"{number}" for number in range(len(grid))]
    conditions = make_conditions(models, grid, texts, [""] * len(texts), guidance_scale=5.0)
    config = ResMaster(shift="every_step", shift_stride=1.0, shift_stop=0.6, steps=10)
    at, canvas = config.placed(grid, conditions, models.device), torch.randn(1, 4, grid.height, grid.width)
    counts = []
    for step in schedule(10):
        views, there = at(step)
        torch.testing.assert_close(views.fuse(views.cut(canvas)), canvas)
        counts.append(len(there))
    moving = len(config.moving(grid))
    assert moving < len(replace(grid, shift=(0, 0)))
    assert counts == [moving] * 6 + [len(grid)] * 4
    assert torch.equal(at(schedule(10)[-1])[1].text.index, conditions.text.index)


def test_fields_of_moving_views_need_moving_views():
    with pytest.raises(ConfigError, match="shift_stop is set, but is read only with shift: every_step; set that too"):
        parse_config({"name": "d", "upscale": {"shift": "none", "shift_stop": 0.5}})
    with pytest.raises(ConfigError, match="shift_stride"):
        parse_config({"name": "d", "upscale": {"preset": "exact", "shift_stride": 1.0}})
