"""An enlarged image with the colours of its low-res image: closed forms, and a plain à trous wavelet."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from resmaster_stages.config.method import ColourMatch
from resmaster_stages.diffusion.colour_match import REACH_PX, colour_matched
from resmaster_stages.diffusion.reference import to_image, upsample

WAYS: tuple[ColourMatch, ...] = ("mean_std", "wavelet")


def noise_image(height: int, width: int, low: int = 60, high: int = 190, seed: int = 0) -> Image.Image:
    """Coarse colours with some grain, far from black and white."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(low, high, (3, 4, 3), dtype=np.uint8)).resize((width, height))
    grain = draw.integers(-12, 13, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + grain).clip(low - 15, high + 15).astype(np.uint8))


def large(image: Image.Image, scale: int) -> Image.Image:
    return to_image(upsample(image, image.height * scale, image.width * scale)[0])


def values(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image, dtype=np.float64)


def changed(image: Image.Image, change: NDArray[np.float64] | float) -> Image.Image:
    return Image.fromarray((values(image) + change).clip(0, 255).round().astype(np.uint8))


def a_trous(x: NDArray[np.float64], levels: int) -> NDArray[np.float64]:
    """The low band of [H, W], level by level: taps (1, 2, 1) / 4 along both axes, 1, 2, 4, ... px apart.

    The image is mirrored at its borders so far that nothing reads beyond."""
    pad = 2**levels
    y = np.pad(x, pad, mode="symmetric")
    for level in range(levels):
        for axis in (0, 1):
            y = (np.roll(y, 2**level, axis) + 2 * y + np.roll(y, -(2**level), axis)) / 4
    return y[pad:-pad, pad:-pad]


def test_none_is_the_image_itself() -> None:
    image, low = noise_image(32, 48), noise_image(8, 12, seed=1)
    assert colour_matched(image, low, "none") is image


@pytest.mark.parametrize("how", WAYS)
def test_an_image_that_is_the_enlarged_low_res_image_stays(how: ColourMatch) -> None:
    low = noise_image(24, 20)
    image = large(low, 4)
    difference = np.abs(values(colour_matched(image, low, how)) - values(image))
    if how == "wavelet":
        assert difference.max() <= 1
    else:  # enlarging flattens grain, and the low-res image's deviation is given back
        assert difference.mean() < 4


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("shift", [(9, -14, 5), (-20, -20, -20)])
def test_a_shift_of_the_colours_is_undone(how: ColourMatch, shift: tuple[int, int, int]) -> None:
    low = noise_image(24, 20)
    image = large(low, 4)
    true = values(colour_matched(image, low, how))
    undone = values(colour_matched(changed(image, np.array(shift)), low, how))
    assert np.abs(undone - true).max() <= 1
    assert np.abs(values(changed(image, np.array(shift))) - true).max() >= 5


def test_mean_and_deviation_become_those_of_the_low_res_image() -> None:
    low = noise_image(31, 17, seed=4)
    dull = changed(noise_image(64, 64, seed=5), 0).point(lambda value: value * 0.6 + 70)
    matched, wanted = values(colour_matched(dull, low, "mean_std")), values(low)
    assert np.abs(matched.mean((0, 1)) - wanted.mean((0, 1))).max() < 0.5
    assert np.abs(matched.std((0, 1)) - wanted.std((0, 1))).max() < 0.5
    assert np.abs(values(dull).std((0, 1)) - wanted.std((0, 1))).min() > 3


def test_an_even_image_gets_the_mean_alone() -> None:
    even = Image.new("RGB", (64, 64), (3, 250, 77))
    matched = colour_matched(even, noise_image(16, 16), "mean_std")
    assert len(matched.getcolors() or ()) == 1
    assert np.abs(values(matched)[0, 0] - values(noise_image(16, 16)).mean((0, 1))).max() <= 0.5


@pytest.mark.parametrize(("scale", "levels"), [(2, 4), (4, 5)])
def test_wavelet_is_an_a_trous_wavelet_whose_levels_grow_with_the_scale(scale: int, levels: int) -> None:
    low = noise_image(26, 22, seed=2)
    image = noise_image(26 * scale, 22 * scale, seed=3)
    assert REACH_PX * scale == 2**levels
    reference = (upsample(low, *values(image).shape[:2])[0].numpy().transpose(1, 2, 0) + 1) * 127.5
    expected = np.empty(values(image).shape)
    for channel in range(3):
        own = values(image)[..., channel]
        high = own - a_trous(own, levels)
        expected[..., channel] = high + a_trous(reference[..., channel].astype(np.float64), levels)
    matched = values(colour_matched(image, low, "wavelet"))
    assert np.abs(matched - expected.clip(0, 255)).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("period", [2, 4, 8, 16, 32])
def test_wavelet_keeps_detail_as_it_is(period: int) -> None:
    """Stripes of these periods have no part in the low band of five levels."""
    low = noise_image(32, 32, low=90, high=160)
    plain = large(low, 4)
    stripes = 20.0 * np.sign(np.sin((np.arange(128) + 0.5) * 2 * np.pi / period))
    striped = changed(plain, stripes[None, :, None])
    matched = values(colour_matched(changed(striped, np.array((10, -10, 4))), low, "wavelet", (False, True)))
    bare = values(colour_matched(plain, low, "wavelet", (False, True)))
    assert np.abs(matched - bare - stripes[None, :, None]).max() <= 1


def test_wavelet_undoes_a_drift_from_place_to_place() -> None:
    low = noise_image(64, 64)
    image = large(low, 4)
    drift = np.linspace(-25, 25, 256)[None, :, None]
    drifted = changed(image, drift)
    inside = slice(40, -40)  # at the borders the mirror image bends the drift
    left = np.abs(values(colour_matched(drifted, low, "wavelet")) - values(image))
    assert left[:, inside].max() <= 1
    assert left.mean() < 1.5
    assert np.abs(values(colour_matched(drifted, low, "mean_std")) - values(image)).mean() > 5


@pytest.mark.parametrize("wraps", [(False, True), (True, False), (True, True)])
def test_an_image_that_wraps_has_no_border_for_the_wavelet(wraps: tuple[bool, bool]) -> None:
    """Shifting low-res image and image along an axis that wraps shifts the result."""
    low, image = noise_image(12, 20), noise_image(48, 80, seed=7)
    down, across = 3 * wraps[0], 7 * wraps[1]
    shifted = Image.fromarray(np.roll(np.asarray(image), (4 * down, 4 * across), (0, 1)))
    low_shifted = Image.fromarray(np.roll(np.asarray(low), (down, across), (0, 1)))
    matched = np.asarray(colour_matched(image, low, "wavelet", wraps)).astype(int)
    again = np.asarray(colour_matched(shifted, low_shifted, "wavelet", wraps)).astype(int)
    assert np.abs(np.roll(matched, (4 * down, 4 * across), (0, 1)) - again).max() <= 1
    plain = np.asarray(colour_matched(image, low, "wavelet")).astype(int)
    assert np.abs(plain - matched).max() > 1


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (3, 5)])
@pytest.mark.parametrize("wraps", [(False, False), (True, True)])
def test_tiny_images(how: ColourMatch, size: tuple[int, int], wraps: tuple[bool, bool]) -> None:
    low = Image.new("RGB", size, (40, 90, 200))
    image = Image.new("RGB", (size[0] * 4, size[1] * 4), (60, 70, 220))
    matched = colour_matched(image, low, how, wraps)
    assert matched.getcolors() == [(size[0] * size[1] * 16, (40, 90, 200))]


@pytest.mark.parametrize("how", WAYS)
def test_values_beyond_black_and_white_are_cut_off(how: ColourMatch) -> None:
    low = Image.new("RGB", (16, 16), (250, 5, 128))
    image = changed(Image.new("RGB", (64, 64), (100, 100, 128)), 0)
    pixels = np.array(image)
    pixels[::2] += 40
    matched = np.asarray(colour_matched(Image.fromarray(pixels), low, how))
    assert matched[..., 0].max() == 255 if how == "wavelet" else matched[..., 0].max() == 250
    assert (matched[..., 1] < 60).all()


@pytest.mark.parametrize("how", WAYS)
def test_grey_low_res_images_are_read(how: ColourMatch) -> None:
    matched = colour_matched(noise_image(64, 64), Image.new("L", (16, 16), 120), how)
    assert np.abs(values(matched).mean((0, 1)) - 120).max() < 1
