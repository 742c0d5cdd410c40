"""Metrics of sets against torch-fidelity and scipy, on the same features."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kernel_poly, kid_features_to_metric, mmd2
from torch_fidelity.metric_prc import prc_features_to_metric

from mergevq.metrics.distribution import frechet_distance, kernel_distance
from mergevq.metrics.inception import inception_score
from mergevq.metrics.neighbours import precision_recall


def features(count: int, seed: int, width: int = 12) -> torch.Tensor:
    """Correlated and not centred, as the features of a network are."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    x = torch.randn(count, width, generator=rng, dtype=torch.float64)
    return (x @ mixing).relu() + 0.1 * seed


A, B = features(90, 1), features(90, 2)


@pytest.mark.parametrize("other", [B, features(40, 3)], ids=["as many", "fewer"])
def test_frechet_distance(other: torch.Tensor) -> None:
    a, b = A.numpy(), other.numpy()
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(A), fid_features_to_statistics(other), False)
    assert frechet_distance(A, other) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(A, other) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_kernel_distance() -> None:
    # One subset of all images: the unbiased estimate of everything, as ours is.
    theirs = kid_features_to_metric(A, B, kid_subsets=1, kid_subset_size=90, verbose=False)
    assert kernel_distance(A, B) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    # Their u-statistic leaves the terms of pairs out of the cross term.
    kernels = [kernel_poly(x.numpy(), y.numpy()) for x, y in ((A, A), (A, B), (B, B))]
    assert kernel_distance(A, B, paired=True) == pytest.approx(mmd2(*kernels, mmd_est="u-statistic"), rel=1e-6)


def test_inception_score() -> None:
    logits = features(60, 4, width=10)
    theirs = isc_features_to_metric(logits, splits=1, shuffle=False)
    assert inception_score(logits) == pytest.approx(theirs["inception_score_mean"], rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_precision_and_recall(shift: float) -> None:
    generated = features(70, 5) + shift
    theirs = prc_features_to_metric(generated, A, prc_neighborhood=3, prc_batch_size=1000, verbose=False)
    ours = precision_recall(A, generated)
    assert ours == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)
    assert 0 < ours.precision < 1 or shift > 1
