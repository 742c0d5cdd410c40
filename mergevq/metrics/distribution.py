"""Distances between two sets of images as sets of features: Fréchet (FID) and kernel (KID) distance.

A number is comparable only with others of the same feature network (see `mergevq.metrics.features`), the same number
of images and the same preparation of the images.
"""

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mergevq.errors import ShapeError

_BLOCK = 2048  # Rows and columns of a kernel matrix held at a time: 32 MiB.


class FeatureStatistics:
    """Mean and covariance of features, gathered batch by batch in float64 on the CPU."""

    def __init__(self) -> None:
        self.count = 0
        self._shift: Tensor | None = None
        self._sum = torch.zeros(0, dtype=torch.float64)
        self._outer = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, features: Float[Tensor, "B D"]) -> None:
        """Adds the features of a batch.

        Raises:
            ShapeError: A number is not finite, or the width changed.
        """
        x = _checked(features)
        if self._shift is None:
            # Sums of squares around the first batch's mean instead of 0 lose no digits where features lie far from 0.
            self._shift = x.mean(0)
            self._sum = torch.zeros_like(self._shift)
            self._outer = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        if x.shape[1] != len(self._shift):
            raise ShapeError(f"expected features of width {len(self._shift)}, got {x.shape[1]}")
        x = x - self._shift
        self.count += len(x)
        self._sum += x.sum(0)
        self._outer += x.T @ x

    @property
    def mean(self) -> Float[Tensor, "D"]:
        """Mean of the features so far."""
        if self._shift is None:
            raise ShapeError("no features were given: call update() first")
        return self._shift + self._sum / self.count

    @property
    def covariance(self) -> Float[Tensor, "D D"]:
        """Covariance of the features so far, divided by their number less one."""
        if self.count < 2:
            raise ShapeError(f"a covariance needs at least 2 images, got {self.count}")
        mean = self._sum / self.count
        return (self._outer - self.count * mean[:, None] * mean[None, :]) / (self.count - 1)


class FeatureStore:
    """All features themselves, in float32 on the CPU, for distances that need more than mean and covariance."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def update(self, features: Float[Tensor, "B D"]) -> None:
        """Adds the features of a batch.

        Raises:
            ShapeError: A number is not finite.
        """
        self._parts.append(_checked(features).float())

    @property
    def features(self) -> Float[Tensor, "n D"]:
        """Everything so far, in the order given."""
        if not self._parts:
            raise ShapeError("no features were given: call update() first")
        return torch.cat(self._parts)


class FeatureSet:
    """Features that several others are compared with: what depends on them alone is computed once, when it is needed.

    Raises:
        ShapeError: A number is not finite.
    """

    def __init__(self, features: Float[Tensor, "n D"]) -> None:
        self.features = _checked(features)

    @cached_property
    def statistics(self) -> FeatureStatistics:
        """Their mean and covariance."""
        out = FeatureStatistics()
        out.update(self.features)
        return out

    @cached_property
    def factor(self) -> Float[Tensor, "D rank"]:
        """F with F F^T their covariance."""
        return _factor(self.statistics.covariance)

    @cached_property
    def within(self) -> Float[Tensor, ""]:
        """Sum of the kernel over all ordered pairs of two different ones."""
        return _within(self.features, _BLOCK)


def frechet_distance(
    a: Float[Tensor, "n D"] | FeatureStatistics | FeatureSet, b: Float[Tensor, "m D"] | FeatureStatistics | FeatureSet
) -> float:
    """Squared Fréchet distance of the normal distributions fitted to two sets of features; 0 for equal sets.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), in float64. Its expectation falls with the number of
    images, so compare at equal numbers only.

    Args:
        a: Features, their statistics gathered batch by batch, or a set that is compared several times.
        b: Likewise.

    Raises:
        ShapeError: A number is not finite, widths differ, or there are fewer than 2 images.

    Reference:
        Heusel et al., GANs trained by a two time-scale update rule (arXiv 1706.08500), equation 6.
    """
    (mean_a, factor_a), (mean_b, factor_b) = _moments(a), _moments(b)
    if mean_a.shape != mean_b.shape:
        raise ShapeError(f"expected features of one width, got {len(mean_a)} and {len(mean_b)}")
    # The eigenvalues of (C_a C_b)^(1/2) are the singular values of F_a^T F_b. Taking roots of eigenvalues instead would
    # turn round-off of 1e-16 into 1e-8 for each direction that a small set of images leaves empty.
    trace = torch.linalg.svdvals(factor_a.T @ factor_b).sum()
    spread = factor_a.square().sum() + factor_b.square().sum()
    distance = (mean_a - mean_b).square().sum() + spread - 2 * trace
    return float(distance)


def kernel_distance(
    a: Float[Tensor, "n D"] | FeatureSet,
    b: Float[Tensor, "m D"] | FeatureSet,
    block: int = _BLOCK,
    *,
    paired: bool = False,
) -> float:
    """Squared maximum mean discrepancy of two sets of features, kernel (x.y / D + 1)^3: the full unbiased estimate.

    All pairs count, once, and no random subsets are drawn, so the result has no noise of its own; its expectation does
    not depend on the number of images. It may be slightly negative.

    That holds for independent sets. Where b[i] was made from a[i], as reconstructions are, the kernel of the two is far
    above that of strangers, and the estimate too low by the order of 1/n (below 0 for copies). `paired` leaves these
    n terms out of the cross term: unbiased for pairs, and 0 for copies.

    Args:
        a: Features, or a set that is compared several times.
        b: Likewise.
        block: Rows and columns of the kernel matrix held at a time; no effect on the result but round-off.
        paired: b[i] belongs to a[i].

    Raises:
        ShapeError: A number is not finite, widths differ, there are fewer than 2 images, or pairs are not equally many.

    Reference:
        Bińkowski et al., Demystifying MMD GANs (arXiv 1801.01401), equation 4.
    """
    first, second = a, b
    a = a.features if isinstance(a, FeatureSet) else _checked(a)
    b = b.features if isinstance(b, FeatureSet) else _checked(b)
    if a.shape[1] != b.shape[1]:
        raise ShapeError(f"expected features of one width, got {a.shape[1]} and {b.shape[1]}")
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise ShapeError(f"a kernel distance needs at least 2 images on either side, got {n} and {m}")
    if paired and a.shape == b.shape and torch.equal(a, b):
        return 0.0  # All three sums are one; round-off of summing it in two ways would be left.
    within_a = first.within if isinstance(first, FeatureSet) else _within(a, block)
    within_b = second.within if isinstance(second, FeatureSet) else _within(b, block)
    between, pairs = _kernel_sum(a, b, block), n * m
    if paired:
        if n != m:
            raise ShapeError(f"expected as many features on either side of pairs, got {n} and {m}")
        between, pairs = between - _kernel((a * b).sum(1), a.shape[1]).sum(), n * (n - 1)
    return float(within_a / (n * (n - 1)) + within_b / (m * (m - 1)) - 2 * between / pairs)


def _factor(covariance: Tensor) -> Tensor:
    """F of [D, rank] with F F^T the covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def _within(features: Tensor, block: int) -> Tensor:
    """Sum of the kernel over all ordered pairs of two different rows."""
    width = features.shape[1]
    total = -_kernel((features * features).sum(1), width).sum()
    # The kernel matrix is symmetric: what lies right of the blocks on its diagonal counts twice.
    for start in range(0, len(features), block):
        part, right = features[start : start + block], features[start + block :]
        total += _kernel(part @ part.T, width).sum()
        if len(right) > 0:
            total += 2 * _kernel_sum(part, right, block)
    return total


def _kernel(dot: Tensor, width: int) -> Tensor:
    """The kernel of inner products, in their place."""
    return dot.div_(width).add_(1).pow_(3)


def _kernel_sum(a: Tensor, b: Tensor, block: int) -> Tensor:
    total = a.new_zeros(())
    for rows in a.split(block):
        for columns in b.split(block):
            total += _kernel(rows @ columns.T, a.shape[1]).sum()
    return total


def _moments(features: Tensor | FeatureStatistics | FeatureSet) -> tuple[Tensor, Tensor]:
    """Mean and factor of the covariance."""
    if isinstance(features, FeatureStatistics):
        return features.mean, _factor(features.covariance)
    found = features if isinstance(features, FeatureSet) else FeatureSet(features)
    return found.statistics.mean, found.factor


def _checked(features: Tensor) -> Tensor:
    x = features.detach().cpu().double()
    if not x.isfinite().all():
        raise ShapeError("expected finite features, got NaN or infinity: look at the images or the feature network")
    return x
