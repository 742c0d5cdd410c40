"""Which vectors of two sets mean the same: mutual nearest neighbours by cosine."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mergevq.errors import ShapeError


class Matches(NamedTuple):
    """Pairs of rows of two sets of features, most similar pair first; no row is in two pairs."""

    first: Int[Tensor, " M"]
    """Rows of the first set."""
    second: Int[Tensor, " M"]
    """Rows of the second set."""
    similarity: Float[Tensor, " M"]
    """Cosine, -1 to 1."""


def mutual_matches(first: Float[Tensor, "n D"], second: Float[Tensor, "m D"]) -> Matches:
    """Returns the pairs in which each is the most similar of its set to the other.

    There is at least one pair, and at most min(n, m). Of equally similar rows the first counts.

    Args:
        first: features, one row each.
        second: likewise.

    Raises:
        ShapeError: a set is empty, widths differ, or a number is not finite.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or not len(first) or not len(second):
        raise ShapeError(
            f"expected two sets of features of one width, got {list(first.shape)} and {list(second.shape)}"
        )
    if not bool(first.isfinite().all() & second.isfinite().all()):
        raise ShapeError("expected finite features, got NaN or infinity: look at the images or the model")
    cosine = normalize(first.double(), dim=1) @ normalize(second.double(), dim=1).T
    partner, back = cosine.argmax(1), cosine.argmax(0)
    rows = torch.arange(len(first), device=first.device)
    rows = rows[back[partner] == rows]
    similarity = cosine[rows, partner[rows]]
    order = similarity.argsort(descending=True, stable=True)
    return Matches(rows[order], partner[rows][order], similarity[order])
