"""Writes a token cache: one shard after the other, each whole or not at all, so that a killed run is gone on with."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mergevq import __version__
from mergevq.configuration import config_to_dict
from mergevq.data.cache_format import (
    FORM,
    MANIFEST,
    UNFINISHED,
    CacheSettings,
    View,
    check_views,
    file_hash,
    index_name,
    shard_name,
    source_name,
)
from mergevq.data.folder import ImageFolder
from mergevq.data.images import all_unreadable
from mergevq.data.loader import evaluation_batches
from mergevq.data.token_cache import TokenCache
from mergevq.data.token_shards import Arrays, map_shard, read_shard_header, save_shard
from mergevq.errors import CheckpointError, ConfigError, DataError, OutputExistsError, ShapeError, TokenFileError
from mergevq.files import check_format, read_json, refuse_existing, write_json
from mergevq.merging import check_num_tokens, merge_schedule
from mergevq.tokenizer.model import MergeVQ

_UNFINISHED_FORM = "unfinished-token-cache/1"
_SHARD = re.compile(r"shard-\d{5,}\.safetensors")
_TEMPORARY = re.compile(r"\.(shard-\d{5,}|manifest|unfinished)\.[0-9a-f]{8}\.tmp\.(safetensors|json)")


def write_token_cache(
    tok: MergeVQ,
    images: ImageFolder,
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
        images: what to encode, with its labels.
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
    out = Path(out)
    settings = _settings(tok, images, num_tokens, views, size, shard_size)
    if batch_size < 1 or workers < 0:
        raise ConfigError(f"expected batch_size of at least 1 and workers of at least 0, got {batch_size}, {workers}")
    if _claim(out, settings, force):
        return TokenCache(out)
    key = hashlib.sha256(json.dumps(config_to_dict(settings), sort_keys=True).encode()).hexdigest()
    report = on_images or (lambda done: None)
    if device is not None:
        tok.to(device)
    was_training = tok.training
    tok.eval()
    try:
        for number in range(settings.num_shards):
            path, first = out / shard_name(number), number * shard_size
            part = images.select(range(first, min(first + shard_size, len(images))))
            if _is_done(path, key):
                report(len(part))
                continue
            arrays = _encode(tok, part, first, settings, batch_size, workers, report)
            save_shard(path, arrays, {"settings": key, "unreadable": json.dumps(part.unreadable, ensure_ascii=False)})
    finally:
        tok.train(was_training)
    return _finish(out, settings)


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
        merging = config.merging
        kept = patches - sum(merge_schedule(patches, k, config.encoder.depth, merging.schedule, merging.overflow))
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


# ---------------------------------------------------------------------------------------------------------- encoding


def _encode(
    tok: MergeVQ,
    part: ImageFolder,
    first: int,
    settings: CacheSettings,
    batch_size: int,
    workers: int,
    report: Callable[[int], None],
) -> Arrays:
    """Returns the arrays of the shard whose images are `part`, which begins with image `first` of the data set."""
    layout = settings.layout(0)
    columns: dict[str, list[NDArray[Any]]] = {name: [np.zeros(shape, kind)] for name, (kind, shape) in layout.items()}

    def add(name: str, values: torch.Tensor) -> None:
        columns[name].append(values.cpu().numpy().astype(layout[name][0]))

    read = 0
    try:
        for batch in evaluation_batches(part, settings.image_size, batch_size=batch_size, workers=workers):
            add("label", batch["label"])
            add("number", batch["number"] + first)
            crop = batch["image"].to(tok.encoder.class_token.device)
            for view in settings.views:
                shown = crop.flip(-1) if view == "flip" else crop
                for k in settings.num_tokens:
                    tokens = tok.encode(shown, k)
                    assert tokens.source is not None
                    add(index_name(view, k), tokens.index)
                    add(source_name(view, k), tokens.source.index)
            read += len(crop)
            report(len(crop))
    except DataError:
        if len(part.unreadable) < len(part):
            raise
    if read < len(part):
        report(len(part) - read)
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def _is_done(path: Path, key: str) -> bool:
    try:
        return path.exists() and read_shard_header(path).get("settings") == key
    except TokenFileError:
        return False  # Damaged after it was written: it is made again.


def _finish(out: Path, settings: CacheSettings) -> TokenCache:
    shards: list[dict[str, Any]] = []
    unreadable: dict[str, str] = {}
    for number in range(settings.num_shards):
        path = out / shard_name(number)
        images = len(map_shard(path)["label"])
        shards.append({"file": path.name, "images": images, "bytes": path.stat().st_size, "sha256": file_hash(path)})
        unreadable |= json.loads(read_shard_header(path)["unreadable"])
    total = sum(shard["images"] for shard in shards)
    if not total:
        _remove(out)  # So that a later run looks again: what kept the images from being read may be over by then.
        raise DataError(all_unreadable(len(unreadable), next(iter(unreadable.values()))))
    manifest = {
        "mergevq": FORM,
        "version": __version__,
        "settings": config_to_dict(settings),
        "num_images": total,
        "shards": shards,
        "unreadable": unreadable,
    }
    write_json(out / MANIFEST, manifest)
    (out / UNFINISHED).unlink()
    return TokenCache(out)


# --------------------------------------------------------------------------------------------------------- the folder


def check_free(out: str | Path, force: bool) -> None:
    """Checks that a cache could be written to `out`, or gone on with; `write_token_cache` checks the settings too.

    Raises:
        OutputExistsError: there is a finished cache, or something else.
    """
    out = Path(out)
    if _is_begun(out):
        return
    if not force and _is_finished(out):
        raise _finished_error(out)
    refuse_existing(out, force)


def _claim(out: Path, settings: CacheSettings, force: bool) -> bool:
    """Makes `out` hold an unfinished cache of these settings, whose shards are kept; returns whether it is finished.

    Raises:
        OutputExistsError: there is something else.
    """
    check_free(out, force)
    finished, begun = _is_finished(out), _is_begun(out)
    if begun and not force:
        if finished:  # Taking this record away is all that the run that finished it had left to do.
            if TokenCache(out).settings != settings:
                raise _finished_error(out)
            (out / UNFINISHED).unlink()
            return True
        record = read_json(out / UNFINISHED)
        check_format(record, _UNFINISHED_FORM, out / UNFINISHED)
        _check_same(out, record.get("settings"), settings)
        for path in list(out.iterdir()):
            if _TEMPORARY.fullmatch(path.name):
                path.unlink()
        return False
    if begun or finished:
        _remove(out)
    record = {"mergevq": _UNFINISHED_FORM, "version": __version__, "settings": config_to_dict(settings)}
    write_json(out / UNFINISHED, record)
    return False


def _is_finished(out: Path) -> bool:
    return _kind(out / MANIFEST) == FORM.partition("/")[0]


def _is_begun(out: Path) -> bool:
    return _kind(out / UNFINISHED) == _UNFINISHED_FORM.partition("/")[0]


def _finished_error(out: Path) -> OutputExistsError:
    return OutputExistsError(
        f"{out} holds a finished token cache: choose another folder, or start anew with --force (force=True)"
    )


def _kind(path: Path) -> str | None:
    """Returns what kind of record of ours a JSON file is; None if it is none."""
    try:
        return str(read_json(path)["mergevq"]).partition("/")[0]
    except (CheckpointError, LookupError, TypeError):
        return None


def _check_same(out: Path, begun: Any, settings: CacheSettings) -> None:
    wanted = json.loads(json.dumps(config_to_dict(settings)))
    if begun == wanted:
        return
    other = begun if isinstance(begun, dict) else {}
    name = next((name for name in wanted if other.get(name) != wanted[name]), "kind")
    found, expected = (
        value[:12] if isinstance(value, str) else json.dumps(value) for value in (other.get(name), wanted.get(name))
    )
    raise OutputExistsError(
        f"{out} holds an unfinished token cache of another {name}, {found} instead of {expected}: choose another "
        "folder, or start anew with --force (force=True)"
    )


def _remove(out: Path) -> None:
    """Removes the files of a cache, what makes it one first."""
    for name in (MANIFEST, UNFINISHED):
        (out / name).unlink(missing_ok=True)
    for path in list(out.iterdir()):
        if _SHARD.fullmatch(path.name) or _TEMPORARY.fullmatch(path.name):
            path.unlink()
