"""Writes a token cache: a data set encoded once, for training generators and recovery."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mergevq.data.cache_format import CacheSettings, View, check_views, index_name, source_name, token_folder
from mergevq.data.folder import ImageFolder
from mergevq.data.loader import Batch
from mergevq.data.shard_writer import write_shards
from mergevq.data.sources import training_images
from mergevq.data.token_cache import TokenCache
from mergevq.errors import ConfigError, DataError, ShapeError
from mergevq.merging import check_num_tokens
from mergevq.tokenizer.inputs import kept_tokens
from mergevq.tokenizer.model import MergeVQ


def write_token_cache(
    tok: MergeVQ,
    images: ImageFolder | str | Path,
    out: str | Path,
    *,
    num_tokens: int | Sequence[int] | None = None,
    views: Sequence[View] = ("crop",),
    size: int | None = None,
    shard_size: int = 4096,
    batch_size: int = 16,
    workers: int = 2,
    device: torch.device | str | None = None,
    force: bool = False,
    on_images: Callable[[int], None] | None = None,
) -> TokenCache:
    """Encodes every image at every K in every view, and returns the cache in the folder `out`.

    An image is decoded once. Unreadable ones are left out; `TokenCache.unreadable` names them. If `out` holds an
    unfinished cache of the same settings, images and tokenizer, its shards are kept and the missing ones are made; on
    the same machine with the same `batch_size` the files are those of an uninterrupted run.

    Args:
        tok: the tokenizer; used in evaluation mode and left in the mode it was in.
        images: what to encode, with its labels; or where it is, as `evaluate_reconstruction` takes it: a folder, a .zip
            or "embedded", of one with parts the part train.
        out: folder to write.
        num_tokens: one K or several, 1 .. L; None takes the tokenizer's own.
        views: "crop", "flip" or both.
        size: side in pixels; None takes the size the tokenizer was trained with.
        shard_size: images in a file. What an interrupted run loses at most.
        batch_size: images at a time.
        workers: processes that read images.
        device: where to compute; the tokenizer is moved there. None leaves it where it is.
        force: start anew, and remove the files of a cache that is in `out`. Others stay.
        on_images: called with the number of images done, those of shards that were there included.

    Raises:
        OutputExistsError: there is something else in `out`: a finished cache, one of other settings, other files.
        ConfigError, ShapeError: a setting is impossible for this tokenizer.
        DataError: there are no images, or none can be read.
        WriteError: the disk is full, or the folder does not allow files.
    """
    images = training_images(images)
    settings = _settings(tok, images, num_tokens, views, size, shard_size)
    if device is not None:
        tok.to(device)

    def encode(batch: Batch) -> dict[str, Tensor]:
        rows = {"label": batch["label"]}
        crop = batch["image"].to(tok.encoder.class_token.device)
        for view in settings.views:
            shown = crop.flip(-1) if view == "flip" else crop
            for k, tokens in zip(settings.num_tokens, tok.encode_each(shown, settings.num_tokens), strict=True):
                assert tokens.source is not None
                rows |= {index_name(view, k): tokens.index, source_name(view, k): tokens.source.index}
        return rows

    was_training = tok.training
    tok.eval()
    try:
        write_shards(
            token_folder(out),
            settings,
            images,
            encode,
            batch_size=batch_size,
            workers=workers,
            force=force,
            on_images=on_images,
        )
    finally:
        tok.train(was_training)
    return TokenCache(out)


def _settings(
    tok: MergeVQ,
    images: ImageFolder,
    num_tokens: int | Sequence[int] | None,
    views: Sequence[View],
    size: int | None,
    shard_size: int,
) -> CacheSettings:
    config = tok.config
    step, side = config.downsampling, config.image_size if size is None else size
    if side < step or side % step:
        raise ShapeError(f"expected a size that is a multiple of the tokenizer's downsampling {step}, got {side}")
    patches = (side // step) ** 2
    own = min(config.num_tokens, patches)
    counts = sorted({num_tokens} if isinstance(num_tokens, int) else set(num_tokens or (own,)))
    check_num_tokens(counts, len(counts), patches)
    for k in counts:
        kept = kept_tokens(config, patches, k)
        if kept != k:  # Only a converted model does so.
            raise ConfigError(f"expected a K that this tokenizer reaches, got {k}: it keeps {kept}, ask for that")
    if len(images) < 1:
        raise DataError(f"expected images to encode in {images.root}, got none")
    return CacheSettings(
        tokenizer=tok.fingerprint(),
        data=images.fingerprint(),
        data_images=len(images),
        image_size=side,
        grid=(side // step, side // step),
        num_bits=config.num_bits,
        num_tokens=tuple(counts),
        views=check_views(views),
        class_names=tuple(images.classes),
        num_classes=max(len(images.classes), max(images.labels) + 1),
        shard_size=shard_size,
    )
