"""Probes against scikit-learn and scipy on the same features, and what must come out whatever the features are."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, t
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from torch import Tensor

from mergevq.metrics.few_shot import few_shot
from mergevq.metrics.intervals import share_interval, student_quantile
from mergevq.metrics.knn import knn_classify
from mergevq.metrics.linear_probe import fit_linear_probe
from mergevq.metrics.principal import principal_components
from mergevq.metrics.probe import by_class, score_answers
from mergevq.metrics.probe_config import LinearConfig

CLASSES, WIDTH = 7, 12


def clusters(count: int, seed: int, spread: float = 1.2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Features that lie around a middle for each class, closely enough for mistakes, and labels."""
    rng = torch.Generator().manual_seed(seed)
    middles = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99), dtype=dtype)
    labels = torch.arange(count) % CLASSES
    return middles[labels] + spread * torch.randn(count, WIDTH, generator=rng, dtype=dtype) + 0.5, labels


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_knn_is_sklearns_with_the_same_weights(temperature: float) -> None:
    (train, labels), (test, truth) = clusters(211, 0), clusters(100, 1)
    ks = (1, 3, 20, 211)
    answers = knn_classify(train, labels, test, num_classes=CLASSES, ks=ks, temperature=temperature)
    for k in ks:
        model = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda apart: np.exp((1 - apart) / temperature)
        ).fit(train.numpy(), labels.numpy())
        votes = model.predict_proba(test.numpy())
        assert answers[k][:, 0].tolist() == model.predict(test.numpy()).tolist()
        score = score_answers(answers[k], truth, CLASSES)
        assert score.top1 == pytest.approx(model.score(test.numpy(), truth.numpy()), abs=1e-12)
        # Classes without votes are no answers, so a right one needs votes.
        voted = votes[np.arange(100), truth.numpy()] > 0
        best = np.argsort(-votes, axis=1, kind="stable")[:, :5]
        assert score.top5 == pytest.approx(float(((best == truth.numpy()[:, None]).any(1) & voted).mean()), abs=1e-12)
    assert (answers[1][:, 1:] == -1).all()


def test_knn_in_small_blocks_is_knn_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    (train, labels), (test, _) = clusters(211, 0), clusters(100, 1)
    whole = knn_classify(train, labels, test, num_classes=CLASSES, ks=(1, 5, 30))
    monkeypatch.setattr("mergevq.metrics.knn._QUERIES", 7)
    monkeypatch.setattr("mergevq.metrics.knn._ENTRIES", 7 * 11)
    parts = knn_classify(train, labels, test, num_classes=CLASSES, ks=(1, 5, 30))
    assert all(torch.equal(parts[k], whole[k]) for k in whole)


@pytest.mark.parametrize("decay", [1e-1, 1e-3])
def test_lbfgs_finds_the_optimum_of_logistic_regression(decay: float) -> None:
    (x, labels), (test, _) = clusters(300, 2, dtype=torch.float64), clusters(50, 3, dtype=torch.float64)
    config = LinearConfig(optimizer="lbfgs", weight_decays=(decay,), iterations=500)
    probe = fit_linear_probe(x, labels, num_classes=CLASSES, config=config)
    normal = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-6).sqrt()
    model = LogisticRegression(C=1 / (len(x) * decay), solver="newton-cg", tol=1e-12, max_iter=500)
    model.fit(normal.numpy(), labels.numpy())
    assert probe.sweep[0].top1 is None and probe.held_out == 0  # One pair: nothing to choose.
    np.testing.assert_allclose(probe.weight.numpy(), model.coef_, atol=1e-5)
    seen = (test - x.mean(0)) / (x.var(0, correction=0) + 1e-6).sqrt()
    mine = probe.logits(test).softmax(1).numpy()
    np.testing.assert_allclose(mine, model.predict_proba(seen.numpy()), atol=2e-6)
    assert probe.answers(test)[:, 0].tolist() == model.predict(seen.numpy()).tolist()


def test_adamw_comes_close_to_the_optimum() -> None:
    x, labels = clusters(300, 2, spread=2.0)
    config = LinearConfig(learning_rates=(0.1,), epochs=300, batch_size=300)
    probe = fit_linear_probe(x, labels, num_classes=CLASSES, config=config)
    normal = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-6).sqrt()).numpy()
    model = LogisticRegression(C=1e6, tol=1e-8, max_iter=5000).fit(normal, labels.numpy())
    best = -np.log(model.predict_proba(normal)[np.arange(300), labels.numpy()]).mean()
    found = torch.nn.functional.cross_entropy(probe.logits(x), labels)
    assert best - 1e-6 < float(found) < best + 1e-3


def test_scores_are_sklearns_and_by_hand() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 9, generator=rng), torch.randint(9, (200,), generator=rng)
    answers = logits.argsort(1, descending=True)[:, :5]
    score = score_answers(answers, labels, 9)
    assert score.top1 == pytest.approx(top_k_accuracy_score(labels, logits.numpy(), k=1))
    assert score.top5 == pytest.approx(top_k_accuracy_score(labels, logits.numpy(), k=5))
    expected = confusion_matrix(labels, answers[:, 0], labels=range(9))
    assert score.confusion.tolist() == expected.tolist()
    assert score.mean_class == pytest.approx(float((expected.diagonal() / expected.sum(1)).mean()))
    # Three images of six classes by hand: right at once, as the fifth answer, and not among five.
    hand = score_answers(torch.tensor([[0, 1, 2, 3, 4], [5, 4, 3, 2, 1], [1, 2, 3, 4, 5]]), torch.tensor([0, 1, 0]), 6)
    assert (hand.top1, hand.top5, hand.per_class[:2]) == (1 / 3, 2 / 3, (0.5, 0.0))
    assert hand.per_class[2:] == (None,) * 4 and hand.mean_class == 0.25
    assert int(hand.confusion[0, 0]) == int(hand.confusion[1, 5]) == int(hand.confusion[0, 1]) == 1


def test_five_classes_have_no_top_5() -> None:
    assert score_answers(torch.tensor([[4, 3, 2, 1, 0]]), torch.tensor([4]), 5).top5 is None


def test_few_shot_is_the_nearest_centroid_of_the_drawn_images() -> None:
    (train, labels), (test, truth) = clusters(140, 4), clusters(70, 5)
    found = few_shot(train, labels, test, truth, num_classes=CLASSES, shots=(1, 5), draws=3, seed=11)
    for k, result in zip((1, 5), found, strict=True):
        expected = []
        for draw in range(3):
            order, place, _ = by_class(labels, torch.Generator().manual_seed(33 + draw))
            chosen = order[place < k]
            assert torch.bincount(labels[chosen]).tolist() == [k] * CLASSES
            x = (train[chosen] - train[chosen].mean(0)).double()
            x = x / x.norm(dim=1, keepdim=True)
            with np.errstate(invalid="ignore"):  # It also wants the spread within a class, of one image.
                model = NearestCentroid().fit(x.numpy(), labels[chosen].numpy())
            # By cosine: the nearest of means of length 1.
            model.centroids_ /= np.linalg.norm(model.centroids_, axis=1, keepdims=True)
            seen = (test - train[chosen].mean(0)).double()
            seen = seen / seen.norm(dim=1, keepdim=True)
            expected.append(model.score(seen.numpy(), truth.numpy()))
        assert result.draws == pytest.approx(expected, abs=1e-12)
        spread = np.std(expected, ddof=1) / math.sqrt(3)
        assert result.top1 == pytest.approx(np.mean(expected))
        assert result.half_width == pytest.approx(t.ppf(0.975, 2) * spread)


@pytest.mark.parametrize("degrees", [1, 2, 4, 9, 30, 1000])
def test_students_quantile_is_scipys(degrees: int) -> None:
    assert student_quantile(degrees) == pytest.approx(t.ppf(0.975, degrees), rel=1e-8)


def test_the_interval_of_a_share_holds_what_it_says() -> None:
    """Of many shares drawn with a known chance, 95 % have an interval with that chance in it."""
    for chance, total in ((0.5, 40), (0.9, 299), (0.02, 500)):
        covered = sum(
            float(binom.pmf(right, total, chance))
            for right in range(total + 1)
            if share_interval(right, total)[0] <= chance <= share_interval(right, total)[1]
        )
        assert 0.93 < covered < 0.98
    assert share_interval(0, 10)[0] == 0 and share_interval(10, 10)[1] == 1


@pytest.mark.parametrize("count", [60, 5])
def test_principal_components_are_sklearns(count: int) -> None:
    x, _ = clusters(count, 6)
    found, model = principal_components(x), PCA(2).fit(x.double().numpy())
    expected = model.transform(x.double().numpy())
    for i in range(2):
        mine = found.coordinates[:, i].numpy()
        assert mine[np.abs(mine).argmax()] > 0
        np.testing.assert_allclose(np.abs(mine), np.abs(expected[:, i]), rtol=1e-4, atol=1e-5)
    assert found.explained == pytest.approx(model.explained_variance_ratio_, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------- sanity rows


def test_the_training_images_themselves_are_always_found() -> None:
    train, labels = clusters(100, 7, spread=5.0)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    answers = knn_classify(train, labels, train[order] * 3, num_classes=CLASSES, ks=(1,))
    assert score_answers(answers[1], labels[order], CLASSES).top1 == 1.0


def test_shuffled_labels_give_chance() -> None:
    """Within a bound that a fair guess misses once in ten million times."""
    (train, labels), (test, truth) = clusters(700, 8, spread=0.5), clusters(400, 9, spread=0.5)
    rng = torch.Generator().manual_seed(1)
    train_labels = labels[torch.randperm(700, generator=rng)]
    truth = truth[torch.randperm(400, generator=rng)]
    low, high = binom.ppf([5e-8, 1 - 5e-8], 400, 1 / CLASSES) / 400
    answers = knn_classify(train, train_labels, test, num_classes=CLASSES, ks=(1, 20))
    probe = fit_linear_probe(train, train_labels, num_classes=CLASSES, config=LinearConfig(epochs=5))
    few = few_shot(train, train_labels, test, truth, num_classes=CLASSES, shots=(5,), draws=2)
    for found in (answers[1], answers[20], probe.answers(test)):
        assert low < score_answers(found, truth, CLASSES).top1 < high
    assert all(low < accuracy < high for accuracy in few[0].draws)
    # The same images with their own labels are told apart.
    right = knn_classify(train, labels, test, num_classes=CLASSES, ks=(20,))[20]
    assert score_answers(right, clusters(400, 9)[1], CLASSES).top1 > 0.95
