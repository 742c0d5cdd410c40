"""Optimizers, the learning-rate schedule as a pure function, averaged weights, gradient norms."""

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mergevq.training.config import OptimConfig

M = TypeVar("M", bound=nn.Module)


def run_progress(step: int, elapsed: float, steps: int, minutes: float) -> float:
    """Returns how much of a run is done, 0 to 1: the further of steps and minutes.

    Args:
        step: Optimizer steps done.
        elapsed: Training time so far in seconds.
        steps: Optimizer steps of the whole run.
        minutes: Training time of the whole run in minutes; 0 is no limit.
    """
    by_time = elapsed / (60 * minutes) if minutes > 0 else 0.0
    return min(1.0, max(step / steps, by_time))


def lr_factor(progress: float, step: int, optim: OptimConfig) -> float:
    """Returns the learning rate of optimizer step `step` (the first is 0) as a fraction of its peak.

    The warm-up counts steps and starts above zero; the schedule after it follows `progress`, 0 to 1, so that a run
    limited by time ends at the same rate as one limited by steps.
    """
    warmup = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps > 0 else 1.0
    if optim.schedule == "cosine":
        decay = optim.final_lr + (1 - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    elif optim.schedule == "step":
        decay = 0.1 ** sum(progress >= part for part in optim.decay_at)
    else:
        decay = 1.0
    return warmup * decay


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every parameter group the learning rate `lr`, times the scale of a group that has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def build_adamw(
    module: nn.Module, lr: float, optim: OptimConfig, lr_scale: Callable[[str], float] = lambda name: 1.0
) -> torch.optim.AdamW:
    """Returns AdamW over all parameters of `module` that ask for a gradient; weight decay touches matrices only.

    Matrices are the weights of linear layers and convolutions. Biases, norms, layer scales, the class token and learned
    queries are vectors or embeddings, whatever the number of their axes, and do not decay.

    Args:
        module: what is trained.
        lr: learning rate.
        optim: the rest.
        lr_scale: factor of the learning rate for the parameter of a name, which `set_lr` keeps.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for path, owner in module.named_modules():
        is_layer = isinstance(owner, nn.Linear | nn.modules.conv._ConvNd)
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad:
                scale = lr_scale(f"{path}.{name}" if path else name)
                groups.setdefault((scale, is_layer and name == "weight"), []).append(parameter)
    listed = [
        {"params": group, "lr": lr * scale, "lr_scale": scale, "weight_decay": optim.weight_decay if is_matrix else 0.0}
        for (scale, is_matrix), group in groups.items()
    ]
    # One kernel for all parameters; the meta device of a dry run has none.
    fused = all(p.device.type in ("cpu", "cuda") for group in groups.values() for p in group)
    return torch.optim.AdamW(listed, lr=lr, betas=optim.betas, fused=fused)


def average_weights(module: nn.Module, decay: float) -> AveragedModel:
    """Returns a frozen copy of `module` whose `update_parameters(module)` moves it by `1 - decay`; buffers are copied.

    The first update copies the weights.
    """
    ema = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False).eval()
    # The counter is read at each update; on a GPU that would wait for the device.
    ema.n_averaged = ema.n_averaged.cpu()
    return ema


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Returns the Euclidean norm of all gradients together, a scalar tensor."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float, norm: Tensor) -> None:
    """Scales the gradients in place so that their common norm `norm` becomes at most `largest`; 0 does nothing."""
    if largest > 0:
        nn.utils.clip_grads_with_norm_(list(parameters), largest, norm)
