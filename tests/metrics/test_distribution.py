"""Metrics of sets of images, each against a closed form or an independent float64 computation."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.linalg import sqrtm

from resmaster_stages.metrics.crops import CROPS_PER_IMAGE, crop_boxes, crops
from resmaster_stages.metrics.fid import FeatureStatistics, frechet_distance, merged
from resmaster_stages.metrics.inception_score import inception_score
from resmaster_stages.metrics.kid import kid, mmd2
from resmaster_stages.metrics.repeats import mentions, repeated_objects, surplus


def draw(n: int, d: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + shift


def with_moments(mean: np.ndarray, covariance: np.ndarray, seed: int) -> np.ndarray:
    """Features whose sample mean and covariance are exactly these."""
    x = draw(200, len(mean), seed)
    x = x - x.mean(axis=0)
    whitened = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return whitened @ np.linalg.cholesky(covariance).T + mean


# ------------------------------------------------------------------------------------------------------------- FID


def test_fid_is_scipys_to_eleven_digits_where_scipy_can() -> None:
    x, y = draw(300, 24, 1), draw(250, 24, 2, shift=0.5)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y)) == pytest.approx(expected, rel=1e-11)


def test_fid_of_known_gaussians() -> None:
    """Commuting covariances: |mean difference|^2 + sum (sqrt a - sqrt b)^2."""
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 0.25, 9.0])
    x, y = with_moments(np.array([1.0, 0, 0]), np.diag(a), 1), with_moments(np.array([0, 2.0, 0]), np.diag(b), 2)
    expected = 1 + 4 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y)) == pytest.approx(expected, rel=1e-12)


def test_fid_with_fewer_samples_than_dimensions_needs_no_regularisation() -> None:
    """A copy that is k times as large: tr(A) (1 - k)^2, though the covariance has rank 9 of 64."""
    x = draw(10, 64)
    x -= x.mean(axis=0)
    a = FeatureStatistics.of(x)
    expected = 0.25 * np.trace(np.cov(x, rowvar=False))
    assert frechet_distance(a, FeatureStatistics.of(1.5 * x)) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(a, FeatureStatistics.of(x)) <= 1e-11 * np.trace(a.covariance)


def test_fid_is_symmetric_and_zero_of_constants() -> None:
    a, b = FeatureStatistics.of(draw(40, 8, 1)), FeatureStatistics.of(draw(5, 8, 2, 1.0))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    one, two = FeatureStatistics.of(np.ones((3, 4))), FeatureStatistics.of(np.full((2, 4), 3.0))
    assert frechet_distance(one, two) == 16.0


@settings(max_examples=20)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_statistics_merge_in_any_order_to_those_of_the_union(sizes: list[int], order: object) -> None:
    x = draw(sum(sizes), 5) + 1e4  # sums of squares would lose digits here
    parts = [FeatureStatistics.of(part) for part in np.split(x, np.cumsum(sizes)[:-1])]
    order.shuffle(parts)  # type: ignore[attr-defined]
    got, all_of = merged(parts), FeatureStatistics.of(x)
    assert got.n == len(x)
    assert got.mean == pytest.approx(all_of.mean, rel=1e-14)
    assert np.abs(got.scatter - all_of.scatter).max() <= 1e-10 * max(1.0, all_of.scatter.max())
    if len(x) > 1:
        assert np.abs(got.covariance - np.cov(x, rowvar=False)).max() <= 1e-10 * max(1.0, all_of.scatter.max())


def test_statistics_refuse_what_has_none() -> None:
    with pytest.raises(ValueError, match="finite"):
        FeatureStatistics.of(np.array([[np.nan, 1.0]]))
    with pytest.raises(ValueError, match="shape"):
        FeatureStatistics.of(np.zeros(3))
    with pytest.raises(ValueError, match="at least 2"):
        _ = FeatureStatistics.of(np.zeros((1, 3))).covariance
    with pytest.raises(ValueError, match="one dimension"):
        FeatureStatistics.of(np.zeros((2, 3))).merge(FeatureStatistics.of(np.zeros((2, 4))))
    with pytest.raises(ValueError, match="no statistics"):
        merged([])
    crops_of_images = draw(6, 4).reshape(2, 3, 4)
    assert FeatureStatistics.of(crops_of_images).n == 6


# ------------------------------------------------------------------------------------------------------------- KID


def kernel(a: np.ndarray, b: np.ndarray) -> float:
    return (float(np.dot(a, b)) / len(a) + 1) ** 3


def test_kid_is_the_brute_force_sum_to_twelve_digits() -> None:
    x, y = draw(7, 5, 1), draw(9, 5, 2, 0.3)
    within_x = np.mean([kernel(a, b) for a, b in itertools.permutations(x, 2)])
    within_y = np.mean([kernel(a, b) for a, b in itertools.permutations(y, 2)])
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert mmd2(x, y) == pytest.approx(within_x + within_y - 2 * across, rel=1e-12)
    assert kid(x, y).value == mmd2(x, y)


def test_pairs_within_an_image_are_left_out() -> None:
    x, y = draw(12, 4, 1).reshape(4, 3, 4), draw(6, 4, 2).reshape(3, 2, 4)

    def within(images: np.ndarray) -> float:
        return float(np.mean([kernel(a, b) for i, j in itertools.permutations(images, 2) for a in i for b in j]))

    across = np.mean([kernel(a, b) for a in x.reshape(-1, 4) for b in y.reshape(-1, 4)])
    assert mmd2(x, y) == pytest.approx(within(x) + within(y) - 2 * across, rel=1e-12)


def test_kid_is_unbiased_and_its_interval_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of one distribution: the mean over repetitions is 0 within 4 standard errors. Of two with different means,
    the interval holds the true value about 95 times of 100."""
    rng = np.random.default_rng(3)
    alike = [mmd2(rng.standard_normal((8, 3)), rng.standard_normal((12, 3))) for _ in range(400)]
    assert abs(np.mean(alike)) < 4 * np.std(alike) / 20
    big = np.random.default_rng(4)
    truth = mmd2(big.standard_normal((4000, 3)), big.standard_normal((4000, 3)) + 1)
    hits = 0
    monkeypatch.setattr("resmaster_stages.metrics.kid.SUBSETS", 40)
    for _ in range(100):
        found = kid(rng.standard_normal((40, 3)), rng.standard_normal((40, 3)) + 1)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= truth <= found.high
    assert 85 <= hits <= 100


def test_kid_is_seeded_and_of_two_images_has_no_interval() -> None:
    x, y = draw(20, 4, 1), draw(30, 4, 2)
    assert kid(x, y) == kid(x, y)
    two = kid(x[:2], y)
    assert (two.low, two.high) == (None, None)
    assert math.isfinite(two.value)
    with pytest.raises(ValueError, match="at least 2 images"):
        kid(x[:1], y)


# -------------------------------------------------------------------------------------------------- inception score


def test_inception_score_in_closed_form() -> None:
    assert inception_score(np.tile(np.eye(5), (4, 1)), splits=4) == pytest.approx((5.0, 0.0), rel=1e-12)
    assert inception_score(np.full((6, 3), 1 / 3), splits=2) == pytest.approx((1.0, 0.0), rel=1e-12)
    p = np.array([[0.9, 0.1], [0.2, 0.8]])
    marginal = p.mean(axis=0)
    expected = math.exp(sum(q * math.log(q / m) for row in p for q, m in zip(row, marginal)) / 2)
    assert inception_score(p, splits=1) == pytest.approx((expected, 0.0), rel=1e-12)
    half = inception_score(p.astype(np.float16), splits=1)[0]
    assert half == pytest.approx(expected, rel=1e-3)
    for bad, splits in ((p * 2, 1), (p, 3), (-p, 1)):
        with pytest.raises(ValueError, match=r"probabilities|splits"):
            inception_score(bad, splits)


# ----------------------------------------------------------------------------------------------------------- crops


@settings(max_examples=50)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 200))
def test_crops_lie_inside_and_are_square(height: int, width: int, size: int) -> None:
    boxes = crop_boxes("ab" * 12, height, width, size)
    assert len(boxes) == CROPS_PER_IMAGE
    for y0, x0, y1, x1 in boxes:
        assert 0 <= y0 < y1 <= height
        assert 0 <= x0 < x1 <= width
        assert y1 - y0 == x1 - x0 == min(size, height, width)


def test_crops_are_those_of_the_key_for_ever() -> None:
    assert crop_boxes("00" * 12, 512, 512, 128)[:2] == FROZEN
    assert crop_boxes("00" * 12, 512, 512, 128) != crop_boxes("01" * 12, 512, 512, 128)
    large = crop_boxes("00" * 12, 4 * 512, 4 * 512, 4 * 128)
    small = crop_boxes("00" * 12, 512, 512, 128)
    for a, b in zip(large, small):
        assert all(abs(p / 4 - q) <= 1 for p, q in zip(a, b)), "the same places at any size"
    image = Image.new("RGB", (64, 64))
    image.putpixel((5, 9), (255, 0, 0))
    (cut,) = crops(image, [(9, 5, 17, 13)])
    assert cut.size == (8, 8)
    assert cut.getpixel((0, 0)) == (255, 0, 0)


FROZEN = [(48, 43, 176, 171), (89, 61, 217, 189)]


def test_crops_are_spread_over_the_image() -> None:
    boxes = [box for n in range(200) for box in crop_boxes(f"{n:024x}", 100, 100, 10)]
    centres = np.array([(y0, x0) for y0, x0, _, _ in boxes])
    assert centres.min() == 0
    assert centres.max() == 90
    assert centres.mean(axis=0) == pytest.approx([45, 45], abs=2.5)


# --------------------------------------------------------------------------------------------------------- repeats


def test_sentences_are_counted() -> None:
    nouns = ("house", "tree", "boat")
    assert mentions("a red brick house, a house and two small trees", nouns) == {"house": 2, "tree": 2}
    assert mentions("boats at sunset with 3 houses", nouns) == {"boat": 2, "house": 3}
    assert mentions("two boats and a house", nouns) == {"boat": 2, "house": 1}
    assert mentions("a treehouse", nouns) == {}


def test_only_what_the_prompt_names_can_be_repeated() -> None:
    assert surplus({"house": 4, "bird": 9}, {"house": 1}) == 3
    assert surplus({}, {"house": 1}) == 0
    seen: list[str] = []

    def look(image: str) -> Counter[str]:
        seen.append(image)
        return mentions(image, ("house", "tree"))

    wanted = [{"house": 1}, {"house": 1}, {}, {"tree": 2}]
    found = repeated_objects(zip(["three houses", "a house", "a tree", "two trees"], wanted), look)
    assert (found.rate, found.surplus, found.images) == (1 / 3, 2 / 3, 3)
    assert seen == ["three houses", "a house", "two trees"]
    assert repeated_objects([], look).images == 0
