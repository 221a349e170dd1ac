"""The wavelet transform against filters that are derived anew, and against a transform by loops."""

import numpy as np
import pytest
import torch

from resmaster_stages.diffusion.wavelets import LOW, Bands, high_taps, inverse, low_band, transform


def derived(chosen) -> np.ndarray:
    """The low-pass filter with four vanishing moments by spectral factorisation (Daubechies 1992, section 6.1).

    P(y) = 1 + 4 y + 10 y^2 + 20 y^3 with y = (2 - z - 1 / z) / 4 has three pairs of roots z, 1 / z. `chosen` picks one
    of each pair, and a double zero at -1 for each moment is added.
    """
    z = np.poly1d([1, 0])
    y = -np.poly1d([1, -2, 1])  # times 1 / (4 z)
    p = 64 * z**3 + 4 * 16 * y * z**2 + 10 * 4 * y**2 * z + 20 * y**3
    roots = chosen(sorted(p.roots, key=abs))
    taps = np.real(np.poly([*roots, -1, -1, -1, -1]))
    return taps * np.sqrt(2) / taps.sum()


def test_db4_has_the_roots_within_the_unit_circle():
    taps = derived(lambda roots: roots[:3])
    np.testing.assert_allclose(LOW["db4"][::-1], taps, atol=1e-10)


def test_sym4_has_its_complex_roots_on_the_other_side():
    """The least asymmetric choice: the real root within the unit circle, the complex pair outside, or mirrored."""

    def chosen(roots):
        real = [root for root in roots if abs(root.imag) < 1e-9]
        pair = [root for root in roots if abs(root.imag) >= 1e-9]
        return [min(real, key=abs), *sorted(pair, key=abs)[2:]]

    taps = derived(chosen)
    assert min(np.abs(np.array(LOW["sym4"]) - each).max() for each in (taps, taps[::-1])) < 1e-9


@pytest.mark.parametrize("wavelet", ["db4", "sym4"])
def test_filters_are_orthonormal_and_the_high_one_sees_no_cubic(wavelet):
    low, high = np.array(LOW[wavelet]), np.array(high_taps(LOW[wavelet]))
    for shift in range(4):
        width = 8 - 2 * shift
        assert low[:width] @ low[2 * shift :] == pytest.approx(float(shift == 0), abs=1e-10)
        assert high[:width] @ high[2 * shift :] == pytest.approx(float(shift == 0), abs=1e-10)
        assert low[:width] @ high[2 * shift :] == pytest.approx(0, abs=1e-10)
    for power in range(4):
        assert high @ np.arange(8.0) ** power == pytest.approx(0, abs=1e-7)


def test_the_high_filter_is_pywavelets():
    """`pywt.Wavelet("db4").dec_hi`, as published on wavelets.pybytes.com/wavelet/db4."""
    published = [-0.2303778133, 0.7148465706, -0.6308807679, -0.0279837694, 0.1870348117, 0.0308413818]
    assert high_taps(LOW["db4"])[:6] == pytest.approx(published, abs=1e-9)


def by_loops(values, taps):
    """The published definition, one value at a time, with half-sample symmetric borders."""
    n = len(values)
    mirror = [*values, *values[::-1]]
    return [sum(taps[j] * mirror[(2 * k + 1 - j) % (2 * n)] for j in range(8)) for k in range((n + 7) // 2)]


@pytest.mark.parametrize("wavelet", ["db4", "sym4"])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (9, 12), (5, 1), (2, 3), (33, 20)])
def test_the_transform_is_that_of_loops_over_rows_and_columns(wavelet, height, width):
    x = torch.randn(1, 1, height, width, dtype=torch.float64)
    filters = {"l": LOW[wavelet], "h": high_taps(LOW[wavelet])}
    bands = transform(x, wavelet)
    for across in "lh":
        rows = np.array([by_loops(row, filters[across]) for row in x[0, 0].tolist()])
        for down in "lh":
            expected = np.array([by_loops(col, filters[down]) for col in rows.T.tolist()]).T
            np.testing.assert_allclose(getattr(bands, down + across)[0, 0], expected, atol=1e-12)


def test_pinned_numbers_of_a_ramp():
    """1 ... 8 in db4: inside, the low band of a ramp is a ramp again, and the high band is nothing.

    The value at k is sqrt(2) times the ramp at the filter's centre of gravity, 2k + 1 - 6.0107 for db4.
    """
    bands = transform(torch.arange(1.0, 17.0, dtype=torch.float64).view(1, 1, 1, 16).expand(1, 1, 16, 16), "db4")
    low = bands.ll[0, 0, 5] / 2**0.5  # the columns are constant
    centre = sum(place * tap for place, tap in enumerate(LOW["db4"])) / 2**0.5
    expected = [2**0.5 * (1 + 2 * k + 1 - centre) for k in range(3, 8)]
    np.testing.assert_allclose(low[3:8], expected, atol=1e-9)
    np.testing.assert_allclose(bands.lh[0, 0, 5, 3:8], 0, atol=1e-9)


@pytest.mark.parametrize("wavelet", ["db4", "sym4"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 8), (16, 16), (31, 50)])
def test_the_inverse_is_exact(wavelet, height, width):
    x = torch.randn(2, 3, height, width)
    torch.testing.assert_close(inverse(transform(x, wavelet), wavelet), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wavelet", ["db4", "sym4"])
def test_bands_add_up_and_a_constant_is_low(wavelet):
    x = torch.randn(2, 3, 11, 14)
    bands = transform(x, wavelet)
    none = torch.zeros_like(bands.ll)
    high = inverse(Bands(none, bands.lh, bands.hl, bands.hh, bands.size), wavelet)
    torch.testing.assert_close(low_band(x, wavelet) + high, x, atol=1e-5, rtol=1e-5)
    flat = torch.full((1, 2, 11, 14), 3.0)
    torch.testing.assert_close(low_band(flat, wavelet), flat, atol=1e-5, rtol=1e-5)
    checkers = torch.ones(1, 1, 16, 16)
    checkers[..., ::2] = -1
    assert low_band(checkers, wavelet)[..., 4:12].abs().max() < 0.2
