from functools import partial
from math import cos, pi

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resmaster_stages.config.structure import StructureConfig
from resmaster_stages.diffusion.frequency import (
    block_means,
    butterworth,
    canvas_cutoff,
    low_pass,
    low_pass_kernel,
    low_pass_of,
    swap_low_frequencies,
    swap_weights,
)
from resmaster_stages.models.flow import flow_path
from resmaster_stages.models.schedule import even_course


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gaussian(sigma_f):
    return partial(low_pass, sigma_f=sigma_f)


def fft_mask(height, width, sigma_f):
    """G over the unshifted spectrum, [height, width]: FreeInit's Gaussian low-pass."""
    fy, fx = (torch.fft.fftfreq(size, dtype=torch.float64) * 2 for size in (height, width))
    return torch.exp(-(fy[:, None] ** 2 + fx[None, :] ** 2) / (2 * sigma_f**2))


def low_pass_fft(x, sigma_f):
    """`low_pass` in the Fourier domain: periodic instead of reflected at the borders."""
    mask = fft_mask(*x.shape[-2:], sigma_f)
    return torch.fft.ifft2(torch.fft.fft2(x.double()) * mask).real.to(x.dtype)


def test_mask_is_that_of_freeinit():
    height, width, cutoff = 16, 24, 0.25
    ours = torch.fft.fftshift(fft_mask(height, width, cutoff))
    for y, x in [(0, 0), (8, 12), (3, 20), (15, 1)]:
        squared = (2 * y / height - 1) ** 2 + (2 * x / width - 1) ** 2
        assert ours[y, x].item() == pytest.approx(torch.exp(torch.tensor(-squared / (2 * cutoff**2))).item(), rel=1e-5)


@pytest.mark.parametrize("sigma_f", [0.1, 0.2, 0.4, 0.8])
def test_blur_equals_fft_away_from_the_borders(sigma_f):
    x = noise(1, 4, 128, 128)
    inner = (slice(None), slice(None), slice(40, -40), slice(40, -40))
    torch.testing.assert_close(low_pass(x, sigma_f)[inner], low_pass_fft(x, sigma_f)[inner], atol=5e-3, rtol=0)


def test_narrow_filter_is_the_gaussian_blur_of_the_derivation():
    kernel = torch.tensor(low_pass_kernel(0.2), dtype=torch.float64)
    offsets = torch.arange(len(kernel), dtype=torch.float64) - len(kernel) // 2
    std = 1 / (torch.pi * 0.2)
    gaussian = torch.exp(-(offsets**2) / (2 * std**2))
    torch.testing.assert_close(kernel, gaussian / gaussian.sum(), atol=1e-4, rtol=0)


def test_limits_of_the_swap():
    x0, reference = noise(1, 4, 24, 20), noise(1, 4, 24, 20, seed=1)
    torch.testing.assert_close(
        swap_low_frequencies(x0, reference, gaussian(1e4)), reference, atol=1e-4, rtol=0
    )  # G = 1
    assert torch.equal(swap_low_frequencies(x0, reference, gaussian(0.2), weight=0.0), x0)
    nothing = swap_low_frequencies(x0 - x0.mean((2, 3), keepdim=True), torch.zeros_like(x0), gaussian(0.004))
    torch.testing.assert_close(nothing, x0 - x0.mean((2, 3), keepdim=True), atol=0.2, rtol=0)  # G = 0 but at DC


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.02, 3.0), st.floats(-3, 3))
def test_constant_images_are_preserved_at_any_size(height, width, sigma_f, value):
    x = torch.full((1, 2, height, width), value)
    torch.testing.assert_close(low_pass(x, sigma_f), x, atol=1e-5, rtol=1e-5)


def test_cutoff_counts_in_nyquist_frequencies_of_the_reference_or_of_the_canvas():
    assert canvas_cutoff(StructureConfig.model_validate({"preset": "lr_nyquist"}), 4) == pytest.approx(0.2)
    assert canvas_cutoff(StructureConfig.model_validate({"preset": "paper"}), 4) == pytest.approx(0.8)


def test_swap_weights_follow_their_window():
    assert swap_weights(StructureConfig(stop=1), even_course(4).done) == (1, 1, 1, 1)
    assert swap_weights(StructureConfig(), even_course(10).done) == (1,) * 6 + (0,) * 4
    assert swap_weights(StructureConfig(start=0.5, stop=1), even_course(4).done) == (0, 0, 1, 1)
    assert swap_weights(StructureConfig(weight="linear_decay", stop=1), even_course(4).done) == pytest.approx(
        (1, 0.75, 0.5, 0.25)
    )


@pytest.mark.parametrize("sigma_f", [0.2, 0.4, 0.8])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_swap_is_the_papers_formula_in_the_fourier_domain(sigma_f: float, weight: float) -> None:
    """Eq. 6 with a weight: IFFT(w G FFT(ref) + (1 - w G) FFT(x0)), away from the borders, where the FFT wraps
    around."""
    generator = torch.Generator().manual_seed(0)
    x0, reference = (torch.randn(1, 4, 64, 64, generator=generator) for _ in range(2))
    mask = weight * fft_mask(64, 64, sigma_f)
    spectrum = mask * torch.fft.fft2(reference.double()) + (1 - mask) * torch.fft.fft2(x0.double())
    expected = torch.fft.ifft2(spectrum).real.float()
    swapped = swap_low_frequencies(x0, reference, gaussian(sigma_f), weight)
    inner = (..., slice(24, 40), slice(24, 40))
    torch.testing.assert_close(swapped[inner], expected[inner], atol=5e-3, rtol=0)


def mirrored_fft(x, cutoff):
    """HiFlow's closed form 1 / (1 + (d / D)^8) in the Fourier domain, on the canvas beside its mirror images."""
    height, width = x.shape[-2:]
    tiled = torch.cat([x, x.flip(3)], dim=3).double()
    tiled = torch.cat([tiled, tiled.flip(2)], dim=2)
    fy, fx = (torch.fft.fftfreq(2 * size, dtype=torch.float64) * 2 for size in (height, width))
    distance = (fy[:, None] ** 2 + fx[None, :] ** 2) ** 0.5
    gain = 1 / (1 + (distance / cutoff) ** 8)
    return torch.fft.ifft2(torch.fft.fft2(tiled) * gain).real[..., :height, :width].to(x.dtype)


@pytest.mark.parametrize("cutoff", [0.05, 0.2, 0.4, 1.0])
@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 20), (1, 7)])
def test_butterworth_is_the_fourier_form_without_wrapping_around(height, width, cutoff):
    x = noise(2, 3, height, width)
    torch.testing.assert_close(butterworth(x, cutoff), mirrored_fft(x, cutoff), atol=2e-5, rtol=1e-4)


def test_butterworth_keeps_constants_and_halves_its_cutoff():
    constant = torch.full((1, 1, 24, 30), 0.7)
    torch.testing.assert_close(butterworth(constant, 0.05), constant, atol=1e-5, rtol=0)
    wave = torch.cos(0.25 * pi * (torch.arange(64) + 0.5)).expand(1, 1, 16, 64).contiguous()
    torch.testing.assert_close(butterworth(wave, 0.25), wave / 2, atol=1e-5, rtol=0)
    torch.testing.assert_close(butterworth(wave, 1e6), wave, atol=1e-5, rtol=0)  # all ones


def test_one_border_does_not_reach_the_other():
    x = torch.zeros(1, 1, 8, 64)
    x[..., 0] = 1.0
    for low in (partial(butterworth, cutoff=0.4), gaussian(0.4), block_means):
        assert low(x)[..., 0].abs().min() > 0.2
        assert low(x)[..., -1].abs().max() < 1e-2


def haar_low_band(x):
    """The analysis and synthesis of a Haar wavelet, with the three high bands set to zero."""
    height, width = x.shape[-2:]
    low = torch.zeros(height, height // 2), torch.zeros(width, width // 2)
    for matrix in low:
        for column in range(matrix.shape[1]):
            matrix[2 * column : 2 * column + 2, column] = 0.5**0.5
    down, across = low
    return down @ (down.T @ x @ across) @ across.T


def test_block_means_are_the_low_band_of_a_haar_wavelet():
    x = noise(2, 4, 12, 20)
    torch.testing.assert_close(block_means(x), haar_low_band(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(block_means(block_means(x)), block_means(x), atol=1e-6, rtol=1e-5)


def test_an_odd_canvas_has_cut_blocks_at_its_end():
    x = noise(1, 1, 3, 5)
    means = block_means(x)
    assert means.shape == x.shape
    assert means[0, 0, 2, 4] == x[0, 0, 2, 4]
    torch.testing.assert_close(means[0, 0, 2, 0], x[0, 0, 2, :2].mean())
    torch.testing.assert_close(means[0, 0, 1, 4], x[0, 0, :2, 4].mean())


def test_the_swap_by_haar_takes_the_low_band_and_leaves_the_high_bands():
    """I-Max: DWT of both, the low band from the reference, inverse DWT."""
    x0, reference = noise(1, 4, 16, 24), noise(1, 4, 16, 24, seed=1)
    swapped = swap_low_frequencies(x0, reference, low_pass_of(StructureConfig(filter="haar"), 4))
    torch.testing.assert_close(haar_low_band(swapped), haar_low_band(reference), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(swapped - haar_low_band(swapped), x0 - haar_low_band(x0), atol=1e-5, rtol=1e-4)


def test_the_configuration_names_the_filter_and_its_cutoff():
    x = noise(1, 2, 16, 16)
    hiflow = StructureConfig.model_validate({"preset": "hiflow"})
    assert torch.equal(low_pass_of(hiflow, 4)(x), butterworth(x, 0.2))
    own = StructureConfig.model_validate({"preset": "hiflow", "cutoff": 0.8, "cutoff_units": "lr_nyquist"})
    assert torch.equal(low_pass_of(own, 4)(x), butterworth(x, 0.2))
    assert torch.equal(low_pass_of(StructureConfig(), 4)(x), low_pass(x, 0.8))
    assert torch.equal(low_pass_of(StructureConfig.model_validate({"preset": "imax"}), 4)(x), block_means(x))


def flow_course(count):
    """Fractions of a path whose steps are moved towards noise, as FLUX's are: they are not even."""
    even = [1 - index / count for index in range(count)]
    return tuple(step.done for step in flow_path([*(3 * t / (1 + 2 * t) for t in even), 0.0]))


@pytest.mark.parametrize("course", [even_course(30).done, flow_course(30)], ids=["even", "flow"])
def test_decays_are_those_of_the_papers_on_any_path(course):
    """I-Max: (1 + cos(pi i / n)) / 2. HiFlow: alpha (1 - i / n)."""
    imax = StructureConfig.model_validate({"preset": "imax"})
    assert swap_weights(imax, course) == pytest.approx([(1 + cos(pi * i / 30)) / 2 for i in range(30)])
    hiflow = StructureConfig.model_validate({"preset": "hiflow", "strength": 0.25})
    assert swap_weights(hiflow, course) == pytest.approx([0.25 * (1 - i / 30) for i in range(30)])


def test_on_a_flow_path_the_steps_of_the_window_decay():
    course = flow_course(20)
    inside = [0.3 <= done < 0.8 for done in course]
    weights = swap_weights(StructureConfig(start=0.3, stop=0.8, weight="linear_decay"), course)
    assert [weight > 0 for weight in weights] == inside
    count = sum(inside)
    assert [weight for weight in weights if weight] == pytest.approx([1 - i / count for i in range(count)])
