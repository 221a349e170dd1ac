"""Canvases that continue at the opposite border: a shift of what goes in shifts what comes out."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resmaster_stages.config.structure import StructureConfig
from resmaster_stages.config.wrap import wrap_of, wrapped_axes
from resmaster_stages.diffusion.autoencoder import decode, encode, tile_grid
from resmaster_stages.diffusion.circular import circular
from resmaster_stages.diffusion.composer import sampled
from resmaster_stages.diffusion.conditions import size_and_crop
from resmaster_stages.diffusion.frequency import low_pass_kernel, low_pass_of
from resmaster_stages.diffusion.fusing import WEIGHTS, Fuser
from resmaster_stages.diffusion.reference import continued, resized
from resmaster_stages.diffusion.shifted_views import nearest_views
from resmaster_stages.diffusion.views import Grid, distance, view_grid, why_not_wrapping, wrapped_origins
from resmaster_stages.models.bases.base import Geometry
from tests.methods.common import forwards, plain, sdxl_shaped

BOTH, ACROSS, DOWN = (True, True), (False, True), (True, False)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def border_steps(x: torch.Tensor, dim: int) -> tuple[float, float]:
    """The mean step across the border where `x` wraps, and the mean step inside."""
    steps = (x - x.roll(1, dim)).abs().mean([each for each in range(x.ndim) if each != dim])
    return float(steps[0]), float(steps[1:].mean())


def test_the_axes_of_a_setting() -> None:
    assert wrapped_axes("horizontal") == (False, True)  # to the right of the last column is the first
    for wrap in ("none", "horizontal", "vertical", "both"):
        assert wrap_of(wrapped_axes(wrap)) == wrap


@pytest.mark.parametrize(("length", "views"), [(64, 1), (128, 2), (192, 3), (256, 4), (200, 4), (512, 8), (1024, 16)])
def test_an_axis_that_wraps_takes_its_length_over_the_stride(length: int, views: int) -> None:
    origins = wrapped_origins(length, 64, 64)
    assert len(origins) == views
    half = wrapped_origins(length, 128, 64)
    assert len(half) == max(2, -(-length // 64))
    gaps = [b - a for a, b in itertools.pairwise((*half, length))]
    assert max(gaps) <= 64
    assert max(gaps) - min(gaps) <= 1


def test_a_panorama_has_one_column_of_views_more_than_without_wrapping() -> None:
    geometry = Geometry(1024, 8)
    assert len(view_grid(geometry, 1024, 4096, 0.5)) == 7
    assert len(view_grid(geometry, 1024, 4096, 0.5, ACROSS)) == 8
    assert len(view_grid(geometry, 4096, 4096, 0.5, BOTH)) == 64


SIDES = st.integers(1, 24)


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.integers(1, 9), st.sampled_from(WEIGHTS), st.sampled_from([BOTH, ACROSS, DOWN]), st.data())
def test_fusing_what_was_cut_gives_the_canvas_back(height, width, window, kind, wraps, data):
    stride = data.draw(st.integers(1, window))
    shift = data.draw(st.none() | st.tuples(*[st.integers(0, stride - 1)] * 2))
    grid = Grid(height, width, window, stride, shift=shift, wraps=wraps)
    canvas = random(2, 3, height, width)
    fuser = Fuser(grid, kind)
    views = fuser.cut(canvas)
    assert views.shape == (2 * len(grid), 3, grid.window_height, grid.window_width)
    wide = canvas.repeat(1, 1, 2, 2)  # a box beyond the border continues at the opposite border
    for number, (sample, (y0, x0, y1, x1)) in enumerate(itertools.product(range(2), grid.boxes)):
        assert torch.equal(views[number], wide[sample, :, y0:y1, x0:x1])
        assert 0 <= y0 < height
        assert 0 <= x0 < width
    torch.testing.assert_close(fuser.fuse(views), canvas, atol=1e-5, rtol=1e-5)
    by_rows = torch.zeros_like(canvas)
    for row in range(len(grid.rows)):
        fuser.add_row(by_rows, fuser.cut_row(canvas, row), row)
    torch.testing.assert_close(by_rows, canvas, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_fusing_knows_no_border(kind: str) -> None:
    """Views that were changed each in its own way, moved on by one view, fuse to the moved canvas."""
    fuser = Fuser(Grid(32, 48, 16, 8, wraps=BOTH), kind)
    views = random(24, 3, 16, 16)
    moved = views.unflatten(0, (4, 6)).roll((1, 2), (0, 1)).flatten(0, 1)
    torch.testing.assert_close(fuser.fuse(moved), fuser.fuse(views).roll((8, 16), (2, 3)), atol=1e-6, rtol=1e-5)


def test_moving_views_need_no_further_view() -> None:
    grid = Grid(32, 48, 16, 8, wraps=BOTH)
    for shift in itertools.product(range(8), repeat=2):
        moved = replace(grid, shift=shift)
        assert len(moved) == len(grid) == 24
        assert {origin % 8 for origin in moved.rows} == {-shift[0] % 8}


def test_moved_views_are_nearest_by_the_shorter_way() -> None:
    grid = Grid(16, 64, 16, 16, wraps=ACROSS)
    assert grid.cols == (0, 16, 32, 48)
    moved = replace(grid, shift=(0, 2))
    assert moved.cols == (62, 14, 30, 46)
    assert nearest_views(moved, grid) == [0, 1, 2, 3]
    assert distance(62, 0, 64, True) == 2
    assert distance(62, 0, 64, False) == 62


def test_crops_begin_inside_the_canvas_and_the_name_says_that_it_wraps() -> None:
    grid = view_grid(Geometry(64, 4), 128, 192, 0.5, ACROSS)
    assert max(left for _, _, _, left, _, _ in size_and_crop(grid, "canvas")) == 160
    assert grid.pixel_boxes[-1] == (64, 160, 128, 224)
    assert grid.name == "128x192/64/32/horizontal"
    assert view_grid(Geometry(64, 4), 128, 192, 0.5).name == "128x192/64/32"


def test_sides_that_need_padding_cannot_wrap() -> None:
    geometry = Geometry(64, 4)
    assert why_not_wrapping(geometry, 128, 130, DOWN) == ""
    assert "width 130 px is no multiple of 4" in why_not_wrapping(geometry, 128, 130, ACROSS)
    assert "height 126 px" in why_not_wrapping(geometry, 126, 130, BOTH)


# --------------------------------------------------------------------------------------------------- filters and sizes


@pytest.mark.parametrize("preset", ["paper", "imax", "hiflow"])
@pytest.mark.parametrize("wraps", [BOTH, ACROSS, DOWN])
def test_filters_shift_with_the_canvas(preset: str, wraps: tuple[bool, bool]) -> None:
    low, x = low_pass_of(StructureConfig.model_validate({"preset": preset}), 4, wraps), random(2, 3, 24, 40)
    shift = tuple(6 * wrapped for wrapped in wraps)
    torch.testing.assert_close(low(x.roll(shift, (2, 3))), low(x).roll(shift, (2, 3)), atol=1e-5, rtol=1e-4)
    constant = torch.full_like(x, 0.7)
    torch.testing.assert_close(low(constant), constant, atol=1e-5, rtol=0)
    if preset != "imax":  # its blocks are moved by whole blocks alone
        plain_low = low_pass_of(StructureConfig.model_validate({"preset": preset}), 4)
        assert (plain_low(x.roll(shift, (2, 3))) - plain_low(x).roll(shift, (2, 3))).abs().max() > 1e-2


def test_the_wrapped_butterworth_is_the_fourier_form() -> None:
    config, x = StructureConfig.model_validate({"preset": "hiflow"}), random(1, 2, 30, 45)
    y, across = torch.fft.fftfreq(30) * 2, torch.fft.rfftfreq(45) * 2
    gain = 1 / (1 + ((y[:, None] ** 2 + across**2) / config.cutoff**2) ** 4)
    expected = torch.fft.irfft2(torch.fft.rfft2(x) * gain, s=(30, 45))
    torch.testing.assert_close(low_pass_of(config, 4, BOTH)(x), expected, atol=1e-5, rtol=1e-4)


def test_the_wrapped_gaussian_is_a_circular_convolution() -> None:
    config, x = StructureConfig.model_validate({"preset": "paper"}), random(1, 1, 1, 40)
    kernel = torch.tensor(low_pass_kernel(config.cutoff))
    reach = len(kernel) // 2
    expected = sum(weight * x.roll(n - reach, 3) for n, weight in enumerate(kernel))
    torch.testing.assert_close(low_pass_of(config, 4, ACROSS)(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(96, 160), (60, 100), (12, 20), (31, 47)])
def test_resizing_is_that_of_the_repeated_image(height: int, width: int) -> None:
    x, smaller = random(1, 2, 24, 40), height < 24
    repeated = F.interpolate(
        x.repeat(1, 1, 3, 3), size=(3 * height, 3 * width), mode="bicubic", align_corners=False, antialias=smaller
    )
    middle = repeated[..., height : 2 * height, width : 2 * width]
    torch.testing.assert_close(resized(x, height, width, wraps=BOTH, antialias=smaller), middle, atol=1e-4, rtol=1e-4)
    plain_size = F.interpolate(x, size=(height, width), mode="bicubic", align_corners=False, antialias=smaller)
    assert torch.equal(resized(x, height, width, antialias=smaller), plain_size)


def test_crops_beyond_the_border_continue_at_the_opposite_border() -> None:
    x = random(2, 3, 8, 12)
    wide = continued(x, [(0, 0, 4, 4), (6, 9, 10, 13)])
    assert wide.shape == (2, 3, 10, 13)
    assert torch.equal(wide[..., 6:10, 9:13], x.roll((-6, -9), (2, 3))[..., :4, :4])
    assert continued(x, [(0, 0, 8, 12)]) is x


def test_maps_are_read_on_at_the_opposite_border() -> None:
    maps = random(1, 5, 8, 8).softmax(dim=1)
    places = torch.tensor([[[-1 + 1 / 32, 0.3], [1 - 1 / 32, 0.3], [0.2, -0.4]]])
    moved = (places + torch.tensor([0.5, 0.0]) + 1) % 2 - 1  # two of eight cells to the right
    words = sampled(maps, places, ACROSS)
    torch.testing.assert_close(sampled(maps.roll(2, 3), moved, ACROSS), words, atol=1e-4, rtol=1e-3)
    assert (sampled(maps.roll(2, 3), moved) - sampled(maps, places)).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------ networks and decoder


def test_a_circular_convolution_is_that_of_the_repeated_input() -> None:
    x = random(1, 3, 6, 10)
    for stride, wraps in itertools.product((1, 2), (BOTH, ACROSS, DOWN)):
        conv = nn.Conv2d(3, 2, 3, stride, 1)
        down, across = wraps
        more = (across * 10, across * 10, down * 6, down * 6)
        expected = conv(F.pad(x, more, mode="circular"))[..., down * 6 // stride :, across * 10 // stride :]
        with circular(conv, wraps), torch.no_grad():
            y = conv(x)
        torch.testing.assert_close(y, expected[..., : y.shape[2], : y.shape[3]])


@pytest.mark.parametrize("wraps", [BOTH, ACROSS, DOWN])
def test_a_unet_of_circular_convolutions_knows_no_border(wraps: tuple[bool, bool]) -> None:
    unet, x = sdxl_shaped(), random(1, 4, 16, 24)
    shift = tuple(4 * wrapped for wrapped in wraps)  # whole cells of the deepest of three levels

    def run(sample: torch.Tensor) -> torch.Tensor:
        return unet(sample, 500, random(1, 7, 8, seed=1), return_dict=False)[0]

    with circular(unet, wraps):
        there, here = run(x.roll(shift, (2, 3))), run(x).roll(shift, (2, 3))
    torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-3)
    assert (run(x.roll(shift, (2, 3))) - run(x).roll(shift, (2, 3))).abs().max() > 1e-3


def test_layers_are_restored_after_an_exception_and_untouched_where_nothing_wraps() -> None:
    unet = sdxl_shaped()
    with circular(unet, (False, False)):
        assert not forwards(unet)
    inside = 0

    def fail() -> None:
        nonlocal inside
        with circular(unet, BOTH):
            inside = len(forwards(unet))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert inside > 20
    assert not forwards(unet)


@pytest.mark.parametrize(
    ("height", "width", "shift"),
    [(16, 16, (8, 8)), (8, 16, (4, 8)), (48, 48, (12, 24)), (16, 48, (8, 12)), (4, 40, (2, 20))],
)
def test_the_decoder_and_the_encoder_shift_with_the_image(height: int, width: int, shift: tuple[int, int]) -> None:
    models, latents = plain(), random(1, 4, height, width)
    pixels = random(1, 3, 4 * height, 4 * width).clamp(-1, 1)
    by_px = (4 * shift[0], 4 * shift[1])
    decoded = decode(models, latents, BOTH)
    torch.testing.assert_close(
        decode(models, latents.roll(shift, (2, 3)), BOTH), decoded.roll(by_px, (2, 3)), atol=1e-4, rtol=1e-3
    )
    torch.testing.assert_close(
        encode(models, pixels.roll(by_px, (2, 3)), BOTH),
        encode(models, pixels, BOTH).roll(shift, (2, 3)),
        atol=1e-4,
        rtol=1e-3,
    )


def test_a_decoded_canvas_has_no_step_at_the_border() -> None:
    """Smooth latents give smooth pixels across the border. A decoder that pads with zeros makes a step there."""
    models = plain()
    angle = torch.arange(16) * 2 * torch.pi / 16
    latents = (2 * torch.stack([angle.cos(), angle.sin(), -angle.cos(), angle.cos() / 2]))[None, :, None].repeat(
        1, 1, 16, 1
    )
    border, inside = border_steps(decode(models, latents, ACROSS), 3)
    assert border < 1.5 * inside
    border, inside = border_steps(decode(models, latents), 3)
    assert border > 2 * inside


def test_tiles_cross_the_border_of_axes_that_wrap() -> None:
    assert len(tile_grid(16, 16, 16)) == 1
    assert len(tile_grid(16, 16, 16, ACROSS)) == 2
    assert len(tile_grid(8, 8, 16, BOTH)) == 4
    assert len(tile_grid(16, 48, 16, ACROSS)) == 4
    assert len(tile_grid(64, 64, 16)) == len(tile_grid(64, 64, 16, (False, False))) == 25
