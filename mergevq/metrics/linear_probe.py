"""Linear probes of cached features: all learning rates and weight decays at once, chosen on held-out images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mergevq.errors import ShapeError
from mergevq.metrics.probe import check_every_class, check_labelled, hold_out, ranked
from mergevq.metrics.probe_config import LinearConfig

# Added to variances, as in MAE's probes, but as a share of their mean: features of any size count alike.
_EPSILON = 1e-6
_ENTRIES = 2**26  # Of the logits that are held.

Point = tuple[float | None, float]
"""A learning rate (None for lbfgs) and a weight decay."""


@dataclass(frozen=True)
class Tried:
    """One pair of the sweep, and what it gave on the held-out training images."""

    learning_rate: float | None
    weight_decay: float
    top1: float | None
    """None if nothing had to be chosen."""
    loss: float | None
    """Mean cross-entropy."""


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear classifier of normalised features."""

    weight: Float[Tensor, "C D"]
    bias: Float[Tensor, " C"]
    mean: Float[Tensor, " D"]
    """Of the training features."""
    scale: Float[Tensor, " D"]
    """1 / sqrt(variance + 1e-6 of the variances' mean), of the training features."""
    learning_rate: float | None
    """The chosen one; None for lbfgs."""
    weight_decay: float
    sweep: tuple[Tried, ...]
    held_out: int
    """Training images that the choice was made on; 0 if there was one pair only."""

    def logits(self, features: Float[Tensor, "m D"]) -> Float[Tensor, "m C"]:
        """Returns the scores of each class."""
        x = (features.to(self.weight) - self.mean) * self.scale
        return x @ self.weight.T + self.bias

    def answers(self, features: Float[Tensor, "m D"]) -> Int[Tensor, "m A"]:
        """Returns the ranked answers of each image, at most five, on the CPU."""
        rows = max(1, _ENTRIES // len(self.weight))
        return torch.cat([ranked(self.logits(block)).cpu() for block in features.split(rows)])


def fit_linear_probe(
    features: Float[Tensor, "n D"],
    labels: Int[Tensor, " n"],
    *,
    num_classes: int,
    config: LinearConfig | None = None,
    held_out: float = 0.1,
    seed: int = 0,
) -> LinearProbe:
    """Returns the probe that is trained on all features with the settings that do best on a held-out part of them.

    Features are normalised by a batch normalisation without parameters; as all features are known, by their mean and
    variance over the whole training set instead of a moving average. The weights begin at 0. Every learning rate and
    weight decay trains a head of its own on the same batches, all in one pass, on all but the held-out images. The pair
    with the most right held-out answers (of equals: with the least held-out loss) is then trained again, alone, on all
    images. No test image takes part in the choice.

    adamw minimises the mean cross-entropy of minibatches; weight decay is decoupled and leaves the bias alone. lbfgs
    minimises mean cross-entropy + weight_decay / 2 * |W|^2 over the whole set, with a strong Wolfe line search.
    Computed where `features` lies, in their precision.

    Args:
        features: one row an image.
        labels: their classes.
        num_classes: C.
        config: how; None is the default.
        held_out: share of the training images to choose on; not used if there is nothing to choose.
        seed: of the held-out part and of the order.

    Raises:
        ShapeError: a number is not finite, a label is missing, a class has no image; or training diverged.
        ConfigError: the share is out of range.

    Reference:
        MergeVQ, supplement A.4: parameter-free batch normalisation and a linear layer, AdamW, 90 epochs, batches of
        1,024, cosine schedule, rate 1e-3; as in MAE (arXiv 2111.06377, A.1).
    """
    config = config or LinearConfig()
    check_labelled(features, labels, num_classes)
    check_every_class(labels, num_classes)
    labels, grid = labels.to(features.device), config.grid()
    sweep, best, chosen_on = [Tried(*grid[0], None, None)], grid[0], 0
    if len(grid) > 1:
        kept, held = (part.to(features.device) for part in hold_out(labels, held_out, seed))
        heads = _fit(features[kept], labels[kept], num_classes, grid, config, seed)
        sweep = _try(heads, grid, features[held], labels[held])
        best, chosen_on = _best(sweep), len(held)
    heads = _fit(features, labels, num_classes, (best,), config, seed)
    return LinearProbe(
        heads.weight[0], heads.bias[0], heads.mean, heads.scale, *best, sweep=tuple(sweep), held_out=chosen_on
    )


def _best(sweep: Sequence[Tried]) -> Point:
    chosen = max(sweep, key=lambda tried: (tried.top1 or 0.0, -(tried.loss or 0.0)))
    return chosen.learning_rate, chosen.weight_decay


class _Heads(NamedTuple):
    """Classifiers that share the normalisation of their input."""

    weight: Float[Tensor, "R C D"]
    bias: Float[Tensor, "R C"]
    mean: Float[Tensor, " D"]
    scale: Float[Tensor, " D"]


def _fit(
    features: Tensor, labels: Tensor, num_classes: int, grid: Sequence[Point], config: LinearConfig, seed: int
) -> _Heads:
    """One head for each point of the grid."""
    variance, mean = torch.var_mean(features, 0, correction=0)
    if not variance.isfinite().all():
        raise ShapeError("expected features whose variance is a finite number, got larger ones: divide them first")
    scale = (variance + _EPSILON * variance.mean().clamp_min(torch.finfo(variance.dtype).tiny / _EPSILON)).rsqrt()
    if config.optimizer == "adamw":
        weight, bias = _adamw(features, labels, num_classes, grid, config, seed, mean, scale)
    else:
        weight, bias = _lbfgs((features - mean) * scale, labels, num_classes, grid, config)
    fine = (weight.isfinite().all(2) & bias.isfinite()).all(1).tolist()
    for (rate, decay), good in zip(grid, fine, strict=True):
        if not good:
            raise ShapeError(
                f"expected a linear probe with finite weights, learning rate {rate} with weight decay {decay} "
                "diverged: leave them out"
            )
    return _Heads(weight, bias, mean, scale)


def _adamw(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    grid: Sequence[Point],
    config: LinearConfig,
    seed: int,
    mean: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    weights = [nn.Parameter(features.new_zeros(num_classes, features.shape[1])) for _ in grid]
    biases = [nn.Parameter(features.new_zeros(num_classes)) for _ in grid]
    groups = [
        {"params": [parameter], "lr": rate, "weight_decay": decay if parameter.ndim == 2 else 0.0}
        for parameters in (weights, biases)
        for parameter, (rate, decay) in zip(parameters, grid, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups)
    count, size = len(features), config.batch_size
    steps = config.epochs * math.ceil(count / size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    rng = torch.Generator().manual_seed(seed)
    for _ in range(config.epochs):
        order = torch.randperm(count, generator=rng).to(features.device)
        for batch in order.split(size):
            x = (features[batch] - mean) * scale
            logits = torch.addmm(torch.cat([*biases]), x, torch.cat([*weights]).T).view(-1, num_classes)
            # The sum over heads of their mean losses: no head's gradient depends on another.
            loss = F.cross_entropy(logits, labels[batch].repeat_interleave(len(grid))) * len(grid)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return torch.stack([*weights]).detach(), torch.stack([*biases]).detach()


def _lbfgs(
    x: Tensor, labels: Tensor, num_classes: int, grid: Sequence[Point], config: LinearConfig
) -> tuple[Tensor, Tensor]:
    weights, biases = [], []
    rows = max(1, _ENTRIES // num_classes)
    for _, decay in grid:
        weight = nn.Parameter(x.new_zeros(num_classes, x.shape[1]))
        bias = nn.Parameter(x.new_zeros(num_classes))
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=config.iterations,
            max_eval=2 * config.iterations,
            tolerance_grad=1e-9,
            tolerance_change=1e-14,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def loss(
            weight: nn.Parameter = weight,
            bias: nn.Parameter = bias,
            decay: float = decay,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> Tensor:
            optimizer.zero_grad()
            total = decay / 2 * weight.square().sum()
            total.backward()
            total = total.detach()
            for block, truth in zip(x.split(rows), labels.split(rows), strict=True):
                part = F.cross_entropy(block @ weight.T + bias, truth, reduction="sum") / len(x)
                part.backward()
                total = total + part.detach()
            return total

        optimizer.step(loss)
        weights.append(weight.detach())
        biases.append(bias.detach())
    return torch.stack(weights), torch.stack(biases)


@torch.no_grad()
def _try(heads: _Heads, grid: Sequence[Point], features: Tensor, labels: Tensor) -> list[Tried]:
    """What each head gives on the held-out images."""
    right = labels.new_zeros(len(grid))
    loss = torch.zeros(len(grid), dtype=torch.float64, device=labels.device)
    rows = max(1, _ENTRIES // heads.bias.numel())
    for block, truth in zip(features.split(rows), labels.split(rows), strict=True):
        x = (block - heads.mean) * heads.scale
        logits = torch.einsum("md,rcd->mrc", x, heads.weight) + heads.bias
        right += (logits.argmax(2) == truth[:, None]).sum(0)
        each = F.cross_entropy(logits.flatten(0, 1), truth.repeat_interleave(len(grid)), reduction="none")
        loss += each.double().view(-1, len(grid)).sum(0)
    shares = (right.double() / len(labels)).tolist()
    losses = (loss / len(labels)).tolist()
    tried = [Tried(*point, None, None) for point in grid]
    return [replace(each, top1=a, loss=b) for each, a, b in zip(tried, shares, losses, strict=True)]
