"""What a token cache is made of: its settings, and the arrays of a shard. Described in docs/file_formats.md."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mergevq.data.shard_folder import Layout, ShardFolder, ShardSettings
from mergevq.data.token_shards import signed, unsigned
from mergevq.errors import ConfigError

View = Literal["crop", "flip"]
"""crop: the short side resized, the middle square cut out. flip: the same, mirrored."""


@dataclass(frozen=True)
class CacheSettings(ShardSettings):
    """What a cache holds: which images, encoded by what, and how. Two caches of equal settings hold the same tokens."""

    tokenizer: str
    """Fingerprint of the tokenizer."""
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

    def __post_init__(self) -> None:
        super().__post_init__()
        patches = self.grid[0] * self.grid[1]
        if not self.num_tokens or min(self.num_tokens) < 1 or max(self.num_tokens) > patches:
            raise ConfigError(f"expected every num_tokens in 1..{patches}, got {self.num_tokens}")
        check_views(self.views)
        for name in ("num_tokens", "views"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ConfigError(f"expected different {name}, got {getattr(self, name)}")
        if not 1 <= self.num_bits <= 30 or min(self.grid) < 1:
            raise ConfigError(f"expected num_bits 1..30 and a grid of at least 1, got {self.num_bits} and {self.grid}")
        if not 0 <= self.num_classes < 2**31:
            raise ConfigError(f"expected num_classes below 2**31, got {self.num_classes}")

    @property
    def num_patches(self) -> int:
        """L."""
        return self.grid[0] * self.grid[1]

    def layout(self, images: int) -> Layout:
        """Returns type and shape of every array in a shard of so many readable images."""
        arrays: Layout = {
            "label": (signed(self.num_classes - 1), (images,)),
            "number": (unsigned(self.data_images - 1), (images,)),
        }
        for view in self.views:
            for k in self.num_tokens:
                arrays[index_name(view, k)] = unsigned(2**self.num_bits - 1), (images, k)
                arrays[source_name(view, k)] = unsigned(k - 1), (images, self.num_patches)
        return arrays


def token_folder(folder: str | Path) -> ShardFolder:
    """Returns a folder as that of a token cache."""
    return ShardFolder(Path(folder), "token-cache/1", "mergevq cache-tokens", "encode the images again")


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
