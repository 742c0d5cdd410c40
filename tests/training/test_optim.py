"""The schedule steps, weight decay spares everything but matrices, the average moves as its formula says."""

import math

import pytest
import torch
from torch import nn

from mergevq.tokenizer.config import TokenizerConfig
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.config import OptimConfig
from mergevq.training.optim import (
    average_weights,
    build_adamw,
    clip_gradients,
    gradient_norm,
    lr_factor,
    run_progress,
    set_lr,
)


def test_progress_is_the_further_of_steps_and_minutes() -> None:
    assert run_progress(25, elapsed=30.0, steps=100, minutes=0.0) == 0.25
    assert run_progress(25, elapsed=30.0, steps=100, minutes=1.0) == 0.5
    assert run_progress(75, elapsed=30.0, steps=100, minutes=1.0) == 0.75
    assert run_progress(100, elapsed=999.0, steps=100, minutes=1.0) == 1.0


def test_warm_up_starts_above_zero_and_reaches_the_peak() -> None:
    optim = OptimConfig(warmup_steps=4)
    assert [lr_factor(0.0, step, optim) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_runs_from_one_to_its_end() -> None:
    optim = OptimConfig(schedule="cosine", final_lr=0.1)
    factors = [lr_factor(progress / 10, 99, optim) for progress in range(11)]
    assert factors[0] == 1.0
    assert factors[5] == pytest.approx(0.55)
    assert factors[10] == pytest.approx(0.1)
    assert factors == sorted(factors, reverse=True)


def test_step_schedule_divides_by_ten_at_each_part() -> None:
    optim = OptimConfig(schedule="step", decay_at=(0.5, 0.75))
    assert [round(lr_factor(p, 99, optim), 6) for p in (0.0, 0.49, 0.5, 0.74, 0.75, 1.0)] == [
        1,
        1,
        0.1,
        0.1,
        0.01,
        0.01,
    ]


def test_warm_up_and_decay_multiply() -> None:
    optim = OptimConfig(schedule="cosine", warmup_steps=10)
    assert lr_factor(0.5, 4, optim) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi / 2)))


def test_set_lr_reaches_every_group() -> None:
    optimizer = build_adamw(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), 1.0, OptimConfig())
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_only_weights_of_layers_decay(tiny_config: TokenizerConfig) -> None:
    model = MergeVQ(tiny_config)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_adamw(model, 1e-3, OptimConfig(weight_decay=0.1))
    decayed = {names[id(p)] for group in optimizer.param_groups for p in group["params"] if group["weight_decay"] > 0}
    spared = {names[id(p)] for group in optimizer.param_groups for p in group["params"] if group["weight_decay"] == 0}
    assert decayed | spared == set(names.values())
    assert not decayed & spared
    assert all(name.endswith("weight") for name in decayed)
    # Everything that looks like a matrix but is an embedding, and every vector.
    shapes = dict(model.named_parameters())
    assert {name for name in spared if shapes[name].ndim >= 2} == {
        name for name in shapes if name.split(".")[-1] in ("class_token", "queries")
    } & {name for name in shapes if shapes[name].ndim >= 2}
    assert all(shapes[name].ndim >= 2 for name in decayed)


def test_weight_decay_shrinks_matrices_alone() -> None:
    layer = nn.Linear(3, 3)
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = build_adamw(layer, 0.5, OptimConfig(weight_decay=0.1))
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(layer.weight, before[0] * 0.95)
    assert torch.equal(layer.bias, before[1])


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    optimizer = build_adamw(model, 1e-3, OptimConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_average_follows_its_formula_and_copies_buffers() -> None:
    model = nn.BatchNorm1d(2)
    ema = average_weights(model, 0.75)
    expected = None
    for value in (1.0, 2.0, 5.0):
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_mean.fill_(value)
        ema.update_parameters(model)
        expected = value if expected is None else 0.75 * expected + 0.25 * value
        assert torch.allclose(ema.module.weight, torch.full((2,), expected))
        assert torch.equal(ema.module.running_mean, model.running_mean)
    assert not any(p.requires_grad for p in ema.parameters())


def test_clipping_scales_to_the_norm_and_only_down() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    norm = gradient_norm(layer.parameters())
    assert float(norm) == pytest.approx(5.0)
    clip_gradients(layer.parameters(), 10.0, norm)
    assert torch.equal(layer.weight.grad, torch.tensor([[3.0, 4.0]]))
    clip_gradients(layer.parameters(), 0.0, norm)
    assert torch.equal(layer.weight.grad, torch.tensor([[3.0, 4.0]]))
    clip_gradients(layer.parameters(), 1.0, norm)
    assert torch.allclose(layer.weight.grad, torch.tensor([[0.6, 0.8]]), atol=1e-5)


def test_a_parameters_rate_has_its_scale_and_keeps_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    optim = OptimConfig(weight_decay=0.1)
    optimizer = build_adamw(model, 1.0, optim, lambda name: 0.5 if name.startswith("0.") else 1.0)
    names = {id(p): name for name, p in model.named_parameters()}

    def rates() -> dict[str, float]:
        return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}

    assert rates() == {"0.weight": 0.5, "0.bias": 0.5, "1.weight": 1, "1.bias": 1, "2.weight": 1, "2.bias": 1}
    decayed = {names[id(p)] for g in optimizer.param_groups for p in g["params"] if g["weight_decay"] == 0.1}
    assert decayed == {"0.weight", "2.weight"}
    set_lr(optimizer, 0.25)
    assert set(rates().values()) == {0.125, 0.25} and rates()["0.bias"] == 0.125
