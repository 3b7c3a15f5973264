"""How far apart two sets of pictures are, measured on features: Fréchet distance, precision and recall.

Intervals come from a grouped jackknife: samples are made in groups of seeds, and a statistic is computed once more
without each group. The same groups for two settings give the interval of their *difference*, in which what the seeds
have in common cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

T_97_5 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's 97.5 % quantile for 1, 2, … 15 degrees of freedom; beyond, :func:`t_quantile` approximates it."""


NEIGHBOURS = 3
"""How many neighbours precision and recall look at, as Kynkäänniemi et al. do."""


@dataclass(frozen=True)
class Moments:
    """Sums that give mean and covariance of features, and that add up over groups. float64."""

    count: int
    total: Tensor
    """``(D,)`` sum of the features."""
    products: Tensor
    """``(D, D)`` sum of their outer products."""

    @staticmethod
    def of(features: Tensor) -> Moments:
        """From ``(N, D)`` features."""
        values = features.double()
        return Moments(len(values), values.sum(dim=0), values.T @ values)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.products + other.products)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.count - other.count, self.total - other.total, self.products - other.products)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """With ``N - 1``. Raises ``ValueError`` for fewer than two samples."""
        if self.count < 2:
            raise ValueError("a covariance needs at least two samples")
        return (self.products - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def sum_moments(parts: Sequence[Moments]) -> Moments:
    """The moments of all groups together. Raises ``ValueError`` for none."""
    if not parts:
        raise ValueError("no groups")
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def frechet_distance(a: Moments, b: Moments) -> float:
    """``|m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½)`` (Heusel et al., arXiv 1706.08500, equation 6).

    The trace of the root is that of ``(C_a^½ C_b C_a^½)^½``, which is symmetric, so two eigendecompositions give it
    exactly and singular covariances (fewer samples than features) do no harm.
    """
    root = _root(a.covariance)
    inner = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * inner
    return max(float(distance), 0.0)


def _neighbour_radii(features: Tensor, neighbours: int, chunk: int) -> Tensor:
    """``(N,)`` distance of each sample to its k-th nearest other one."""
    radii = [
        torch.cdist(rows, features).kthvalue(neighbours + 1, dim=1).values for rows in torch.split(features, chunk)
    ]
    return torch.cat(radii)


def _covered(points: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> Tensor:
    """``(N,)`` whether each point lies in the ball of at least one centre."""
    return torch.cat([(torch.cdist(rows, centres) <= radii).any(dim=1) for rows in torch.split(points, chunk)])


def precision_recall(
    real: Tensor, generated: Tensor, *, neighbours: int = NEIGHBOURS, chunk: int = 512
) -> tuple[Tensor, Tensor]:
    """Which generated samples lie on the real manifold, and which real ones on the generated manifold.

    Two boolean tensors, ``(N_generated,)`` and ``(N_real,)``; their means are precision and recall (Kynkäänniemi et
    al., arXiv 1904.06991, equations 1 and 2). Memory grows with ``chunk x N``, not with ``N²``. Raises
    ``ValueError`` for too few samples.
    """
    if min(len(real), len(generated)) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need more than {neighbours} samples on either side")
    real, generated = real.double(), generated.double()
    on_real = _covered(generated, real, _neighbour_radii(real, neighbours, chunk), chunk)
    on_generated = _covered(real, generated, _neighbour_radii(generated, neighbours, chunk), chunk)
    return on_real, on_generated


@dataclass(frozen=True)
class Estimate:
    """A value and the half-width of its 95 % interval."""

    value: float
    margin: float

    @property
    def low(self) -> float:
        return self.value - self.margin

    @property
    def high(self) -> float:
        return self.value + self.margin

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.margin:.2g}"


def t_quantile(freedom: int) -> float:
    """Student's 97.5 % quantile (an expansion in 1/freedom beyond 15, exact to three digits)."""
    if freedom < 1:
        raise ValueError("an interval needs at least two groups")
    if freedom <= len(T_97_5):
        return T_97_5[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def jackknife(groups: int, statistic: Callable[[Sequence[int]], float]) -> Estimate:
    """``statistic`` of all group indices, with an interval from leaving one group out at a time.

    The value is the plain one, not the bias-corrected one, so that it is comparable with what others publish.
    """
    everything = list(range(groups))
    value = statistic(everything)
    without = [statistic([index for index in everything if index != left]) for left in everything]
    mean = sum(without) / groups
    variance = (groups - 1) / groups * sum((x - mean) ** 2 for x in without)
    return Estimate(value, t_quantile(groups - 1) * math.sqrt(variance))


Reference = Moments | Sequence[Moments]
"""What is measured from: the same drawn pictures for all groups, or each group's own, which come and go with it."""


def _distance(real: Reference, groups: Sequence[Moments], kept: Sequence[int]) -> float:
    drawn = real if isinstance(real, Moments) else sum_moments([real[index] for index in kept])
    return frechet_distance(drawn, sum_moments([groups[index] for index in kept]))


def frechet_estimate(real: Reference, groups: Sequence[Moments]) -> Estimate:
    """The Fréchet distance of the groups together, with its interval over the groups."""
    return jackknife(len(groups), lambda kept: _distance(real, groups, kept))


@dataclass(frozen=True)
class Change:
    """By what share something differs (-0.25: a quarter lower), and its 95 % interval, which is not symmetric."""

    value: float
    low: float
    high: float


def relative_change(real: Reference, baseline: Sequence[Moments], other: Sequence[Moments]) -> Change:
    """By what share the Fréchet distance of ``other`` differs from ``baseline``'s.

    Group ``i`` of both must be made from the same seeds. The interval is that of the logarithm of their ratio: the
    baseline's distance is uncertain too, so that an interval of the ratio itself reaches too far up or not far enough.
    Raises ``ValueError`` for unequal numbers of groups.
    """
    if len(baseline) != len(other):
        raise ValueError(f"{len(baseline)} groups of the baseline for {len(other)}")

    def statistic(kept: Sequence[int]) -> float:
        return math.log(_distance(real, other, kept) / _distance(real, baseline, kept))

    estimate = jackknife(len(baseline), statistic)
    return Change(*(math.expm1(x) for x in (estimate.value, estimate.low, estimate.high)))


def mean_estimate(values: Sequence[Tensor]) -> Estimate:
    """The mean of 0/1 (or any) values given by group, with its interval over the groups."""

    def statistic(kept: Sequence[int]) -> float:
        return torch.cat([values[index].double() for index in kept]).mean().item()

    return jackknife(len(values), statistic)
