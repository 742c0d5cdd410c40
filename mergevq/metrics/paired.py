"""Whether one classifier is right more often than another on the same images."""

from mergevq.errors import ShapeError
from mergevq.metrics.intervals import CONFIDENCE


def mcnemar(first: int, second: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test, 0 to 1: how likely so uneven numbers are by chance alone.

    Images that both get right, or neither, say nothing of their difference; of the others each is one's or the other's
    with probability 1/2 if both are equally good. Exact for any numbers: no normal distribution stands in.

    Args:
        first: images that only the first classifier gets right.
        second: images that only the second one does.

    Raises:
        ShapeError: a number is negative.

    Reference:
        McNemar, Note on the sampling error of the difference between correlated proportions or percentages (1947).
    """
    if min(first, second) < 0:
        raise ShapeError(f"expected numbers of images of at least 0, got {first} and {second}")
    total, ways, below = first + second, 1, 0
    for i in range(min(first, second) + 1):
        below += ways
        ways = ways * (total - i) // (i + 1)
    return min(1.0, 2 * below / 2**total)


def is_better(first: int, second: int) -> bool:
    """Returns whether the first classifier is the better one beyond chance, by `mcnemar` of these numbers."""
    return first > second and mcnemar(first, second) < 1 - CONFIDENCE
