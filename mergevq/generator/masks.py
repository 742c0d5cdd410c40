"""What the row of each token sees, as dense tensors: the definition that caches are tested against, used in training.

Tokens are 0 .. L-1. Row t is the slot that predicts token t: the slot that holds token t-1, or the last of the prefix
for t = 0. It sees the prefix, the R tokens right before t, and of older tokens one of each kind.

Reference: MergeVQ section 4.1 and figure 6. Where they leave room, docs/method.md says what is done here.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from mergevq.generator.config import MaskConfig


def merge_mask(index: Int[Tensor, "B L"], mask: MaskConfig) -> Bool[Tensor, "B L L"]:
    """Returns whether row t sees key j, both tokens; never for j >= t.

    It does if t - j <= R, or

    - keep first: no i < j has the same index;
    - keep last: no i with j < i < t - R has.

    Args:
        index: of every patch in raster order; or any labels, of which only equality counts.
        mask: R = None sees all j < t.
    """
    length = index.shape[1]
    position = torch.arange(length, device=index.device)
    distance = position[:, None] - position
    earlier = distance > 0
    if mask.recent is None:
        return earlier.expand(index.shape[0], -1, -1)
    # [B, j, i]: token i comes after j and has its index.
    repeats = (index[:, :, None] == index[:, None]).triu(1)
    if mask.keep == "first":
        kept = ~repeats.any(1)[:, None]
    else:
        following = torch.where(repeats, position, length).amin(2)
        kept = following[:, None] >= (position - mask.recent)[:, None]
    return earlier & ((distance <= mask.recent) | kept)


def key_counts(index: Int[Tensor, "B L"], mask: MaskConfig) -> Int[Tensor, "B L L"]:
    """Returns how many tokens key j stands for in row t: 1 for recent ones, otherwise the number of i < t - R with the
    index of j.

    Args:
        index: as in `merge_mask`.
        mask: R = None counts 1 everywhere.
    """
    length = index.shape[1]
    position = torch.arange(length, device=index.device)
    ones = torch.ones(index.shape[0], length, length, dtype=torch.int32, device=index.device)
    if mask.recent is None:
        return ones
    equal = index[:, :, None] == index[:, None]
    up_to = pad(equal.cumsum(1, dtype=torch.int32), (0, 0, 1, 0))  # [B, n, j]: tokens i < n with the index of j.
    old = (position - mask.recent).clamp_min(0)
    recent = position[:, None] - position <= mask.recent
    return torch.where(recent, ones, up_to.index_select(1, old))


def attention_bias(index: Int[Tensor, "B L"], mask: MaskConfig, prefix_length: int) -> Float[Tensor, "B 1 T T"] | None:
    """Returns what is added to the attention logits in training, T = P + L - 1: prefix and all tokens but the last.

    -inf hides a key; with `mask.proportional` a key that stands for c tokens gets log c. None is plain causal.

    Args:
        index: as in `merge_mask`.
        mask: which keys are seen.
        prefix_length: P; the prefix is causal, and every token sees all of it.
    """
    if mask.recent is None:
        return None
    seen = merge_mask(index, mask)[:, :, :-1]
    bias = torch.zeros(seen.shape, device=index.device)
    if mask.proportional:
        bias = key_counts(index, mask)[:, :, :-1].float().log()
    bias = bias.masked_fill(~seen, -torch.inf)
    # Row t belongs to the slot before token t, so the slots before the last of the prefix have no row yet.
    bias = pad(bias, (prefix_length, 0, prefix_length - 1, 0))
    slot = torch.arange(bias.shape[-1], device=index.device)
    hidden = (slot > slot[:, None]) & (slot[:, None] < prefix_length)
    return bias.masked_fill(hidden, -torch.inf)[:, None]
