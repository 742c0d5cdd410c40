"""What a token cache is made of: its settings, its manifest, and the arrays of a shard.

Described in docs/file_formats.md.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from mergevq.configuration import check_types
from mergevq.data.token_shards import signed, unsigned
from mergevq.errors import CheckpointError, ConfigError, TokenFileError
from mergevq.files import check_fields, check_format, read_json

FORM = "token-cache/1"
MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
"""The settings of a cache while it is being written."""

View = Literal["crop", "flip"]
"""crop: the short side resized, the middle square cut out. flip: the same, mirrored."""


@dataclass(frozen=True)
class CacheSettings:
    """What a cache holds: which images, encoded by what, and how. Two caches of equal settings hold the same tokens."""

    tokenizer: str
    """Fingerprint of the tokenizer."""
    data: str
    """Fingerprint of the images: their names, labels and sizes (`ImageFolder.fingerprint`)."""
    data_images: int
    """How many images there are, with those that turn out to be unreadable."""
    image_size: int
    """Side in pixels of what was encoded."""
    grid: tuple[int, int]
    """Rows and columns of the patch grid; L is their product."""
    num_bits: int
    num_tokens: tuple[int, ...]
    """Every K that each image was encoded at."""
    views: tuple[View, ...]
    class_names: tuple[str, ...]
    """Empty without classes, or if only their numbers are known."""
    num_classes: int
    """Labels lie in -1 .. num_classes - 1."""
    shard_size: int
    """Shard s holds what can be read of images s * shard_size .. (s + 1) * shard_size - 1 of the data set."""

    def __post_init__(self) -> None:
        check_types(self)
        patches = self.grid[0] * self.grid[1]
        if not self.num_tokens or min(self.num_tokens) < 1 or max(self.num_tokens) > patches:
            raise ConfigError(f"expected every num_tokens in 1..{patches}, got {self.num_tokens}")
        check_views(self.views)
        for name in ("num_tokens", "views"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ConfigError(f"expected different {name}, got {getattr(self, name)}")
        if not 1 <= self.num_bits <= 30 or min(self.grid) < 1:
            raise ConfigError(f"expected num_bits 1..30 and a grid of at least 1, got {self.num_bits} and {self.grid}")
        if not 0 <= self.num_classes < 2**31 or self.data_images >= 2**32:
            raise ConfigError(
                f"expected num_classes below 2**31 and data_images below 2**32, got {self.num_classes} and "
                f"{self.data_images}"
            )
        if self.shard_size < 1 or self.data_images < 1:
            raise ConfigError(
                f"expected at least one image a shard, got {self.shard_size} of {self.data_images} images"
            )

    @property
    def num_patches(self) -> int:
        """L."""
        return self.grid[0] * self.grid[1]

    @property
    def num_shards(self) -> int:
        """Files that the images fill."""
        return -(-self.data_images // self.shard_size)

    def layout(self, images: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Returns type and shape of every array in a shard of so many readable images."""
        arrays: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "label": (signed(self.num_classes - 1), (images,)),
            "number": (unsigned(self.data_images - 1), (images,)),
        }
        for view in self.views:
            for k in self.num_tokens:
                arrays[index_name(view, k)] = unsigned(2**self.num_bits - 1), (images, k)
                arrays[source_name(view, k)] = unsigned(k - 1), (images, self.num_patches)
        return arrays


def check_views(names: Sequence[str]) -> tuple[View, ...]:
    """Returns the views of these names, each once, crop first.

    Raises:
        ConfigError: there is no such view, or none is named.
    """
    known = get_args(View)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigError(f"expected views of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    return tuple(view for view in known if view in names)


def index_name(view: str, num_tokens: int) -> str:
    """Returns the name of the array [n, K] of kept indices."""
    return f"{view}.{num_tokens}.index"


def source_name(view: str, num_tokens: int) -> str:
    """Returns the name of the array [n, L] of source maps."""
    return f"{view}.{num_tokens}.source"


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


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a finished cache.

    Raises:
        TokenFileError: there is none, or it is damaged, of another kind or version.
    """
    path = folder / MANIFEST
    if not path.exists():
        if (folder / UNFINISHED).exists():
            raise TokenFileError(
                f"{folder}: expected a finished token cache, got one that is being written or was interrupted: "
                "`mergevq cache-tokens` with the same options goes on with it"
            )
        what = f"no {MANIFEST} in it" if folder.is_dir() else "a file" if folder.exists() else "nothing there"
        raise TokenFileError(
            f"{folder}: expected a folder that `mergevq cache-tokens` wrote, got {what}: check the path"
        )
    try:
        manifest = read_json(path)
        check_fields(manifest, ("mergevq",), path)
        check_format(manifest, FORM, path)
        check_fields(manifest, ("settings", "num_images", "shards", "unreadable"), path)
    except CheckpointError as error:
        raise TokenFileError(str(error)) from error
    return dict(manifest)


def cache_fingerprint(manifest: dict[str, Any]) -> str:
    """Returns the SHA-256 of the settings and of the shards' own SHA-256, in hex."""
    named = {name: manifest[name] for name in ("settings", "shards")}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def check_size(path: Path, size: int) -> None:
    """Checks that a shard is there, and whole.

    Raises:
        TokenFileError: it is not.
    """
    if not path.is_file():
        raise TokenFileError(f"{path}: expected a shard of the token cache, it is missing: encode the images again")
    if path.stat().st_size != size:
        raise TokenFileError(
            f"{path}: expected {size} bytes, got {path.stat().st_size}, it is truncated or another cache's: "
            "copy the cache again, or encode the images again"
        )
