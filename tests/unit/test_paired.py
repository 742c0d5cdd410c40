"""McNemar's exact test is that of a fair coin."""

import pytest
from scipy.stats import binomtest

from mergevq.errors import ShapeError
from mergevq.metrics.paired import is_better, mcnemar


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 9), (9, 3), (20, 20), (700, 801), (3000, 1)])
def test_it_is_the_sign_test_of_scipy(first: int, second: int) -> None:
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
    assert is_better(first, second) == (first > second and expected < 0.05)


def test_numbers_below_zero_are_refused() -> None:
    with pytest.raises(ShapeError, match="at least 0, got -1"):
        mcnemar(-1, 2)
