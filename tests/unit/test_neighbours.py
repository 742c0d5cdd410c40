"""Precision, recall and nearest neighbours against plain loops, and where their values are known."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from mergevq.errors import ConfigError, ShapeError
from mergevq.metrics import neighbours
from mergevq.metrics.neighbours import Manifold, nearest, precision_recall


def features(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def radii(x, k):
    distances = cdist(x, x)
    np.fill_diagonal(distances, np.inf)
    return np.sort(distances, axis=1)[:, k - 1]


@pytest.fixture(params=[7, 2**24], ids=["one row at a time", "one block"])
def entries(request, monkeypatch):
    monkeypatch.setattr(neighbours, "_ENTRIES", request.param)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shift", [0.0, 0.7, 2.0])
def test_precision_and_recall_are_their_definition(entries, k, shift):
    a, b = features(40, 3).double(), features(30, 3, seed=1).double() * 0.8 + shift
    between = cdist(a, b)
    precision = np.mean([(between[:, j] <= radii(a, k)).any() for j in range(30)])
    recall = np.mean([(between[i] <= radii(b, k)).any() for i in range(40)])
    assert precision_recall(a, b, k) == (precision, recall)
    assert precision_recall(b, a, k) == (recall, precision)
    kept = Manifold(a, k)
    assert precision_recall(kept, b, k) == precision_recall(kept, Manifold(b, k))


def test_equal_sets_are_within_each_other_and_distant_ones_are_not(entries):
    x = features(25, 8) + 100
    assert precision_recall(x, x[torch.randperm(25)]) == (1, 1)
    assert precision_recall(x, x + 1000) == (0, 0)
    # Reference images of one point each have balls of radius 0: only copies of them lie in these.
    points = (features(5, 8) + 100).repeat_interleave(4, 0)
    assert precision_recall(points, points.flip(0)) == (1, 1)
    assert precision_recall(points, points + 1e-3).precision == 0


def test_a_mode_that_is_left_out_costs_recall_and_one_made_up_precision():
    a, b = features(30, 4), features(30, 4, seed=1) + 50
    both = torch.cat([a, b])
    assert precision_recall(both, features(60, 4, seed=2)).recall <= 0.5
    assert precision_recall(a, torch.cat([features(30, 4, seed=3), b])).precision <= 0.5


def test_nearest_is_a_sorted_row_of_all_distances(entries):
    queries, points = features(9, 5).double(), features(14, 5, seed=1).double()
    expected = cdist(queries, points)
    found = nearest(queries, points, 4)
    np.testing.assert_allclose(found.distance, np.sort(expected, axis=1)[:, :4], rtol=1e-9)
    assert (found.index.numpy() == expected.argsort(axis=1)[:, :4]).all()
    others = cdist(points, points)
    np.fill_diagonal(others, np.inf)
    left_out = nearest(points, points, same=True)
    np.testing.assert_allclose(left_out.distance[:, 0], others.min(1), rtol=1e-9)
    assert (left_out.index[:, 0].numpy() == others.argmin(1)).all()


def test_copies_are_exactly_zero_apart_however_far_from_the_origin():
    x = features(6, 50) * 0.01 + 1e4
    found = nearest(x, torch.cat([x.flip(0), x + 1]))
    assert found.distance.flatten().tolist() == [0] * 6
    assert found.index.flatten().tolist() == [5, 4, 3, 2, 1, 0]


def test_bad_input_raises(unchecked):
    x, broken = features(6, 4), features(6, 4)
    broken[2, 1] = torch.nan
    for measure in (precision_recall, nearest):
        with pytest.raises(ShapeError, match="finite features"):
            measure(x, broken)
        with pytest.raises(ShapeError, match="one width, got 4 and 5"):
            measure(x, features(6, 5))
    with pytest.raises(ShapeError, match=r"more than 3 images .* got 3"):
        precision_recall(x, x[:3])
    with pytest.raises(ConfigError, match="at least 1 neighbour"):
        Manifold(x, 0)
    with pytest.raises(ShapeError, match=r"1\.\.5 neighbours of 5 points, got 6"):
        nearest(x, x, 6, same=True)
