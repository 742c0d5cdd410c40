"""Writes a folder of shards: one after the other, each whole or not at all, so that a killed run is gone on with."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mergevq import __version__
from mergevq.configuration import config_to_dict
from mergevq.data.folder import ImageFolder
from mergevq.data.images import all_unreadable
from mergevq.data.loader import Batch, evaluation_batches
from mergevq.data.shard_folder import (
    MANIFEST,
    UNFINISHED,
    ShardFolder,
    ShardSettings,
    file_hash,
    shard_name,
)
from mergevq.data.token_shards import Arrays, map_shard, read_shard_header, save_shard
from mergevq.errors import CheckpointError, ConfigError, DataError, OutputExistsError, TokenFileError
from mergevq.files import check_format, read_json, refuse_existing, write_json

_SHARD = re.compile(r"shard-\d{5,}\.safetensors")
_TEMPORARY = re.compile(r"\.(shard-\d{5,}|manifest|unfinished)\.[0-9a-f]{8}\.tmp\.(safetensors|json)")

Encode = Callable[[Batch], Mapping[str, Tensor]]
"""From a batch of images to the rows of every array but `number`."""


def write_shards(
    folder: ShardFolder,
    settings: ShardSettings,
    images: ImageFolder,
    encode: Encode,
    *,
    batch_size: int,
    workers: int,
    force: bool,
    on_images: Callable[[int], None] | None,
) -> None:
    """Makes the shards that are not there yet, then the manifest. Unreadable images are left out and named there.

    On the same machine with the same `batch_size` the files are those of an uninterrupted run.

    Args:
        folder: where to, and what kind.
        settings: what decides the contents.
        images: what to encode; its middle square is cut out at `settings.image_size`.
        encode: called for each batch in order; batches never cross shards.
        batch_size: images at a time.
        workers: processes that read images.
        force: start anew, and remove the files of a cache that is there. Others stay.
        on_images: called with the number of images done, those of shards that were there included.

    Raises:
        OutputExistsError: there is something else: a finished cache, one of other settings, other files.
        DataError: none of the images can be read.
        WriteError: the disk is full, or the folder does not allow files.
    """
    if batch_size < 1 or workers < 0:
        raise ConfigError(f"expected batch_size of at least 1 and workers of at least 0, got {batch_size}, {workers}")
    if _claim(folder, settings, force):
        return
    key = hashlib.sha256(json.dumps(config_to_dict(settings), sort_keys=True).encode()).hexdigest()
    report = on_images or (lambda done: None)
    for number in range(settings.num_shards):
        path, first = folder.path / shard_name(number), number * settings.shard_size
        part = images.select(range(first, min(first + settings.shard_size, len(images))))
        if _is_done(path, folder, key):
            report(len(part))
            continue
        arrays = _encode(part, first, settings, encode, batch_size, workers, report)
        unreadable = json.dumps(part.unreadable, ensure_ascii=False)
        save_shard(path, arrays, {"settings": key, "unreadable": unreadable}, folder.shard_form)
    _finish(folder, settings)


def _encode(
    part: ImageFolder,
    first: int,
    settings: ShardSettings,
    encode: Encode,
    batch_size: int,
    workers: int,
    report: Callable[[int], None],
) -> Arrays:
    """Returns the arrays of the shard whose images are `part`, which begins with image `first` of the data set."""
    layout = settings.layout(0)
    columns: dict[str, list[NDArray[Any]]] = {name: [np.zeros(shape, kind)] for name, (kind, shape) in layout.items()}
    read = 0
    try:
        for batch in evaluation_batches(part, settings.image_size, batch_size=batch_size, workers=workers):
            for name, values in {"number": batch["number"] + first, **encode(batch)}.items():
                columns[name].append(values.cpu().numpy().astype(layout[name][0]))
            read += len(batch["image"])
            report(len(batch["image"]))
    except DataError:
        if len(part.unreadable) < len(part):
            raise
    if read < len(part):
        report(len(part) - read)
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def _is_done(path: Path, folder: ShardFolder, key: str) -> bool:
    try:
        return path.exists() and read_shard_header(path, folder.shard_form).get("settings") == key
    except TokenFileError:
        return False  # Damaged after it was written: it is made again.


def _finish(folder: ShardFolder, settings: ShardSettings) -> None:
    out = folder.path
    shards: list[dict[str, Any]] = []
    unreadable: dict[str, str] = {}
    for number in range(settings.num_shards):
        path = out / shard_name(number)
        images = len(map_shard(path, folder.shard_form)["number"])
        shards.append({"file": path.name, "images": images, "bytes": path.stat().st_size, "sha256": file_hash(path)})
        unreadable |= json.loads(read_shard_header(path, folder.shard_form)["unreadable"])
    total = sum(shard["images"] for shard in shards)
    if not total:
        _remove(out)  # So that a later run looks again: what kept the images from being read may be over by then.
        raise DataError(all_unreadable(len(unreadable), next(iter(unreadable.values()))))
    manifest = {
        "mergevq": folder.form,
        "version": __version__,
        "settings": config_to_dict(settings),
        "num_images": total,
        "shards": shards,
        "unreadable": unreadable,
    }
    write_json(out / MANIFEST, manifest)
    (out / UNFINISHED).unlink()


# --------------------------------------------------------------------------------------------------------- the folder


def check_free(folder: ShardFolder, force: bool) -> None:
    """Checks that a cache could be written there, or gone on with; `write_shards` checks the settings too.

    Raises:
        OutputExistsError: there is a finished cache, or something else.
    """
    if _is_begun(folder):
        return
    if not force and _is_finished(folder):
        raise _finished_error(folder)
    refuse_existing(folder.path, force)


def _claim(folder: ShardFolder, settings: ShardSettings, force: bool) -> bool:
    """Makes it hold an unfinished cache of these settings, whose shards are kept; returns whether it is finished.

    Raises:
        OutputExistsError: there is something else.
    """
    check_free(folder, force)
    out, unfinished = folder.path, f"unfinished-{folder.form}"
    finished, begun = _is_finished(folder), _is_begun(folder)
    wanted = json.loads(json.dumps(config_to_dict(settings)))
    if begun and not force:
        if finished:  # Taking this record away is all that the run that finished it had left to do.
            if folder.read_manifest()["settings"] != wanted:
                raise _finished_error(folder)
            (out / UNFINISHED).unlink()
            return True
        record = read_json(out / UNFINISHED)
        check_format(record, unfinished, out / UNFINISHED)
        _check_same(folder, record.get("settings"), wanted)
        for path in list(out.iterdir()):
            if _TEMPORARY.fullmatch(path.name):
                path.unlink()
        return False
    if begun or finished:
        _remove(out)
    write_json(out / UNFINISHED, {"mergevq": unfinished, "version": __version__, "settings": wanted})
    return False


def _is_finished(folder: ShardFolder) -> bool:
    return _kind(folder.path / MANIFEST) == folder.form.partition("/")[0]


def _is_begun(folder: ShardFolder) -> bool:
    return _kind(folder.path / UNFINISHED) == f"unfinished-{folder.form.partition('/')[0]}"


def _finished_error(folder: ShardFolder) -> OutputExistsError:
    return OutputExistsError(
        f"{folder.path} holds a finished {folder.what}: choose another folder, or start anew with force=True"
    )


def _kind(path: Path) -> str | None:
    """Returns what kind of record of ours a JSON file is; None if it is none."""
    try:
        return str(read_json(path)["mergevq"]).partition("/")[0]
    except (CheckpointError, LookupError, TypeError):
        return None


def _check_same(folder: ShardFolder, begun: Any, wanted: dict[str, Any]) -> None:
    if begun == wanted:
        return
    other = begun if isinstance(begun, dict) else {}
    name = next((name for name in wanted if other.get(name) != wanted[name]), "kind")
    found, expected = (
        value[:12] if isinstance(value, str) else json.dumps(value) for value in (other.get(name), wanted.get(name))
    )
    raise OutputExistsError(
        f"{folder.path} holds an unfinished {folder.what} of another {name}, {found} instead of {expected}: choose "
        "another folder, or start anew with force=True"
    )


def _remove(out: Path) -> None:
    """Removes the files of a cache, what makes it one first."""
    for name in (MANIFEST, UNFINISHED):
        (out / name).unlink(missing_ok=True)
    for path in list(out.iterdir()):
        if _SHARD.fullmatch(path.name) or _TEMPORARY.fullmatch(path.name):
            path.unlink()
