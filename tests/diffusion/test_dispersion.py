import numpy as np
import torch
import torch.nn.functional as F

from resmaster_stages.diffusion.convolutions import Dilated, Dispersed
from resmaster_stages.diffusion.dispersion import dispersed_weight, dispersion_matrix


def by_differentiation(pixel_weight: float) -> np.ndarray:
    """R as the authors' program finds it: errors of both sets as functions of kernels and input, differentiated by the
    input, solved by normal equations. The derivative of a linear function is its value at a unit."""
    units = torch.eye(9, dtype=torch.float64).view(9, 1, 3, 3)  # inputs, and 3 x 3 kernels

    def enlarged(x):
        return F.interpolate(x, (5, 5), mode="bilinear", align_corners=True)

    large = torch.eye(25, dtype=torch.float64).view(25, 1, 5, 5)
    structure = (
        F.conv2d(enlarged(units), large, padding=2),
        enlarged(F.conv2d(units, units, padding=1).reshape(81, 1, 3, 3)),
    )
    pixel = F.conv2d(units, large, padding=2), F.conv2d(units, units, padding=1)
    left = [part.permute(0, 2, 3, 1).reshape(-1, 25).numpy() for part in (structure[0], pixel[0])]
    right = [part.reshape(9, 9, -1).permute(0, 2, 1).reshape(-1, 9).numpy() for part in (structure[1], pixel[1])]
    a, b = (np.concatenate([first, pixel_weight * second]) for first, second in (left, right))
    return np.linalg.solve(a.T @ a, a.T @ b)


def test_the_matrix_is_the_authors_solution():
    for weight in (0.05, 0.3):
        matrix = dispersion_matrix(weight)
        assert matrix.shape == (25, 9)
        assert np.abs(matrix - by_differentiation(weight)).max() < 1e-12
    assert np.abs(dispersion_matrix(0.05) - dispersion_matrix(0.3)).max() > 1e-3


def test_it_is_as_symmetric_as_the_kernel():
    matrix = dispersion_matrix().reshape(5, 5, 3, 3)
    assert np.allclose(matrix, matrix[::-1, :, ::-1, :])
    assert np.allclose(matrix, matrix.transpose(1, 0, 3, 2))


def test_a_dispersed_kernel_sees_an_enlarged_image_as_the_small_kernel_sees_the_image():
    torch.manual_seed(0)
    kernel, x = torch.randn(1, 1, 3, 3, dtype=torch.float64), torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    x[..., 3:6, 3:6] = torch.randn(3, 3)

    def enlarged(x):
        return F.interpolate(x, (17, 17), mode="bilinear", align_corners=True)

    wanted = enlarged(F.conv2d(x, kernel, padding=1))[..., 6:11, 6:11]
    spread, plain = (
        F.conv2d(enlarged(x), weight, padding=2)[..., 6:11, 6:11]
        for weight in (dispersed_weight(kernel), F.pad(kernel, (1,) * 4))
    )
    assert (spread - wanted).square().mean() < 0.5 * (plain - wanted).square().mean()


def test_dispersed_layers_keep_sizes_and_halve_the_dilation():
    torch.manual_seed(0)
    for stride in (1, 2):
        conv, x = torch.nn.Conv2d(3, 5, 3, stride=stride, padding=1), torch.randn(2, 3, 17, 24)
        weight = dispersed_weight(conv.weight)
        assert weight.shape == (5, 3, 5, 5)
        for factor in (2.0, 2.5, 3.0, 4.0):
            assert Dispersed(factor, weight)(conv, x).shape == conv(x).shape == Dilated(factor)(conv, x).shape
        by_hand = F.conv2d(x, weight, conv.bias, stride, padding=4, dilation=2)
        torch.testing.assert_close(Dispersed(4.0, weight)(conv, x), by_hand)
        assert Dispersed(4.0, weight) == Dispersed(4.0, weight.clone()) != Dispersed(2.0, weight)
