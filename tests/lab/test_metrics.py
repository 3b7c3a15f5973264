"""The metrics against scipy, against closed forms and on cases with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lab import metrics
from lab.metrics import Moments


def normal(count: int, size: int, *, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    values = torch.randn(count, size, generator=generator, dtype=torch.float64)
    return scale * values @ mixing + shift


def frechet_by_scipy(a: Tensor, b: Tensor) -> float:
    linalg = pytest.importorskip("scipy.linalg")
    x, y = a.numpy(), b.numpy()
    c, d = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(c @ d).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c + d - 2 * root))


@pytest.mark.parametrize(("size", "scale", "shift"), [(1, 2.0, 0.5), (5, 1.3, 0.0), (24, 0.5, 0.1)])
def test_frechet_distance_is_that_of_scipy(size: int, scale: float, shift: float) -> None:
    a, b = normal(400, size, seed=1), normal(300, size, seed=2, scale=scale, shift=shift)
    expected = (
        frechet_by_scipy(a, b) if size > 1 else (a.mean() - b.mean()).item() ** 2 + (a.std() - b.std()).item() ** 2
    )
    assert metrics.frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_a_shift_is_its_square() -> None:
    a = Moments.of(normal(200, 6, seed=3))
    b = Moments.of(normal(200, 6, seed=3) + 2)
    assert metrics.frechet_distance(a, b) == pytest.approx(6 * 4, rel=1e-10)


def test_frechet_distance_of_a_set_to_itself_is_zero_even_if_singular() -> None:
    few = Moments.of(normal(5, 12, seed=4))
    assert metrics.frechet_distance(few, few) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_singular_covariances() -> None:
    """Two lines at right angles: the covariances share nothing, so the root vanishes."""
    line = torch.linspace(-1, 1, 50, dtype=torch.float64)
    zero = torch.zeros_like(line)
    a, b = torch.stack((line, zero), dim=1), torch.stack((zero, 3 * line), dim=1)
    expected = line.var().item() * (1 + 9)
    assert metrics.frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_frechet_distance_is_symmetric_and_not_negative(seed: int, size: int) -> None:
    a, b = Moments.of(normal(20, size, seed=seed)), Moments.of(normal(30, size, seed=seed + 1, scale=0.7))
    forward, backward = metrics.frechet_distance(a, b), metrics.frechet_distance(b, a)
    assert forward == pytest.approx(backward, rel=1e-6, abs=1e-8)
    assert forward >= 0


def test_moments_add_up() -> None:
    features = normal(90, 4, seed=5) + 100
    parts = [Moments.of(part) for part in torch.split(features, 25)]
    total, left = metrics.sum_moments(parts), metrics.sum_moments(parts) - parts[0]
    torch.testing.assert_close(total.mean, features.mean(dim=0))
    torch.testing.assert_close(total.covariance, features.T.cov(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(left.covariance, features[25:].T.cov(), rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="two samples"):
        _ = Moments.of(features[:1]).covariance
    with pytest.raises(ValueError, match="no groups"):
        metrics.sum_moments([])


def test_precision_and_recall_of_known_sets() -> None:
    real = torch.arange(100.0)[:, None]
    on_real, on_generated = metrics.precision_recall(real, real[:50] + 0.25)
    assert on_real.all()
    assert on_generated.double().mean().item() == pytest.approx(0.5, abs=0.05)
    far, none = metrics.precision_recall(real, real + 1000)
    assert not far.any()
    assert not none.any()


def test_precision_and_recall_against_the_definition() -> None:
    real, generated = normal(60, 3, seed=6), normal(40, 3, seed=7, scale=1.5)

    def covered(points: Tensor, centres: Tensor) -> list[bool]:
        radii = [sorted((centre - other).norm().item() for other in centres)[3] for centre in centres]
        return [
            any((point - centre).norm().item() <= radius for centre, radius in zip(centres, radii, strict=True))
            for point in points
        ]

    for chunk in (7, 512):
        precision, recall = metrics.precision_recall(real, generated, chunk=chunk)
        assert precision.tolist() == covered(generated, real)
        assert recall.tolist() == covered(real, generated)
    with pytest.raises(ValueError, match="more than 3 samples"):
        metrics.precision_recall(real[:3], generated)


def test_t_quantile() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 4, 9, 15, 16, 19, 30, 99):
        assert metrics.t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=2e-3)
    with pytest.raises(ValueError, match="two groups"):
        metrics.t_quantile(0)


def test_jackknife_of_a_mean_is_the_textbook_interval() -> None:
    values = [torch.tensor([float(x)]) for x in (3, 1, 4, 1, 5, 9)]
    estimate = metrics.mean_estimate(values)
    numbers = torch.cat(values)
    assert estimate.value == pytest.approx(numbers.mean().item())
    assert estimate.margin == pytest.approx(2.571 * numbers.std().item() / math.sqrt(6), rel=1e-5)
    assert estimate.low < estimate.value < estimate.high


def covered(intervals: list[tuple[float, float, float]]) -> float:
    """How often ``(value, low, high)`` holds the mean of all values, which is that of so many samples' distances."""
    mean = sum(value for value, _, _ in intervals) / len(intervals)
    return sum(low <= mean <= high for _, low, high in intervals) / len(intervals)


@pytest.mark.parametrize(("size", "shift"), [(3, 0.5), (48, 0.0)])
def test_frechet_interval_covers_as_often_as_it_says(size: int, shift: float) -> None:
    """Also where most of the distance is the bias of few samples in many dimensions."""
    real = Moments.of(normal(20_000, size, seed=8))
    estimates = [
        metrics.frechet_estimate(
            real, [Moments.of(part) for part in torch.split(normal(500, size, seed=100 + trial, shift=shift), 50)]
        )
        for trial in range(100)
    ]
    assert 0.9 <= covered([(found.value, found.low, found.high) for found in estimates]) <= 1


def test_what_a_group_has_in_common_with_its_own_drawn_pictures_cancels() -> None:
    """Groups that differ in what they show, as captions do: the interval still covers, and is far narrower."""
    size, found, of_any = 4, [], []
    everything = Moments.of(normal(20_000, size, seed=12) + normal(20_000, size, seed=13, scale=2))
    for trial in range(100):
        shown = normal(20, size, seed=300 + trial, scale=2)
        groups = [Moments.of(normal(20, size, seed=50 * trial + 7000 + i) + row + 0.5) for i, row in enumerate(shown)]
        own = [Moments.of(normal(400, size, seed=50 * trial + 20_000 + i) + row) for i, row in enumerate(shown)]
        found.append(metrics.frechet_estimate(own, groups))
        of_any.append(metrics.frechet_estimate(everything, groups))
    assert 0.88 <= covered([(each.value, each.low, each.high) for each in found]) <= 1
    assert sum(each.margin for each in found) < 0.5 * sum(each.margin for each in of_any)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_interval_of_a_change_covers_as_often_as_it_says(share: float) -> None:
    """Of samples that share all of their noise with the baseline's, or a part of it."""
    size = 8
    real = Moments.of(normal(20_000, size, seed=10))
    changes = []
    for trial in range(100):
        first = normal(400, size, seed=200 + trial)
        second = share * first + math.sqrt(1 - share**2) * normal(400, size, seed=5000 + trial)
        baseline, better = (
            [Moments.of(part + shift) for part in torch.split(values, 40)]
            for values, shift in ((first, 0.5), (second, 0.3))
        )
        changes.append(metrics.relative_change(real, baseline, better))
    assert all(-1 < change.low < change.value < change.high for change in changes)
    assert covered([(change.value, change.low, change.high) for change in changes]) >= 0.88
    separate = metrics.frechet_estimate(real, baseline), metrics.frechet_estimate(real, better)
    assert changes[-1].value == pytest.approx(separate[1].value / separate[0].value - 1)
    with pytest.raises(ValueError, match="10 groups of the baseline for 9"):
        metrics.relative_change(real, baseline, better[1:])
