import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resmaster_stages.config.structure import StructureConfig
from resmaster_stages.diffusion.frequency import (
    cutoff_sigma,
    low_pass,
    low_pass_kernel,
    swap_low_frequencies,
    swap_weights,
)
from resmaster_stages.models.schedule import even_course


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
    torch.testing.assert_close(swap_low_frequencies(x0, reference, 1e4), reference, atol=1e-4, rtol=0)  # G = 1
    assert torch.equal(swap_low_frequencies(x0, reference, 0.2, weight=0.0), x0)
    nothing = swap_low_frequencies(x0 - x0.mean((2, 3), keepdim=True), torch.zeros_like(x0), 0.004)
    torch.testing.assert_close(nothing, x0 - x0.mean((2, 3), keepdim=True), atol=0.2, rtol=0)  # G = 0 but at DC


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.02, 3.0), st.floats(-3, 3))
def test_constant_images_are_preserved_at_any_size(height, width, sigma_f, value):
    x = torch.full((1, 2, height, width), value)
    torch.testing.assert_close(low_pass(x, sigma_f), x, atol=1e-5, rtol=1e-5)


def test_cutoff_counts_in_nyquist_frequencies_of_the_reference_or_of_the_canvas():
    assert cutoff_sigma(StructureConfig.model_validate({"preset": "lr_nyquist"}), 4) == pytest.approx(0.2)
    assert cutoff_sigma(StructureConfig.model_validate({"preset": "paper"}), 4) == pytest.approx(0.8)


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
    swapped = swap_low_frequencies(x0, reference, sigma_f, weight)
    inner = (..., slice(24, 40), slice(24, 40))
    torch.testing.assert_close(swapped[inner], expected[inner], atol=5e-3, rtol=0)
