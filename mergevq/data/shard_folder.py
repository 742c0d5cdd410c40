"""A folder of shards and a manifest: what a network made of each image of a data set, read in place.

`shard_writer` writes such folders. Token caches and teacher caches are two kinds; docs/file_formats.md describes both.
"""

import hashlib
import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mergevq.configuration import check_types, config_from_dict
from mergevq.data.token_shards import Arrays, map_shard
from mergevq.errors import CheckpointError, ConfigError, TokenFileError
from mergevq.files import check_fields, check_format, read_json

MANIFEST = "manifest.json"
"""Written last: a folder with it is finished."""
UNFINISHED = "unfinished.json"
"""The settings, while the folder is being written."""

Layout = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]
"""Name, type and shape of every array of a shard."""


@dataclass(frozen=True)
class ShardSettings:
    """What decides the contents of a folder: equal settings mean equal contents."""

    data: str
    """Fingerprint of the images: their names, labels and sizes (`ImageFolder.fingerprint`)."""
    data_images: int
    """How many images there are, with those that turn out to be unreadable."""
    image_size: int
    """Side in pixels of what is read: the short side resized, the middle square cut out."""
    shard_size: int
    """Shard s holds what can be read of images s * shard_size .. (s + 1) * shard_size - 1 of the data set."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.shard_size < 1 or self.data_images < 1:
            raise ConfigError(
                f"expected at least one image a shard, got {self.shard_size} of {self.data_images} images"
            )
        if self.data_images >= 2**32:
            raise ConfigError(f"expected data_images below 2**32, got {self.data_images}")

    @property
    def num_shards(self) -> int:
        """Files that the images fill."""
        return -(-self.data_images // self.shard_size)

    def layout(self, images: int) -> Layout:
        """Returns the arrays of a shard of so many readable images; one is `number` [n], of each in the data set."""
        raise NotImplementedError


S = TypeVar("S", bound=ShardSettings)


class ShardFolder(NamedTuple):
    """Where a cache is, or will be, and of what kind."""

    path: Path
    form: str
    """Kind and version, such as "token-cache/1"; its shards are "token-shard/1"."""
    verb: str
    """What writes it, for messages: mergevq cache-tokens."""
    again: str
    """What to do about damage, for messages."""

    @property
    def what(self) -> str:
        """The kind in words."""
        return self.form.partition("/")[0].replace("-", " ")

    @property
    def shard_form(self) -> str:
        """Kind and version of a shard's header."""
        return self.form.replace("cache", "shard")

    def read_manifest(self) -> dict[str, Any]:
        """Returns the manifest of a finished cache.

        Raises:
            TokenFileError: there is none, or it is damaged, of another kind or version.
        """
        folder, path = self.path, self.path / MANIFEST
        if not path.exists():
            if (folder / UNFINISHED).exists():
                raise TokenFileError(
                    f"{folder}: expected a finished {self.what}, got one that is being written or was interrupted: "
                    f"`{self.verb}` with the same options goes on with it"
                )
            came = f"no {MANIFEST} in it" if folder.is_dir() else "a file" if folder.exists() else "nothing there"
            raise TokenFileError(f"{folder}: expected a folder that `{self.verb}` wrote, got {came}: check the path")
        try:
            manifest = read_json(path)
            check_fields(manifest, ("mergevq",), path)
            check_format(manifest, self.form, path)
            check_fields(manifest, ("settings", "num_images", "shards", "unreadable"), path)
        except CheckpointError as error:
            raise TokenFileError(str(error)) from error
        return dict(manifest)


class Shards(Generic[S]):
    """The shards of a finished cache, memory-mapped: only rows that are copied are read.

    Args:
        folder: where they are.
        kind: class of the settings.

    Raises:
        TokenFileError: there is no finished cache, or a part of it is missing, truncated or not its own.
    """

    settings: S

    def __init__(self, folder: ShardFolder, kind: type[S]) -> None:
        self._folder = folder
        manifest = folder.read_manifest()
        path = folder.path / MANIFEST
        try:
            self.settings = config_from_dict(kind, manifest["settings"])
            shards = [(str(s["file"]), int(s["images"]), int(s["bytes"]), str(s["sha256"])) for s in manifest["shards"]]
            self.unreadable: dict[str, str] = dict(manifest["unreadable"])
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise TokenFileError(f"{path}: {error}: {folder.again}") from error
        self.files = [folder.path / file for file, _, _, _ in shards]
        self._hashes = [sha for _, _, _, sha in shards]
        self.ends = list(accumulate(images for _, images, _, _ in shards))
        """Rows up to the end of each shard."""
        named, wanted = [file for file, _, _, _ in shards], self.settings.num_shards
        if len(named) != wanted or named != [shard_name(s) for s in range(len(named))] or self.ends[-1] < 1:
            raise TokenFileError(
                f"{path}: expected {wanted} shards with at least one image, got {len(shards)}: {folder.again}"
            )
        for file, (_, _, size, _) in zip(self.files, shards, strict=True):
            self._check_size(file, size)
        self.arrays = [self._map(shard) for shard in range(len(shards))]
        """Of each shard, in place and read-only."""
        hashed = {name: manifest[name] for name in ("settings", "shards")}
        self.fingerprint: str = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
        """SHA-256 of the settings and of the shards' own SHA-256, in hex."""

    def __len__(self) -> int:
        return self.ends[-1]

    def joined(self, name: str) -> Int[Tensor, " n"]:
        """Returns one array of integers of all shards, copied."""
        return torch.from_numpy(np.concatenate([arrays[name] for arrays in self.arrays]).astype(np.int64))

    def verify(self) -> None:
        """Reads every shard whole and compares its SHA-256 with the manifest's.

        Raises:
            TokenFileError: a file is not the one that was written.
        """
        for path, expected in zip(self.files, self._hashes, strict=True):
            if file_hash(path) != expected:
                raise TokenFileError(
                    f"{path}: expected the shard that was written, the checksum differs: {self._folder.again}"
                )

    def _check_size(self, path: Path, size: int) -> None:
        what, again = self._folder.what, self._folder.again
        if not path.is_file():
            raise TokenFileError(f"{path}: expected a shard of the {what}, it is missing: {again}")
        if path.stat().st_size != size:
            raise TokenFileError(
                f"{path}: expected {size} bytes, got {path.stat().st_size}, it is truncated or another cache's: "
                f"copy the cache again, or {again}"
            )

    def _map(self, shard: int) -> Arrays:
        path, images = self.files[shard], self.ends[shard] - (self.ends[shard - 1] if shard else 0)
        arrays = map_shard(path, self._folder.shard_form)
        found = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        expected = self.settings.layout(images)
        if found != expected:
            wrong = sorted({*found, *expected} - {name for name in found if found[name] == expected.get(name)})
            raise TokenFileError(
                f"{path}: expected the arrays of {images} images that {MANIFEST} describes, got others "
                f"({', '.join(wrong[:3])}): {self._folder.again}"
            )
        return arrays

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "arrays": []}  # Another process maps the files by itself.

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.arrays = [self._map(shard) for shard in range(len(self.files))]


def shard_name(number: int) -> str:
    """Returns the file name of a shard."""
    return f"shard-{number:05d}.safetensors"


def file_hash(path: Path) -> str:
    """Returns the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
