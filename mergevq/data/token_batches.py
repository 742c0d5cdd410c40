"""Token batches for training a generator: from a cache, or from images that are encoded as they come.

The order and every draw depend on (seed, batch number, process) alone, as in mergevq/data/loader.py: batch g of W
processes with B samples each is the same W * B samples as batch g of one process with W * B.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mergevq.data.cache_format import View
from mergevq.data.loader import Batch, EpochOrder
from mergevq.data.token_cache import TokenBatch, TokenCache
from mergevq.errors import ConfigError
from mergevq.tokenizer.model import MergeVQ

_DRAWS = 1  # Tells these draws from those of the same sample's crops.


def token_batches(
    cache: TokenCache,
    *,
    batch_size: int,
    seed: int,
    num_tokens: Sequence[int] = (),
    num_tokens_probs: Sequence[float] = (),
    views: Sequence[View] = (),
    rank: int = 0,
    world_size: int = 1,
    start_batch: int = 0,
) -> Iterator[TokenBatch]:
    """Returns training batches without end, each epoch in a new order; every sample draws its own K and view.

    A cache smaller than `batch_size * world_size` is repeated within the batch. Does not touch the global random
    state.

    Args:
        cache: the tokens.
        batch_size: samples in a batch of one process.
        seed: of order, K and views.
        num_tokens: K to draw from; all of the cache's by default.
        num_tokens_probs: how likely each of them is, in proportion; equal by default.
        views: to draw from, all alike; all of the cache's by default.
        rank: number of this process.
        world_size: how many processes share each global batch.
        start_batch: batches that an earlier part of the run has seen.

    Raises:
        ConfigError: the cache does not hold such a K or view, or a number is out of its range.
    """
    counts, seen = tuple(num_tokens) or cache.num_tokens, tuple(views) or cache.views
    cache.check_holds(counts, seen)
    limits = _limits(counts, num_tokens_probs)
    order = EpochOrder(len(cache), batch_size, seed, rank, world_size, start_batch)

    def batches() -> Iterator[TokenBatch]:
        for draws in order:
            noise = [_uniforms(seed, draw.epoch, draw.position) for draw in draws]
            drawn = [_choose(counts, limits, u[0]) for u in noise]
            shown = [seen[int(u[1] * len(seen))] for u in noise]
            yield cache.batch([draw.number for draw in draws], drawn, shown)

    return batches()


def evaluation_token_batches(
    cache: TokenCache,
    *,
    batch_size: int,
    num_tokens: int,
    view: View = "crop",
    limit: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[TokenBatch]:
    """Returns batches with every image once, in order.

    Args:
        cache: the tokens.
        batch_size: images in a batch; the last has fewer.
        num_tokens: K.
        view: which view of each image.
        limit: take only so many, evenly spread over the cache; None takes all.
        rank: number of this process, which gets every `world_size`-th image.
        world_size: how many processes share the images.

    Raises:
        ConfigError: the cache does not hold such a K or view, or a number is out of its range.
    """
    total = len(cache)
    count = total if limit is None else min(limit, total)
    if batch_size < 1 or count < 1:
        raise ConfigError(f"expected a batch_size and a limit of at least 1, got {batch_size} and {limit}")
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank must lie in 0..{world_size - 1}, got {rank}")
    cache.check_holds((num_tokens,), (view,))
    rows = [i * total // count for i in range(count)][rank::world_size]
    return (cache.batch(rows[i : i + batch_size], num_tokens, view) for i in range(0, len(rows), batch_size))


def encoded_batches(
    tok: MergeVQ,
    batches: Iterable[Batch],
    *,
    seed: int,
    num_tokens: Sequence[int],
    num_tokens_probs: Sequence[float] = (),
    start_batch: int = 0,
) -> Iterator[TokenBatch]:
    """Returns token batches of image batches, on the tokenizer's device, encoding each image when its turn comes.

    Args:
        tok: the tokenizer.
        batches: of `training_batches`, begun at the same `start_batch`; their crops and mirroring are what is encoded.
        seed: of K.
        num_tokens: K to draw from, 1 .. L; all samples of a batch, on all processes, have the same.
        num_tokens_probs: how likely each of them is, in proportion; equal by default.
        start_batch: batches that an earlier part of the run has seen.

    Raises:
        ConfigError: there are no K, or the probabilities do not fit.
        ShapeError: a K is impossible for the images.
    """
    counts = tuple(num_tokens)
    if not counts:
        raise ConfigError("expected at least one num_tokens to encode at, got none")
    limits = _limits(counts, num_tokens_probs)

    def encoded() -> Iterator[TokenBatch]:
        for number, batch in enumerate(batches, start_batch):
            tokens = tok.encode(batch["image"], _choose(counts, limits, _uniforms(seed, number, 0)[0]))
            assert tokens.source is not None
            yield {
                "index": tokens.index,
                "source": tokens.source.index,
                "num_tokens": tokens.num_tokens,
                "label": batch["label"].to(tokens.index.device),
                "number": batch["number"].to(tokens.index.device),
            }

    return encoded()


def _uniforms(seed: int, epoch: int, sample: int) -> NDArray[np.float64]:
    """Returns two numbers in 0..1, below 1, that depend on the arguments alone."""
    words = np.random.SeedSequence((seed % 2**64, epoch, sample, _DRAWS)).generate_state(2, np.uint64)
    return (words >> np.uint64(11)) * 2.0**-53


def _limits(values: Sequence[int], probs: Sequence[float]) -> NDArray[np.float64]:
    """Returns the upper ends of the parts of 0..1 that belong to each value."""
    weights = np.array(probs or [1.0] * len(values), dtype=np.float64)
    if len(weights) != len(values):
        raise ConfigError(
            f"expected num_tokens_probs to have {len(values)} entries, one for each K, got {len(weights)}"
        )
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.sum() > 0):
        raise ConfigError(f"expected num_tokens_probs of at least 0 and not all 0, got {tuple(probs)}")
    limits: NDArray[np.float64] = weights.cumsum()
    return limits / limits[-1]


def _choose(values: Sequence[int], limits: NDArray[np.float64], uniform: float) -> int:
    return values[int(np.searchsorted(limits, uniform, side="right"))]
