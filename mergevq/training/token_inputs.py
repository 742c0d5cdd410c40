"""What the training of a generator is fed: tokens from a cache or from images as they come, and their tokenizer."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from mergevq.data.augment import Views
from mergevq.data.folder import ImageFolder
from mergevq.data.loader import evaluation_batches, training_batches
from mergevq.data.sources import training_and_validation
from mergevq.data.token_batches import encoded_batches, evaluation_token_batches, token_batches
from mergevq.data.token_cache import TokenBatch, TokenCache
from mergevq.errors import ConfigError, DataError
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.generator_config import GeneratorRun, TokenFacts, fit_model

_FACTS = ("grid", "num_bits", "num_classes", "class_names", "tokenizer")


class TokenInputs(NamedTuple):
    """Tokens, or images and what encodes them, and the tokenizer that draws the samples."""

    train: TokenCache | ImageFolder
    val: TokenCache | ImageFolder
    tokenizer: MergeVQ | None

    def on(self, device: torch.device) -> "TokenInputs":
        """Returns the same with a tokenizer on `device`; the one given stays where it is."""
        tok = self.tokenizer
        if tok is None or next(tok.parameters()).device == device:
            return self
        return self._replace(tokenizer=copy.deepcopy(tok).to(device))


def open_tokens(
    run: GeneratorRun,
    cache: TokenCache | None = None,
    val_cache: TokenCache | None = None,
    tokenizer: MergeVQ | str | Path | None = None,
    world_size: int = 1,
) -> tuple[GeneratorRun, TokenInputs]:
    """Returns what is given, and what the run names for what is not given; and the run with what the tokens decide.

    Raises:
        TokenFileError: a cache is missing, damaged or empty, or of another tokenizer than `tokenizer`.
        CheckpointError: there is no such tokenizer.
        DataError: the held-out tokens are not like those to train on or fewer than the processes, or images are
            missing.
        ConfigError: no tokens are named, or no tokenizer to make them, or the run does not fit them.
    """
    data = run.data
    if tokenizer is None and data.tokenizer:
        tokenizer = data.tokenizer
    tok = tokenizer if isinstance(tokenizer, MergeVQ) or tokenizer is None else MergeVQ.from_pretrained(tokenizer)
    train: TokenCache | ImageFolder
    val: TokenCache | ImageFolder
    if cache is not None or data.tokens:
        fingerprint = None if tok is None else tok.fingerprint()
        train = TokenCache(data.tokens, fingerprint) if cache is None else TokenCache(cache.folder, fingerprint)
        if val_cache is None and not data.val_tokens:
            raise ConfigError(
                "expected data.val_tokens, a token cache of held-out images, beside data.tokens, got none"
            )
        val = TokenCache(data.val_tokens) if val_cache is None else val_cache
        _check_alike(train, val)
        run = fit_model(run, train)
        val.check_holds(run.loop.val_num_tokens, val.views[:1])
    elif data.train:
        if tok is None:
            raise ConfigError("expected data.tokenizer to encode the images of data.train, got none: name one")
        train, val = training_and_validation(data.train, data.val, data.val_fraction)
        run = fit_model(run, _facts(run, tok, train))
    else:
        raise ConfigError(
            "expected data.tokens, a folder that `mergevq cache-tokens` wrote, or data.train, images to encode as they "
            "come, got neither"
        )
    if min(len(val), run.loop.val_images) < world_size:
        raise DataError(f"expected a held-out image for each of {world_size} processes, got {len(val)}")
    return run, TokenInputs(train, val, tok)


def token_stream(
    run: GeneratorRun, inputs: TokenInputs, rank: int, world_size: int, start: int
) -> Iterator[TokenBatch]:
    """Returns the micro-batches of one process without end, from number `start` on."""
    data, loop = run.data, run.loop
    if isinstance(inputs.train, TokenCache):
        return token_batches(
            inputs.train,
            batch_size=loop.batch_size,
            seed=loop.seed,
            num_tokens=loop.num_tokens,
            num_tokens_probs=loop.num_tokens_probs,
            rank=rank,
            world_size=world_size,
            start_batch=start,
        )
    assert inputs.tokenizer is not None
    images = training_batches(
        inputs.train,
        Views(inputs.tokenizer.config.image_size, data.crop, data.flip),
        batch_size=loop.batch_size,
        seed=loop.seed,
        rank=rank,
        world_size=world_size,
        workers=data.workers,
        start_batch=start,
    )
    return encoded_batches(
        inputs.tokenizer,
        images,
        seed=loop.seed,
        num_tokens=loop.num_tokens,
        num_tokens_probs=loop.num_tokens_probs,
        start_batch=start,
    )


def held_out_tokens(
    run: GeneratorRun, inputs: TokenInputs, num_tokens: int, rank: int, world_size: int
) -> Iterator[TokenBatch]:
    """Yields each of `run.loop.val_images` held-out images once, in batches, those of this process.

    Raises:
        DataError: this process could read none of its images.
    """
    loop = run.loop
    if isinstance(inputs.val, TokenCache):
        yield from evaluation_token_batches(
            inputs.val,
            batch_size=loop.batch_size,
            num_tokens=num_tokens,
            view=inputs.val.views[0],
            limit=loop.val_images,
            rank=rank,
            world_size=world_size,
        )
        return
    assert inputs.tokenizer is not None
    images = evaluation_batches(
        inputs.val,
        inputs.tokenizer.config.image_size,
        batch_size=loop.batch_size,
        rank=rank,
        world_size=world_size,
        limit=loop.val_images,
        workers=run.data.workers,
    )
    for batch in images:
        yield from encoded_batches(inputs.tokenizer, [batch], seed=0, num_tokens=(num_tokens,))


def _check_alike(train: TokenCache, val: TokenCache) -> None:
    for name in _FACTS:
        expected, came = getattr(train, name), getattr(val, name)
        if expected != came:
            raise DataError(
                f"expected held-out tokens like those of {train.folder}, got {name} {_short(came)} instead of "
                f"{_short(expected)} in {val.folder}: cache both with the same tokenizer and the same classes"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _facts(run: GeneratorRun, tok: MergeVQ, images: ImageFolder) -> TokenFacts:
    side = tok.config.image_size // tok.config.downsampling
    counts = run.loop.num_tokens or (tok.config.num_tokens,)
    classes = tuple(images.classes)
    return TokenFacts((side, side), tok.config.num_bits, len(classes), classes, tok.fingerprint(), counts)
