"""Token merging: which tokens are alike, how many to merge in each layer, and where every patch went.

Written from the paper: Bolya et al., "Token Merging: Your ViT But Faster" (arXiv 2210.09461). Tokens travel as `[B, 1 +
n, D]` with the class token in front; it is never merged. Where a patch went is an index, never a matrix: following it
through a layer is one gather, and so is unmerging.
"""

import operator
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mergevq.errors import ConfigError, ShapeError


@dataclass(frozen=True, eq=False)
class SourceMap:
    """Which kept token each patch was merged into (the source matrix S of the MergeVQ paper, as an index).

    Attributes:
        index: patch l of image b went into kept token `index[b, l]`.
        num_tokens: K of each image; rows with a smaller K than the largest are padded wherever tokens have an axis of
            their own.

    `sizes`, `first` and `to_matrix` take that axis' width; without it they read the largest K, which waits for a GPU.
    """

    index: Int[Tensor, "B L"]
    num_tokens: Int[Tensor, " B"]

    @staticmethod
    def identity(batch: int, num_patches: int, device: torch.device | str | None = None) -> "SourceMap":
        """Returns the map of an encoder that merged nothing: patch l is token l."""
        index = torch.arange(num_patches, device=device).expand(batch, num_patches)
        return SourceMap(index, torch.full((batch,), num_patches, device=device))

    @staticmethod
    def from_matrix(matrix: Tensor, num_tokens: Int[Tensor, " B"] | None = None) -> "SourceMap":
        """Returns the map of a 0/1 source matrix `[B, K, L]`; `num_tokens` is K for every image unless given.

        Raises:
            ShapeError: a column does not hold exactly one 1.
        """
        if matrix.ndim != 3 or not bool(((matrix == 0) | (matrix == 1)).all()) or not bool((matrix.sum(1) == 1).all()):
            raise ShapeError(
                f"expected a source matrix [B, K, L] with exactly one 1 in each column, got shape {tuple(matrix.shape)}"
            )
        if num_tokens is None:
            num_tokens = torch.full((matrix.shape[0],), matrix.shape[1], device=matrix.device)
        # Of bytes: torch has no argmax of booleans.
        return SourceMap(matrix.to(torch.uint8).argmax(1), num_tokens)

    def then(self, step: "SourceMap") -> "SourceMap":
        """Returns the map of merging by `self` first and by `step` afterwards (associative).

        Raises:
            ShapeError: `step` does not start from as many tokens as `self` leaves.
        """
        if step.index.shape[0] != self.index.shape[0]:
            raise ShapeError(f"expected a step over {self.index.shape[0]} images, got one over {step.index.shape[0]}")
        if not torch.compiler.is_compiling() and step.index.shape[1] != self._width(None):
            raise ShapeError(f"expected a step over {self._width(None)} tokens, got one over {step.index.shape[1]}")
        return SourceMap(step.index.gather(1, self.index), step.num_tokens)

    def unmerge(self, tokens: Float[Tensor, "B K C"]) -> Float[Tensor, "B L C"]:
        """Returns the kept tokens copied to all their patches (equation 11 of the MergeVQ paper)."""
        return unmerge(tokens, self.index)

    def sizes(self, width: int | None = None) -> Int[Tensor, "B K"]:
        """Returns the number of patches of each kept token; they sum to L. Padding (and an unused token of a predicted
        map) is 0.
        """
        zeros = self.index.new_zeros(self.index.shape[0], self._width(width))
        return zeros.scatter_add(1, self.index, torch.ones_like(self.index))

    def first(self, width: int | None = None) -> Int[Tensor, "B K"]:
        """Returns the first raster position of each kept token; L where it has no patch."""
        return first_positions(self.index, self._width(width))

    def to_matrix(self, width: int | None = None) -> Float[Tensor, "B K L"]:
        """Returns the 0/1 source matrix, for display and tests."""
        zeros = torch.zeros(self.index.shape[0], self._width(width), self.index.shape[1], device=self.index.device)
        return zeros.scatter(1, self.index[:, None], 1.0)

    def to(self, device: torch.device | str) -> "SourceMap":
        """Returns the map on another device."""
        return SourceMap(self.index.to(device), self.num_tokens.to(device))

    def _width(self, width: int | None) -> int:
        return width if width is not None else int(self.num_tokens.max()) if self.num_tokens.numel() else 0


# ----------------------------------------------------------------------------------------------------- on plain tensors


def unmerge(tokens: Float[Tensor, "B K C"], source: Int[Tensor, "B L"]) -> Float[Tensor, "B L C"]:
    """Returns `tokens[b, source[b, l]]` for every patch l: one gather."""
    return tokens.gather(1, source[..., None].expand(-1, -1, tokens.shape[-1]))


def first_positions(source: Int[Tensor, "B L"], num_tokens: int) -> Int[Tensor, "B K"]:
    """Returns the first raster position of each of the `num_tokens` kept tokens, L where a token has no patch."""
    batch, num_patches = source.shape
    positions = torch.arange(num_patches, device=source.device).expand(batch, -1)
    start = source.new_full((batch, num_tokens), num_patches)
    return start.scatter_reduce(1, source, positions, "amin")


def match_tokens(metric: Float[Tensor, "B T D"], num_merged: int) -> Int[Tensor, "B T"]:
    """Finds the `num_merged` most similar pairs by bipartite soft matching and says where every token goes.

    Tokens at even positions each pick their most similar token at odd positions (cosine, float32); the best
    `num_merged` of these pairs are merged into the odd one. The class token at position 0 takes part in the counting
    and is never merged. Afterwards the remaining even tokens come first, in order, then all odd ones.

    Args:
        metric: what similarity is measured on, class token first.
        num_merged: pairs to merge, 1 .. (T - 1) // 2.

    Returns:
        The new position of each token, `0 .. T - num_merged - 1`; tokens with the same new position are merged.

    Reference: ToMe (arXiv 2210.09461), section 3.
    """
    # Autocast would multiply in bf16, where many similarities are equal and ties would decide.
    with torch.autocast(metric.device.type, enabled=False):
        metric = normalize(metric.float(), dim=-1)
        even, odd = metric[:, ::2], metric[:, 1::2]
        scores = even @ odd.mT
    best, partner = scores.max(-1)
    best = torch.cat([best.new_full((best.shape[0], 1), -torch.inf), best[:, 1:]], 1)
    # Stable, so that equal scores (flat image areas) are resolved alike on every run.
    order = best.argsort(dim=-1, descending=True, stable=True)
    merged = torch.zeros_like(best, dtype=torch.bool).scatter(1, order[:, :num_merged], True)
    num_left = even.shape[1] - num_merged
    target = torch.empty(metric.shape[:2], dtype=torch.int64, device=metric.device)
    target[:, ::2] = torch.where(merged, num_left + partner, (~merged).cumsum(1) - 1)
    target[:, 1::2] = num_left + torch.arange(odd.shape[1], device=metric.device)
    return target


def merge_tokens(
    x: Float[Tensor, "B T D"], sizes: Float[Tensor, "B T"], target: Int[Tensor, "B T"], num_tokens: int
) -> tuple[Float[Tensor, "B T2 D"], Float[Tensor, "B T2"]]:
    """Returns the size-weighted mean of the tokens that share a target, and the summed sizes.

    Args:
        x: tokens.
        sizes: patches in each token.
        target: new position of each token, as `match_tokens` gives it.
        num_tokens: number of new positions.
    """
    batch, _, width = x.shape
    offset = num_tokens * torch.arange(batch, device=x.device)[:, None]
    rows = (target + offset).flatten()
    total = x.new_zeros(batch * num_tokens, width).index_add(0, rows, (x * sizes[..., None]).flatten(0, 1))
    new_sizes = sizes.new_zeros(batch, num_tokens).scatter_add(1, target, sizes)
    return total.view(batch, num_tokens, width) / new_sizes[..., None], new_sizes


def match_and_merge(
    x: Float[Tensor, "B T D"],
    sizes: Float[Tensor, "B T"],
    source: Int[Tensor, "B L"],
    metric: Float[Tensor, "B T C"],
    num_merged: int,
) -> tuple[Float[Tensor, "B T2 D"], Float[Tensor, "B T2"], Int[Tensor, "B L"]]:
    """Merges `num_merged` tokens, in as many rounds as it takes (a round can merge at most half).

    Args:
        x: class token, then patches or what they have been merged into.
        sizes: patches in each token; 1 for the class token.
        source: the patch token (class token not counted) that each patch is in now.
        metric: what similarity is measured on; in further rounds its size-weighted mean.
        num_merged: tokens to remove, 0 .. T - 2.
    """
    while num_merged > 0:
        step = min(num_merged, (x.shape[1] - 1) // 2)
        num_merged -= step
        left = x.shape[1] - step
        target = match_tokens(metric, step)
        if num_merged > 0:
            metric, _ = merge_tokens(metric, sizes, target, left)
        x, sizes = merge_tokens(x, sizes, target, left)
        source = target[:, 1:].gather(1, source) - 1
    return x, sizes, source


def sort_by_raster(
    x: Float[Tensor, "B K D"], source: Int[Tensor, "B L"]
) -> tuple[Float[Tensor, "B K D"], Int[Tensor, "B L"]]:
    """Returns the kept tokens ordered by the first raster position of their patches, and the map that fits."""
    order = first_positions(source, x.shape[1]).argsort(1)
    rank = order.argsort(1)
    return unmerge(x, order), rank.gather(1, source)


# ------------------------------------------------------------------------------------------------------------ schedules

ScheduleKind = Literal["linear", "constant", "squared"]


def merge_schedule(
    num_patches: int,
    num_tokens: int,
    depth: int,
    kind: ScheduleKind = "linear",
    overflow: Literal["carry", "clip"] = "carry",
) -> tuple[int, ...]:
    """Returns how many tokens each of `depth` layers merges so that `num_tokens` of `num_patches` are kept.

    A layer can merge at most half of its patch tokens. With overflow "carry" what does not fit goes to the next layer,
    and what is left after the last one is added to it (`match_and_merge` then does further rounds), so K is met exactly
    for every K and depth. With "clip" it is dropped, and K may be missed: the way of the authors' release, which also
    allows `num_tokens` below 1 here.

    Args:
        num_patches: L.
        num_tokens: K, 1 .. L.
        depth: number of layers.
        kind: linear falls from 1.5 to 0.5 times the mean (the release); constant; squared falls with ((depth - i) /
            depth)^2 (the paper names it, without a formula).
        overflow: carry or clip.

    Raises:
        ConfigError: K is not in 1..L, or there is no layer.
    """
    if depth < 1:
        raise ConfigError(f"expected at least one layer to merge in, got depth {depth}")
    if num_tokens > num_patches or (num_tokens < 1 and overflow == "carry"):
        raise ConfigError(f"expected 1 <= num_tokens <= {num_patches} (the number of patches), got {num_tokens}")
    wanted = merge_counts(num_patches - num_tokens, depth, kind)
    left, carry, schedule = num_patches, 0, []
    for count in wanted:
        carry = carry + count if overflow == "carry" else count
        merged = min(max(carry, 0), left // 2)
        schedule.append(merged)
        left -= merged
        carry -= merged
    if overflow == "carry":
        schedule[-1] += carry
    return tuple(schedule)


@lru_cache(maxsize=4096)
def merge_counts(num_merged: int, depth: int, kind: ScheduleKind = "linear") -> tuple[int, ...]:
    """Returns `num_merged` spread over `depth` layers, regardless of what a layer can merge; the first entry may be
    negative.
    """
    if kind == "linear":
        counts = _nearest_linear(num_merged, depth)
    elif kind == "constant":
        counts = [num_merged // depth] * depth
    else:
        weights = [(depth - i) ** 2 for i in range(depth)]
        edges = [round(num_merged * sum(weights[:i]) / sum(weights)) for i in range(depth + 1)]
        counts = [b - a for a, b in pairwise(edges)]
    counts[0] += num_merged - sum(counts)
    return tuple(counts)


def linear_counts(mean: int, depth: int) -> list[int]:
    """Returns `depth` numbers that fall linearly from 1.5 to 0.5 times `mean`, truncated."""
    high = int(1.5 * mean)
    low = 2 * mean - high
    step = (low - high) / (depth - 1) if depth > 1 else 0.0
    return [int(high + step * i) for i in range(depth)]


def _nearest_linear(num_merged: int, depth: int) -> list[int]:
    """Returns the `linear_counts` whose sum is nearest to `num_merged`."""
    best, best_gap = [0] * depth, num_merged
    for mean in range(1, num_merged + 1):
        counts = linear_counts(mean, depth)
        gap = abs(sum(counts) - num_merged)
        if gap > best_gap:
            break
        if gap < best_gap:
            best, best_gap = counts, gap
    return best


def check_num_tokens(num_tokens: int | Sequence[int] | Tensor, batch: int, num_patches: int) -> list[int]:
    """Returns K of each of `batch` images from one number or a list (or an array or a tensor).

    Raises:
        ShapeError: not integers in 1..L, or not one number per image.
    """
    if hasattr(num_tokens, "tolist"):  # Tensors, and NumPy's arrays and numbers.
        num_tokens = num_tokens.tolist()
    if isinstance(num_tokens, Sequence) and not isinstance(num_tokens, str):
        counts = list(num_tokens)
    else:
        counts = [num_tokens] * batch
    if len(counts) != batch:
        raise ShapeError(f"expected one num_tokens per image ({batch}) or a single number, got {len(counts)}")
    checked = []
    for count in counts:
        # Anything that is an integer will do, NumPy's too; a bool is a mistake. Arrays have an __index__ that raises.
        whole = None
        if not isinstance(count, bool):
            with suppress(TypeError):
                whole = operator.index(count)
        if whole is None or not 1 <= whole <= num_patches:
            raise ShapeError(
                f"expected num_tokens to be an integer in 1..{num_patches} (the number of patches), got {count!r}"
            )
        checked.append(whole)
    return checked
