"""Parallel decoding: several tokens of a random order sampled by one pass through the network.

The cache holds prefix and pairs of instruction and token as the sequence of training does. The instructions whose
tokens are sampled lie behind the finished pairs; the next step writes their own pairs over them:

    prefix | P_a x_a P_b x_b | P_c P_d P_e                   sampled: x_c x_d x_e
    prefix | P_a x_a P_b x_b | P_c x_c P_d x_d P_e x_e | ...

A finished pair sees what it saw in training, everything before it; an instruction that is sampled sees the finished
pairs and itself. The first of a group sees the same either way, so what it wrote stays.

Reference: RandAR (arXiv 2412.01827), with which MergeVQ section 4.2 samples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mergevq.errors import ConfigError
from mergevq.generator.generate import non_finite
from mergevq.generator.transformer import KeyValues, Transformer
from mergevq.sampling import GroupSampling, SamplingOptions, draw, filter_logits, guide

_CHUNK = 64  # A step reads as much of the cache as is written, rounded up to this.


def group_sizes(num_tokens: int, steps: int) -> tuple[int, ...]:
    """Returns how many tokens each step of parallel decoding samples: few at first, more the more is known.

    After step s of S, K (1 - cos(pi s / 2S)) tokens are done, but at least one more than before, and always so few that
    each step to come has one.

    Args:
        num_tokens: K.
        steps: S, 1 .. K; K is one at a time.

    Raises:
        ConfigError: steps is out of range.
    """
    if not 1 <= steps <= num_tokens:
        raise ConfigError(f"expected steps in 1..{num_tokens}, the number of tokens, got {steps}")
    done, sizes = 0, []
    for step in range(1, steps + 1):
        wanted = round(num_tokens * (1 - math.cos(math.pi / 2 * step / steps)))
        after = min(max(wanted, done + 1), num_tokens - (steps - step))
        sizes.append(after - done)
        done = after
    return tuple(sorted(sizes))  # Rounding may have put a larger step before a smaller one.


def step_bias(
    begin: int, first: int, end: int, capacity: int, device: torch.device | str | None = None
) -> Float[Tensor, "1 1 T S"]:
    """Returns what the slots fed in one step of parallel decoding see, 0 or -inf: T = end - begin, S = `capacity`.

    Slots from `begin` to `first` are finished pairs (or the prefix) and see every slot up to their own. Those from
    `first` to `end` are instructions whose tokens are sampled now: each sees what is finished and itself.

    Args:
        begin: first slot fed.
        first: first of the instructions.
        end: behind the last slot fed.
        capacity: slots of the cache.
        device: where to make it.
    """
    slot = torch.arange(begin, end, device=device)[:, None]
    key = torch.arange(capacity, device=device)
    seen: Bool[Tensor, "T S"] = (key <= slot) & ((key < first) | (key == slot))
    return torch.zeros(seen.shape, device=device).masked_fill(~seen, -torch.inf)[None, None]


@dataclass(frozen=True)
class Plan:
    """What is the same for all batches."""

    options: SamplingOptions
    branches: int
    """2 with guidance."""
    steps: int | None
    """None is one token at a time."""
    next_group: Callable[..., Tensor]
    """The function below, perhaps compiled."""
    dtype: torch.dtype
    """Of keys and values."""


class Decoded(NamedTuple):
    """Tokens, and what they cost."""

    index: Int[Tensor, "B K"]  # type: ignore[assignment]  # hides tuple.index, which nobody misses
    """In the order in which they were sampled."""
    forwards: int
    cache_bytes: int
    cache_slots: int


def decode_in_parallel(
    transformer: Transformer,
    prefix: Float[Tensor, "rows P D"],
    instructions: Float[Tensor, "B K D"],
    rotation: Float[Tensor, "B S pairs 2"],
    uniforms: Float[Tensor, "B K G"],
    plan: Plan,
) -> Decoded:
    """Returns the tokens of a batch, sampled in the order of their instructions.

    Args:
        transformer: in evaluation mode.
        prefix: what comes before the pairs; once for each branch of guidance.
        instructions: one for each token.
        rotation: of prefix and pairs, S = P + 2 K.
        uniforms: noise of each draw.
        plan: how.

    Raises:
        ShapeError: the network's numbers are not finite.
    """
    config, device, branches = transformer.config, prefix.device, plan.branches
    length, (images, num_tokens, num_groups) = prefix.shape[1], uniforms.shape
    # Guidance comes as a tensor: compiled code would be compiled again for every scale.
    groups = tuple(group._replace(guidance=1.0) for group in plan.options.per_group(num_groups))
    sizes = group_sizes(num_tokens, plan.steps or num_tokens)
    # Copied to the device at once: a copy from the host in every step would make the host wait.
    progress = [sum(sizes[:step]) / max(1, num_tokens - 1) for step in range(len(sizes))]
    scales = torch.tensor([plan.options.scales(num_groups, done) for done in progress], device=device)
    # Nothing follows the last token.
    capacity = length + 2 * num_tokens - 1
    memory = KeyValues.empty(config.depth, images * branches, capacity, config, device, plan.dtype)
    total = torch.zeros((), device=device)
    rotation = rotation.repeat(branches, 1, 1, 1)
    fed, begin, done, parts = prefix, 0, 0, []
    for size, scale in zip(sizes, scales, strict=True):
        now, first = slice(done, done + size), length + 2 * done
        end = first + size
        seen = min(capacity, -(-end // _CHUNK) * _CHUNK)
        index = plan.next_group(
            transformer,
            torch.cat([fed, instructions[:, now].repeat(branches, 1, 1)], 1),
            torch.cat([rotation[:, begin:first], rotation[:, first : first + 2 * size : 2]], 1),
            step_bias(begin, first, end, seen, device),
            memory.first(seen),
            torch.arange(begin, end, device=device),
            uniforms[:, now],
            scale,
            total,
            groups,
        )
        parts.append(index)
        pairs = torch.stack([instructions[:, now], transformer.embed(index)], 2).flatten(1, 2)
        # All but the first instruction, which is in its place.
        fed, begin, done = pairs[:, 1:].repeat(branches, 1, 1), first + 1, done + size
    if not bool(torch.isfinite(total)):
        raise non_finite()
    return Decoded(torch.cat(parts, 1), len(sizes), memory.num_bytes(), capacity)


def next_group(
    transformer: Transformer,
    x: Float[Tensor, "rows T D"],
    rotation: Float[Tensor, "rows T P 2"],
    bias: Float[Tensor, "1 1 T S"],
    cache: KeyValues,
    slots: Int[Tensor, " T"],
    uniforms: Float[Tensor, "B N G"],
    scales: Float[Tensor, " G"],
    total: Float[Tensor, ""],
    groups: tuple[GroupSampling, ...],
) -> Int[Tensor, "B N"]:
    """Returns the tokens of the N instructions at the end of `x`; compiles as one graph.

    Args:
        transformer: in evaluation mode.
        x: what is not yet in the cache, then the instructions; once for each branch of guidance.
        rotation: of these.
        bias: what they see, see `step_bias`.
        cache: receives them.
        slots: where.
        uniforms: noise of each draw.
        scales: guidance of each bit group.
        total: receives the sum of all guided logits, which is not finite if one of them is not.
        groups: how each bit group is sampled, but for guidance.
    """
    images, count = uniforms.shape[:2]
    hidden = transformer(x, rotation, bias, cache, slots)[:, -count:]
    guided = hidden.shape[0] > images

    def choose(group: int, logits: Tensor) -> Tensor:
        logits = logits.float()
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = guide(conditional, unconditional, scales[group])
        total.add_(logits.sum())
        how = groups[group]
        return draw(filter_logits(logits, how.temperature, how.top_k, how.top_p), uniforms[:, :, group].flatten())

    return transformer.sample_groups(hidden.flatten(0, 1), choose).unflatten(0, (images, count))
