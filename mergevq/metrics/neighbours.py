"""Nearest neighbours among features, exactly: precision and recall of generated images, and what they are close to."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergevq.errors import ConfigError, ShapeError

_ENTRIES = 2**24  # Of a matrix of distances, held at a time.
_COPY = 1e-12
"""Squared distances below this share of the squared lengths are round-off: such rows are copies, 0 apart."""


@dataclass(frozen=True, eq=False)
class Nearest:
    """The closest points of each query, closest first."""

    distance: Float[Tensor, "n k"]
    """Euclidean, float64."""
    index: Int[Tensor, "n k"]
    """Number of the point."""


class PrecisionRecall(NamedTuple):
    """Both 0 to 1."""

    precision: float
    """Share of generated images that lie among the reference images."""
    recall: float
    """Share of reference images that lie among the generated ones."""


class Manifold:
    """A set of features with a ball around each, which reaches to its k-th nearest neighbour within the set.

    Args:
        features: one row an image.
        neighbours: k.

    Raises:
        ShapeError: a number is not finite, or the set has no more than k images.
    """

    def __init__(self, features: Float[Tensor, "n D"], neighbours: int = 3) -> None:
        if neighbours < 1:
            raise ConfigError(f"expected at least 1 neighbour, got {neighbours}")
        if len(features) <= neighbours:
            raise ShapeError(
                f"expected more than {neighbours} images for balls that reach to neighbour {neighbours}, "
                f"got {len(features)}"
            )
        self.features = _checked(features)
        self.neighbours = neighbours

    @cached_property
    def squared_radii(self) -> Float[Tensor, " n"]:
        """Squared distance of each image to its k-th nearest other one (float64)."""
        return _closest(self.features, self.features, self.neighbours, same=True)[0][:, -1]


def precision_recall(
    reference: Float[Tensor, "n D"] | Manifold, generated: Float[Tensor, "m D"] | Manifold, neighbours: int = 3
) -> PrecisionRecall:
    """Returns improved precision and recall; 1 and 1 for equal sets, 0 and 0 for sets far apart.

    A generated image counts as precise if it lies in the ball of at least one reference image, whose radius is the
    distance to its k-th nearest other reference image; recall is the same with the roles exchanged. All pairs are
    compared, in float64. Both depend on the numbers of images, so compare at equal numbers only.

    Args:
        reference: features, or a manifold that several sets are compared with.
        generated: likewise.
        neighbours: k, for sets that are no manifolds yet.

    Raises:
        ShapeError: a number is not finite, widths differ, or a set has no more than k images.

    Reference:
        Kynkäänniemi et al., Improved precision and recall metric for assessing generative models (arXiv 1904.06991),
        equations 1 and 2.
    """
    a = reference if isinstance(reference, Manifold) else Manifold(reference, neighbours)
    b = generated if isinstance(generated, Manifold) else Manifold(generated, neighbours)
    precise = torch.zeros(len(b.features), dtype=torch.bool)
    recalled = torch.zeros(len(a.features), dtype=torch.bool)
    for start, squared in _squared_distances(a.features, b.features):
        rows = slice(start, start + len(squared))
        precise |= (squared <= a.squared_radii[rows, None]).any(0)
        recalled[rows] = (squared <= b.squared_radii).any(1)
    return PrecisionRecall(float(precise.double().mean()), float(recalled.double().mean()))


def nearest(
    queries: Float[Tensor, "n D"], points: Float[Tensor, "m D"], count: int = 1, *, same: bool = False
) -> Nearest:
    """Returns the `count` closest points of each query, by comparing all pairs in float64.

    Args:
        queries: one row each.
        points: one row each.
        count: k.
        same: `queries` are `points`, and no row is its own neighbour. (A copy of it elsewhere is, at distance 0.)

    Raises:
        ShapeError: a number is not finite, widths differ, or there are fewer than `count` points.
    """
    found = len(points) - same
    if not 1 <= count <= found:
        raise ShapeError(f"expected 1..{found} neighbours of {found} points, got {count}")
    squared, index = _closest(_checked(queries), _checked(points), count, same)
    return Nearest(squared.sqrt(), index)


def _closest(queries: Tensor, points: Tensor, count: int, same: bool) -> tuple[Tensor, Tensor]:
    """Squared distances and numbers of the closest points, both [n, count]."""
    values, indices = [], []
    for start, squared in _squared_distances(queries, points):
        if same:
            rows = torch.arange(len(squared))
            squared[rows, start + rows] = torch.inf
        closest = squared.topk(count, largest=False)
        values.append(closest.values)
        indices.append(closest.indices)
    return torch.cat(values), torch.cat(indices)


def _squared_distances(a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yields first row and squared distances [rows, m] of blocks of rows of a to all rows of b."""
    if a.shape[1] != b.shape[1]:
        raise ShapeError(f"expected features of one width, got {a.shape[1]} and {b.shape[1]}")
    # |x|^2 + |y|^2 - 2 x.y loses fewer digits around the middle of the points.
    middle = b.mean(0)
    a, b = a - middle, b - middle
    lengths_a, lengths_b = a.square().sum(1), b.square().sum(1)
    rows = max(1, _ENTRIES // len(b))
    for start in range(0, len(a), rows):
        lengths = lengths_a[start : start + rows, None] + lengths_b
        squared = lengths - 2 * a[start : start + rows] @ b.T
        yield start, torch.where(squared <= _COPY * lengths, 0.0, squared)


def _checked(features: Tensor) -> Tensor:
    x = features.detach().cpu().double()
    if x.ndim != 2:
        raise ShapeError(f"expected features [n, D], got {list(features.shape)}")
    if not x.isfinite().all():
        raise ShapeError("expected finite features, got NaN or infinity: look at the images or the feature network")
    return x
