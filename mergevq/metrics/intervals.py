"""Confidence intervals of accuracies."""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

from mergevq.errors import ShapeError

CONFIDENCE = 0.95
"""Of every interval here, two-sided."""

_PANELS = 512  # Of Simpson's rule; more change nothing at double precision.


def share_interval(right: int, total: int) -> tuple[float, float]:
    """Returns the Wilson interval of a share: what other test images of the same kind might have given.

    Args:
        right: how many, 0 .. total.
        total: of how many, at least 1.

    Raises:
        ShapeError: the numbers are no share.

    Reference:
        Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    if not 0 <= right <= total or total < 1:
        raise ShapeError(f"expected a share of at least 1 image, got {right} of {total}")
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, step = right / total, z * z / total
    middle = (share + step / 2) / (1 + step)
    half = z * math.sqrt(share * (1 - share) / total + step / (4 * total)) / (1 + step)
    # At the ends exactly, whatever round-off leaves.
    return (middle - half if right else 0.0), (middle + half if right < total else 1.0)


def mean_half_width(values: Sequence[float]) -> float | None:
    """Returns half the width of Student's interval around the mean of independent draws; None of fewer than two."""
    if len(values) < 2:
        return None
    # The mean first: the deviation of equal numbers is then exactly 0.
    spread = stdev(values, fmean(values))
    return student_quantile(len(values) - 1) * spread / math.sqrt(len(values))


def student_quantile(degrees: int) -> float:
    """Returns what |t| stays below with probability `CONFIDENCE` for Student's t of so many degrees of freedom.

    Args:
        degrees: at least 1.
    """
    # With t = sqrt(degrees) tan(angle) the density is that of cos(angle) ** (degrees - 1): smooth and bounded.
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)

    def between(angle: float) -> float:
        width = angle / _PANELS
        values = [math.cos(i * width) ** (degrees - 1) for i in range(_PANELS + 1)]
        return 2 * scale * width / 3 * (values[0] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]) + values[-1])

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if between(middle) < CONFIDENCE else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)
