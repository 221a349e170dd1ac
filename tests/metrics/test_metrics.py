"""Each metric against a closed form or an independent computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from scipy.signal import convolve2d

from resmaster_stages.diffusion.views import view_grid
from resmaster_stages.metrics.agreement import MAX_PSNR, agreement, psnr, ssim
from resmaster_stages.metrics.detail import detail_energy
from resmaster_stages.metrics.exposure import exposure
from resmaster_stages.metrics.luminance import luminance, rgb
from resmaster_stages.metrics.phash import distance, phash
from resmaster_stages.metrics.resize import resize
from resmaster_stages.metrics.seam import seam_ratio, seam_worst
from resmaster_stages.models.bases.base import Geometry

rng = np.random.default_rng(7)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.float32)


def some_image(size: int = 128, seed: int = 0) -> Image.Image:
    """A smooth image with contours: blurred noise, stretched, and a bright square."""
    image = Image.fromarray(noise(size, size, seed).astype(np.uint8)).filter(ImageFilter.GaussianBlur(size / 16))
    values = np.asarray(image).astype(np.float32)
    values = (values - values.min()) / np.ptp(values) * 200 + 20
    values[size // 5 : size // 2, size // 3 : size // 2] = (230, 200, 40)
    return Image.fromarray(values.astype(np.uint8))


# ------------------------------------------------------------------------------------------ luminance and resizing


def test_luminance_is_pils() -> None:
    image = Image.fromarray(noise(9, 11).astype(np.uint8))
    assert np.abs(luminance(image) - np.asarray(image.convert("L"))).max() <= 0.51
    assert luminance(image).shape == (9, 11)
    assert luminance(np.full((2, 2, 3), 255.0)) == pytest.approx(255.0)


def test_grey_and_alpha_images_count_as_rgb_and_other_arrays_are_refused() -> None:
    assert rgb(Image.new("L", (3, 2), 77)).shape == (2, 3, 3)
    assert rgb(Image.new("RGBA", (3, 2), (1, 2, 3, 4)))[0, 0].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=r"\[H, W, 3\]"):
        rgb(np.zeros((4, 4)))


def test_box_resizing_averages_blocks_without_rounding() -> None:
    values = noise(12, 8)
    blocks = values.reshape(3, 4, 2, 4, 3).mean(axis=(1, 3))
    assert np.abs(resize(values, 3, 2, "box") - blocks).max() < 1e-4


def test_bicubic_resizing_is_antialiased_and_keeps_fractions() -> None:
    checkers = np.indices((64, 64)).sum(axis=0) % 2 * 255.0
    small = resize(np.repeat(checkers[:, :, None], 3, axis=2), 8, 8)
    assert np.abs(small - 127.5).max() < 2.0  # without antialiasing it would be 0 or 255
    assert resize(np.full((5, 5, 3), 10.25), 3, 7) == pytest.approx(10.25)


# ------------------------------------------------------------------------------------------------------- agreement


@given(st.floats(0.5, 100))
@settings(max_examples=20)
def test_psnr_of_a_constant_difference(difference: float) -> None:
    zeros = np.zeros((4, 5, 3))
    assert psnr(zeros, zeros + difference) == pytest.approx(20 * math.log10(255 / difference), abs=1e-4)


def test_psnr_of_equal_images_is_the_maximum_and_finite() -> None:
    assert psnr(some_image(), some_image()) == MAX_PSNR


def test_ssim_against_a_direct_computation() -> None:
    a, b = luminance(noise(24, 31, 1)).astype(float), luminance(noise(24, 31, 2)).astype(float) * 0.5 + 40
    x = np.arange(-5, 6)
    line = np.exp(-(x**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    mean = [convolve2d(v, window, "valid") for v in (a, b)]
    var = [convolve2d(v * v, window, "valid") - m**2 for v, m in zip((a, b), mean)]
    cov = convolve2d(a * b, window, "valid") - mean[0] * mean[1]
    c1, c2 = 2.55**2, 7.65**2
    expected = ((2 * mean[0] * mean[1] + c1) * (2 * cov + c2)) / ((mean[0] ** 2 + mean[1] ** 2 + c1) * (sum(var) + c2))
    grey = [np.repeat(v[:, :, None], 3, axis=2) for v in (a, b)]
    assert ssim(*grey) == pytest.approx(expected.mean(), abs=1e-5)


def test_ssim_is_one_for_equal_images_and_symmetric() -> None:
    a, b = some_image(seed=1), some_image(seed=2)
    assert ssim(a, a) == pytest.approx(1.0)
    assert ssim(a, b) == pytest.approx(ssim(b, a))
    assert ssim(a, b) < 0.9
    assert ssim(np.full((4, 4, 3), 9.0), np.full((4, 4, 3), 9.0)) == pytest.approx(1.0)  # smaller than the window


def test_agreement_ignores_what_is_finer_than_the_low_res_image() -> None:
    low = np.asarray(some_image(32)).astype(np.float32)
    high = low.repeat(4, axis=0).repeat(4, axis=1)
    texture = np.indices((128, 128)).sum(axis=0) % 2 * 40.0 - 20.0
    assert agreement(high + texture[:, :, None], low)[0] > 90
    assert agreement(high[::-1], low)[0] < 25


def test_agreement_needs_images_of_one_size() -> None:
    with pytest.raises(ValueError, match="one size"):
        psnr(np.zeros((2, 2, 3)), np.zeros((2, 3, 3)))
    with pytest.raises(ValueError, match="one size"):
        ssim(np.zeros((2, 2, 3)), np.zeros((2, 3, 3)))


# ---------------------------------------------------------------------------------------------------------- detail


def wave(frequency: float, size: int = 128, axis: int = 1) -> np.ndarray:
    """A cosine of `frequency` cycles per px along an axis."""
    line = 100 + 50 * np.cos(2 * np.pi * frequency * np.arange(size))
    values = np.broadcast_to(line if axis == 1 else line[:, None], (size, size))
    return np.repeat(values[:, :, None], 3, axis=2).astype(np.float32)


@pytest.mark.parametrize("axis", [0, 1])
def test_detail_of_waves_below_and_above_the_low_res_nyquist(axis: int) -> None:
    # a 32-px image's Nyquist frequency is 1/8 cycle per px of the 128-px image
    assert detail_energy(wave(0.06, axis=axis), 32, 32) < 0.01
    assert detail_energy(wave(0.3, axis=axis), 32, 32) > 0.99


def test_detail_of_white_noise_is_the_share_of_the_band() -> None:
    # the low band is a quarter of each axis: 1 - 1/16 of white noise lies above it
    assert detail_energy(noise(256, 256), 64, 64) == pytest.approx(15 / 16, abs=0.01)
    assert detail_energy(noise(255, 129), 255, 129) == pytest.approx(0.0, abs=0.02)


def test_detail_of_bicubic_upscaling_is_nearly_nil() -> None:
    low = some_image(64)
    assert detail_energy(low.resize((256, 256), Image.Resampling.BICUBIC), 64, 64) < 0.01


def test_detail_of_one_colour_is_zero() -> None:
    assert detail_energy(Image.new("RGB", (64, 64), (10, 200, 30)), 16, 16) == 0.0


# ------------------------------------------------------------------------------------------------------------ seam

BOXES = view_grid(Geometry(32, 8), 128, 128, 1.0).pixel_boxes


def test_seams_are_found_and_smooth_images_have_none() -> None:
    smooth = np.asarray(some_image(128, 3).filter(ImageFilter.GaussianBlur(3))).astype(np.float32)
    tiles = (np.indices((128, 128)) // 32).sum(axis=0) % 2 * 8.0
    assert seam_ratio(smooth, BOXES) == pytest.approx(1.0, abs=0.15)
    assert seam_ratio(smooth + tiles[:, :, None], BOXES) > 2.0


def test_the_border_of_an_image_that_wraps_is_a_border_of_views() -> None:
    boxes = view_grid(Geometry(32, 8), 128, 128, 0.5, (False, True)).pixel_boxes
    assert max(x1 for _, _, _, x1 in boxes) > 128
    across = np.arange(128) * 2 * np.pi / 128
    down = np.sin(np.arange(128) / 9)[:, None] * 30
    seamless = np.repeat((120 + 40 * np.cos(across) + 5 * np.cos(3 * across) + down)[:, :, None], 3, axis=2)
    small = seamless[::4, ::4]
    assert seam_ratio(seamless, boxes) < 1.1
    assert seam_worst(seamless, small, boxes) < 1
    ramp = seamless + np.linspace(-20, 20, 128)[None, :, None]  # smooth inside, with a step where it wraps
    assert seam_worst(ramp, small, boxes) > 20
    assert seam_worst(ramp, small, view_grid(Geometry(32, 8), 128, 128, 0.5).pixel_boxes) < 1
    for lines in (1, 16, 64):  # the place of the border does not matter
        moved = [(y0, (x0 + lines) % 128, y1, (x0 + lines) % 128 + 32) for y0, x0, y1, x1 in boxes]
        assert seam_worst(np.roll(ramp, lines, 1), np.roll(small, lines // 4, 1), moved) > 20
    two = view_grid(Geometry(128, 8), 128, 128, 0.5, (False, True)).pixel_boxes
    assert seam_ratio(ramp, two) > 2 * seam_ratio(seamless, two)


def test_seams_in_noise_are_not_invented() -> None:
    assert seam_ratio(noise(128, 128), BOXES) == pytest.approx(1.0, abs=0.1)


def test_a_contour_on_a_border_is_no_seam_unless_it_runs_all_along() -> None:
    values = np.full((128, 128, 3), 90.0)
    values[20:60, 32:] = 160.0  # an edge on the border at x = 32, a third of its length
    assert seam_ratio(values, BOXES) < 1.5
    # a tile step everywhere is a seam
    assert seam_ratio(values + (np.arange(128) // 32 % 2 * 6.0)[None, :, None], BOXES) > 2.0


def test_seam_without_inner_borders_is_one() -> None:
    assert seam_ratio(noise(32, 32), view_grid(Geometry(32, 8), 32, 32, 0.5).pixel_boxes) == 1.0


# ------------------------------------------------------------------------------------------------- hash, exposure


def test_phash_survives_resizing_and_compression_but_not_another_image(tmp_path) -> None:
    image = some_image(200)
    image.save(tmp_path / "a.jpg", quality=50)
    assert len(phash(image)) == 16
    assert distance(phash(image), phash(image.resize((90, 90)))) <= 4
    assert distance(phash(image), phash(Image.open(tmp_path / "a.jpg"))) <= 4
    assert distance(phash(image), phash(some_image(200, 5))) >= 12


def test_phash_of_a_cosine_sets_the_bit_of_its_frequency() -> None:
    x = np.arange(32)
    line = 128 + 90 * np.cos(np.pi * (2 * x + 1) * 3 / 64)  # the DCT-II basis function number 3 along x
    value = int(phash(np.repeat(np.broadcast_to(line, (32, 32))[:, :, None], 3, axis=2)), 16)
    assert value == (1 << 63) | (1 << (63 - 3))  # the mean, and frequency 3 of the first row


def test_phash_of_one_colour_is_stable() -> None:
    assert phash(Image.new("RGB", (50, 70), (9, 9, 9))) == phash(Image.new("RGB", (64, 64), (200, 10, 10)))


def test_exposure_counts_pure_pixels() -> None:
    values = np.full((10, 10, 3), 100.0)
    values[:2] = 0
    values[2:3] = 255
    values[3, 0] = (255, 255, 254)
    result = exposure(values)
    assert result.clipped == pytest.approx(0.3)
    assert result.luminance_mean == pytest.approx(luminance(values).mean(), rel=1e-6)
    assert exposure(np.full((3, 3, 3), 50.0)).luminance_std == pytest.approx(0.0, abs=1e-4)


def test_a_horizon_on_a_border_is_no_seam() -> None:
    values = np.asarray(some_image(128, 3).filter(ImageFilter.GaussianBlur(3))).astype(np.float32)
    values[64:] = 255 - values[64:]
    assert seam_ratio(values, BOXES) < 1.5


def test_a_decoders_grid_of_8_px_is_no_seam() -> None:
    values = np.asarray(some_image(128, 3).filter(ImageFilter.GaussianBlur(3))).astype(np.float32)
    grid = (np.indices((128, 128)) // 8).sum(axis=0) % 2 * 6.0
    assert seam_ratio(values + grid[:, :, None], BOXES) == pytest.approx(1.0, abs=0.15)
