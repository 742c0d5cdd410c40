"""What a linear probe's sweep is, what is held out, and what probes refuse."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mergevq.errors import ConfigError, ShapeError
from mergevq.metrics.few_shot import few_shot
from mergevq.metrics.knn import knn_classify
from mergevq.metrics.linear_probe import fit_linear_probe
from mergevq.metrics.principal import principal_components
from mergevq.metrics.probe import hold_out, ranked, score_answers
from mergevq.metrics.probe_config import LinearConfig, ProbeConfig


def examples(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return torch.randn(count, 6, generator=rng) + labels[:, None], labels


def test_heads_of_a_sweep_are_those_trained_alone() -> None:
    """Every rate with every decay: what one head learns does not depend on the others."""
    x, labels = examples(90)
    config = LinearConfig(learning_rates=(1e-3, 1e-1), weight_decays=(0.0, 0.3), epochs=4, batch_size=32)
    together = fit_linear_probe(x, labels, num_classes=3, config=config, held_out=0.2, seed=5)
    kept, held = hold_out(labels, 0.2, 5)
    for tried in together.sweep:
        one = LinearConfig(
            learning_rates=(tried.learning_rate,), weight_decays=(tried.weight_decay,), epochs=4, batch_size=32
        )
        alone = fit_linear_probe(x[kept], labels[kept], num_classes=3, config=one, seed=5)
        loss = torch.nn.functional.cross_entropy(alone.logits(x[held]), labels[held])
        assert tried.loss == pytest.approx(float(loss), rel=1e-5)
        assert tried.top1 == score_answers(alone.answers(x[held]), labels[held], 3).top1
    losses = {tried.loss for tried in together.sweep}
    assert len(together.sweep) == len(losses) == 4 and together.held_out == len(held) == 18


def test_the_best_pair_is_trained_again_on_all_images() -> None:
    x, labels = examples(90)
    config = LinearConfig(learning_rates=(1e-5, 1e-1, 1e-6), epochs=4)
    probe = fit_linear_probe(x, labels, num_classes=3, config=config, seed=5)
    best = max(probe.sweep, key=lambda tried: (tried.top1, -tried.loss))
    assert probe.learning_rate == best.learning_rate == 1e-1
    # Its held-out answers are no better here than those of another rate, but surer.
    assert sorted(tried.top1 == best.top1 for tried in probe.sweep) == [True] * 3
    alone = fit_linear_probe(x, labels, num_classes=3, config=replace(config, learning_rates=(1e-1,)), seed=5)
    assert torch.equal(alone.weight, probe.weight) and torch.allclose(alone.mean, x.mean(0))


def test_weight_decay_is_decoupled_and_leaves_the_bias() -> None:
    """The first of two steps moves every weight by the rate; the second, at half the rate, takes off its share."""
    x, labels = examples(90)
    config = LinearConfig(learning_rates=(0.1,), weight_decays=(0.0,), epochs=2)
    free = fit_linear_probe(x, labels.where(labels < 2, 0), num_classes=2, config=config)
    config = replace(config, weight_decays=(3.0,))
    decayed = fit_linear_probe(x, labels.where(labels < 2, 0), num_classes=2, config=config)
    torch.testing.assert_close((free.weight - decayed.weight).abs(), torch.full((2, 6), 0.1 * 0.05 * 3))
    assert torch.equal(free.bias, decayed.bias) and free.bias[0] > 0.1


@pytest.mark.parametrize("size", [2.0**-20, 2.0**20])
def test_the_size_of_features_makes_no_difference(size: float) -> None:
    """The class token of an untrained encoder is 1e-6 long: as it is, it would be a baseline only in name."""
    x, labels = examples(60)
    config = LinearConfig(learning_rates=(0.1,), epochs=3)
    probe, scaled = (fit_linear_probe(f, labels, num_classes=3, config=config) for f in (x, x * size))
    torch.testing.assert_close(scaled.logits(x * size), probe.logits(x))


def test_a_feature_that_never_changes_has_no_say() -> None:
    x, labels = examples(60)
    x[:, 2] = 7.0
    probe = fit_linear_probe(x, labels, num_classes=3, config=LinearConfig(learning_rates=(0.1,), epochs=3))
    assert (probe.weight[:, 2] == 0).all()


def test_of_every_class_a_share_is_held_out() -> None:
    labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 2 + [3])
    kept, held = hold_out(labels, 0.1, 0)
    assert torch.bincount(labels[held], minlength=4).tolist() == [4, 1, 1, 0]
    assert torch.cat([kept, held]).sort().values.tolist() == list(range(53))
    assert torch.equal(hold_out(labels, 0.1, 0)[1], held) and not torch.equal(hold_out(labels, 0.1, 1)[1], held)


def test_equal_scores_are_ranked_by_number_and_forbidden_classes_are_none() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 0.0]])
    assert ranked(scores).tolist() == [[1, 2, 4, 0, 3]]
    allowed = torch.tensor([[True, False, True, False, False, True]])
    assert ranked(scores, allowed).tolist() == [[2, 0, 5, -1, -1]]


def test_features_without_variance_project_to_a_point() -> None:
    found = principal_components(torch.full((4, 3), 0.1))
    assert found.coordinates.tolist() == [[0.0, 0.0]] * 4 and found.explained == (0.0, 0.0)
    line = principal_components(torch.tensor([[0.0], [1.0], [5.0]]))
    assert line.coordinates.tolist() == [[-2.0, 0.0], [-1.0, 0.0], [3.0, 0.0]] and line.explained == (1.0, 0.0)


def knn(x: Tensor, labels: Tensor, **options: Any) -> Any:
    return knn_classify(x, labels, options.pop("test", x), **{"num_classes": 3, "ks": (1,), **options})


def linear(x: Tensor, labels: Tensor, **options: Any) -> Any:
    return fit_linear_probe(x, labels, **{"num_classes": 3, **options})


def shots(x: Tensor, labels: Tensor, **options: Any) -> Any:
    return few_shot(x, labels, x, labels, **{"num_classes": 3, "shots": (1,), **options})


def test_all_images_of_every_class_are_one_draw_without_an_interval() -> None:
    x, labels = examples(9)
    some, whole = shots(x, labels, shots=(2, 3), draws=4)
    assert (len(some.draws), some.all_images) == (4, False) and some.half_width is not None
    assert (len(whole.draws), whole.all_images, whole.half_width) == (1, True, None)
    # A class with more images than the others leaves something to draw.
    (uneven,) = shots(x, labels.where(labels != 2, 1), shots=(3,), draws=4, num_classes=2)
    assert len(uneven.draws) == 4 and not uneven.all_images


@pytest.mark.parametrize("probe", [knn, linear, shots])
def test_probes_refuse_what_is_no_labelled_feature(probe: Any) -> None:
    x, labels = examples(9)
    broken = x.clone()
    broken[4, 2] = torch.nan
    with pytest.raises(ShapeError, match="NaN or infinity for 1 of 9"):
        probe(broken, labels)
    with pytest.raises(ShapeError, match=r"labels in 0\.\.2, got others for 1 of 9"):
        probe(x, torch.where(torch.arange(9) == 3, -1, labels))
    with pytest.raises(ShapeError, match="at least 2 classes"):
        probe(x, labels * 0, num_classes=1)


@pytest.mark.parametrize("probe", [linear, shots])
def test_every_class_needs_an_image(probe: Any) -> None:
    x, labels = examples(9)
    with pytest.raises(ShapeError, match="none of class 1"):
        probe(x, labels.where(labels != 1, 0))
    with pytest.raises(ShapeError, match=r"as many training images as classes \(3\), got 2"):
        probe(x[:2], labels[:2])


def test_numbers_out_of_range_are_refused() -> None:
    x, labels = examples(9)
    with pytest.raises(ShapeError, match=r"k of at most 9.* got 10"):
        knn(x, labels, ks=(1, 10))
    with pytest.raises(ShapeError, match="test features"):
        knn(x, labels, test=x / 0)
    with pytest.raises(ConfigError, match="temperature above 0"):
        knn(x, labels, temperature=0.0)
    with pytest.raises(ShapeError, match="at least 4 training images of every class for 4 shots, got 3 of class 0"):
        shots(x, labels, shots=(1, 4))
    with pytest.raises(ShapeError, match="1 of each"):
        linear(x[:3], labels[:3])
    with pytest.raises(ShapeError, match=r"learning rate 10\.0 with weight decay 10\.0 diverged"):
        linear(x, labels, config=LinearConfig(learning_rates=(10.0,), weight_decays=(10.0,), epochs=60))
    with pytest.raises(ShapeError, match="variance is a finite number"):
        linear(x * 1e30, labels)
    with pytest.raises(ConfigError, match="learning rates above 0"):
        LinearConfig(learning_rates=(0.0,))
    with pytest.raises(ConfigError, match="got none"):
        ProbeConfig(probes=())
    with pytest.raises(ConfigError, match="got kn, linear: did you mean knn"):
        ProbeConfig(probes=("kn", "linear"))
    with pytest.raises(ConfigError, match=r"between 0 and 1, got 1\.0"):
        ProbeConfig(held_out=1.0)
    with pytest.raises(ConfigError, match="a seed of at most 64 bits"):
        ProbeConfig(seed=2**64)


def test_other_features_than_those_trained_on_are_refused(unchecked: None) -> None:
    x, labels = examples(9)
    with pytest.raises(ShapeError, match="one width, got 6 and 5"):
        knn(x, labels, test=x[:, :5])
    with pytest.raises(ShapeError, match=r"got \[9, 6\] and 8 labels"):
        linear(x, labels[:8])
