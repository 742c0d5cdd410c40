"""What the training of recovery works on: a tokenizer, its tokens, and what these decide about the run."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mergevq.data.token_cache import TokenCache
from mergevq.errors import ConfigError, DataError
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.inputs import open_tokenizer
from mergevq.training.recovery_config import RecoveryRun


class RecoveryInputs(NamedTuple):
    """A tokenizer and its tokens."""

    tok: MergeVQ
    """Never changed."""
    train: TokenCache
    val: TokenCache


def open_inputs(
    run: RecoveryRun,
    out: Path,
    tokenizer: str | Path | MergeVQ | None = None,
    cache: str | Path | TokenCache | None = None,
    val_cache: str | Path | TokenCache | None = None,
    world_size: int = 1,
) -> RecoveryInputs:
    """Returns what is given, and what the run names for what is not given.

    Args:
        run: names a tokenizer and two caches.
        out: folder that the run writes to.
        tokenizer: instead of `run.data.tokenizer`.
        cache: instead of `run.data.tokens`.
        val_cache: instead of `run.data.val_tokens`.
        world_size: processes that share the held-out images.

    Raises:
        ConfigError: something is neither given nor named, or the tokenizer lies in `out`, where it would be replaced.
        CheckpointError: there is no such tokenizer.
        TokenFileError: a cache is missing or damaged, or another tokenizer made it.
        DataError: there are fewer held-out images than processes.
    """
    tok = open_tokenizer(run.data.tokenizer if tokenizer is None else tokenizer, out, "whose recovery is trained")
    train = _open(run.data.tokens if cache is None else cache, "data.tokens", tok)
    val = _open(run.data.val_tokens if val_cache is None else val_cache, "data.val_tokens", tok)
    if min(len(val), run.loop.val_images) < world_size:
        raise DataError(f"expected a held-out image for each of {world_size} processes, got {len(val)}")
    return RecoveryInputs(tok, train, val)


def _open(place: str | Path | TokenCache, field: str, tok: MergeVQ) -> TokenCache:
    if isinstance(place, TokenCache):
        place = place.folder
    if not str(place):
        raise ConfigError(f"expected {field}, a folder that `mergevq cache-tokens` wrote, got none")
    return TokenCache(place, expect_tokenizer=tok.fingerprint())


def goes_on(run: RecoveryRun, tok: MergeVQ) -> bool:
    """Returns whether the tokenizer's own recovery is trained further."""
    return run.fine_tune and tok.config.recovery.enabled


def resolve(run: RecoveryRun, inputs: RecoveryInputs) -> RecoveryRun:
    """Returns the run with what tokenizer and caches decide: the shape of a recovery that is there, and the K.

    Raises:
        ConfigError: a cache has no K, or not the wanted K, at which something was merged, or the tokenizer cannot have
            such a recovery.
    """
    config = inputs.tok.config
    if goes_on(run, inputs.tok):
        run = replace(run, recovery=config.recovery)
    replace(config, recovery=run.recovery)  # Checks that they go together.
    train = _merged("num_tokens", run.loop.num_tokens, inputs.train)
    val = _merged("val_num_tokens", run.loop.val_num_tokens, inputs.val)
    return replace(run, loop=replace(run.loop, num_tokens=train, val_num_tokens=val))


def _merged(field: str, wanted: tuple[int, ...], cache: TokenCache) -> tuple[int, ...]:
    """Returns the wanted K, or all of the cache, at which patches share tokens: at K = L the map is the identity."""
    patches = cache.grid[0] * cache.grid[1]
    counts = wanted or tuple(k for k in cache.num_tokens if k < patches)
    if not counts:
        raise ConfigError(
            f"{cache.folder}: expected tokens at a K below {patches}, got {patches} only, a token for each patch: "
            "there is no source to recover, encode the images at smaller K"
        )
    if max(counts) >= patches:
        raise ConfigError(
            f"loop.{field} must lie in 1..{patches - 1}, got {max(counts)}: with a token for each patch there is no "
            "source to recover"
        )
    cache.check_holds(counts, cache.views[:1])
    return counts
