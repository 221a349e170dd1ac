import numpy as np
import torch
from scipy import ndimage

from resmaster_stages.diffusion.edges import _connected, canny


def grey(values: torch.Tensor) -> torch.Tensor:
    """8-bit grey values [H, W] as an image [1, 3, H, W] in [-1, 1]."""
    return (values / 127.5 - 1).expand(1, 3, *values.shape)


def test_a_step_is_one_line_and_flat_areas_have_none():
    values = torch.zeros(12, 16)
    values[:, 8:] = 200.0
    edges = canny(grey(values))
    assert edges.shape == (1, 1, 12, 16)
    assert edges[0, 0].sum(1).tolist() == [1.0] * 12  # one place per row
    assert set(edges.nonzero()[:, 3].tolist()) <= {7, 8}
    assert canny(grey(torch.full((9, 9), 77.0))).sum() == 0
    assert torch.equal(canny(grey(values.T)), edges.transpose(2, 3))
    assert torch.equal(canny(grey(values.flip(1))).sum(), edges.sum())


def test_a_diagonal_is_found_and_thresholds_are_sizes_of_the_gradient():
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    edges = canny(grey((x > y) * 255.0))
    found = edges[0, 0].nonzero()
    assert len(found) >= 18
    assert ((found[:, 0] - found[:, 1]).abs() <= 1).all()
    weak = torch.zeros(10, 10)
    weak[:, 5:] = 30.0  # a step of s has a gradient of 4 s: 120
    assert canny(grey(weak), 100, 200).sum() == 0
    assert canny(grey(weak), 100, 119).sum() == 10


def test_a_weak_edge_stays_where_it_touches_a_strong_one():
    values = torch.zeros(20, 20)
    values[:10, 10:] = 60.0  # 240
    values[10:, 10:] = 35.0  # 140, connected to the strong edge
    values[:, :2] = 35.0  # 140, alone
    columns = canny(grey(values))[0, 0].sum(0)
    assert columns[8:12].sum() >= 19
    assert columns[:4].sum() == 0


def test_weak_ridges_count_where_they_touch_a_strong_one():
    """As the labelled groups of weak places that hold a strong one."""
    ridge = np.random.default_rng(0).choice([0.0, 120.0, 250.0], (60, 80), p=[0.58, 0.418, 0.002]).astype(np.float32)
    groups, count = ndimage.label(ridge > 100, structure=np.ones((3, 3)))
    strong = np.unique(groups[ridge > 200])
    assert 0 < len(strong) < count
    assert np.array_equal(_connected(ridge, 100, 200).numpy(), np.isin(groups, strong) & (groups > 0))
