"""The metrics against scipy, against closed forms and on cases with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sag_pag.demo import metrics
from sag_pag.demo.metrics import Moments


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


def test_frechet_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """A thousand-sample distance to a shifted reference, against the distance at many samples."""
    real = Moments.of(normal(20_000, 3, seed=8))
    truth = metrics.frechet_distance(real, Moments.of(normal(20_000, 3, seed=9, shift=0.5)))
    hits = 0
    for trial in range(40):
        groups = [Moments.of(part) for part in torch.split(normal(1000, 3, seed=100 + trial, shift=0.5), 100)]
        estimate = metrics.frechet_estimate(real, groups)
        hits += estimate.low <= truth <= estimate.high
    assert hits >= 34


def test_paired_change_is_tighter_than_the_two_intervals() -> None:
    real = Moments.of(normal(5000, 3, seed=10))
    parts = torch.split(normal(1000, 3, seed=11, shift=1.0), 100)
    baseline, better = [Moments.of(part) for part in parts], [Moments.of(part - 0.1) for part in parts]
    change = metrics.relative_change(real, baseline, better)
    first = metrics.frechet_estimate(real, baseline)
    assert change.value == pytest.approx(metrics.frechet_estimate(real, better).value / first.value - 1)
    assert change.high < 0
    assert change.margin < first.margin / first.value
    with pytest.raises(ValueError, match="10 groups of the baseline for 9"):
        metrics.relative_change(real, baseline, better[1:])
