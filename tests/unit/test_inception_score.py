"""The inception score against its definition and where its value is known."""

import numpy as np
import pytest
import torch

from mergevq.errors import ShapeError
from mergevq.metrics import inception
from mergevq.metrics.inception import inception_score


def logits(count, classes, seed=0):
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(seed)) * 3


def test_equal_answers_give_one():
    assert inception_score(torch.zeros(5, 7)) == pytest.approx(1)
    assert inception_score(logits(1, 9)) == pytest.approx(1)
    assert inception_score(logits(1, 9).expand(6, -1)) == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_certain_and_balanced_answers_give_the_number_of_classes(scale):
    assert inception_score(scale * torch.eye(6).repeat(4, 1)) == pytest.approx(6)
    # Only three of the six classes appear.
    assert inception_score(scale * torch.eye(6)[:3].repeat(4, 1)) == pytest.approx(3)


@pytest.mark.parametrize("block", [3, 8192])
def test_it_is_the_definition(monkeypatch, block):
    monkeypatch.setattr(inception, "_BLOCK", block)
    x = logits(40, 11)
    p = np.exp(x.double().numpy())
    p /= p.sum(1, keepdims=True)
    expected = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert inception_score(x) == pytest.approx(expected, rel=1e-12)
    # A constant added to an image's logits changes nothing.
    assert inception_score(x + 100 * torch.rand(40, 1)) == pytest.approx(expected, rel=1e-4)


def test_bad_input_raises():
    for bad in (torch.nan, torch.inf):
        x = logits(4, 3)
        x[2, 1] = bad
        with pytest.raises(ShapeError, match="finite logits"):
            inception_score(x)
    with pytest.raises(ShapeError, match="at least one image"):
        inception_score(torch.zeros(0, 3))
