"""Enlarged images that are sharpened."""

import numpy as np
import pytest
import torch

from resmaster_stages.diffusion.reference import sharpened


@pytest.mark.parametrize("amount", [0.5, 1.0])
def test_sharpening_adds_what_a_blur_of_three_removes(amount):
    """y = x + a (x - blur(x)), one value at a time, with mirrored borders."""
    images, sigmas = torch.randn(2, 3, 5, 7, dtype=torch.float64), torch.tensor([0.4, 1.7])
    made = sharpened(images, amount, sigmas)
    for number, sigma in enumerate(sigmas.tolist()):
        taps = np.exp(-0.5 * np.array([-1, 0, 1]) ** 2 / sigma**2)
        taps /= taps.sum()
        for channel in range(3):
            image = np.pad(images[number, channel].numpy(), 1, mode="reflect")
            for y in range(5):
                for x in range(7):
                    blurred = taps @ image[y : y + 3, x : x + 3] @ taps
                    expected = (1 + amount) * image[y + 1, x + 1] - amount * blurred
                    assert float(made[number, channel, y, x]) == pytest.approx(expected, abs=1e-6)


def test_nothing_is_sharpened_by_nothing_and_flat_images_stay():
    images = torch.randn(1, 3, 6, 6)
    assert torch.equal(sharpened(images, 0.0, torch.tensor([1.0])), images)
    flat = torch.full((1, 3, 6, 6), 0.3)
    torch.testing.assert_close(sharpened(flat, 2.0, torch.tensor([1.0])), flat)
