"""A token cache: a data set encoded once, read in place without decoding an image.

`write_token_cache` (mergevq/data/cache_writer.py) makes it; `token_batches` (mergevq/data/token_batches.py) says in
which order it is read.
"""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mergevq.data.cache_format import CacheSettings, View, index_name, source_name, token_folder
from mergevq.data.shard_folder import Shards
from mergevq.errors import ConfigError, TokenFileError
from mergevq.merging import SourceMap
from mergevq.tokens import MergedTokens

TokenBatch = dict[str, Tensor]
"""int64. index Int[B, Kmax] of the kept tokens, padded with 0; source Int[B, L], the kept token of each patch;
num_tokens Int[B]; label Int[B], -1 without classes; number Int[B] of each image in its data set. The index of every
patch in raster order is `index.gather(1, source)`."""


class TokenCache:
    """A finished token cache, memory-mapped: a batch reads its own rows and nothing else.

    Rows are the readable images in the order of the data set, 0 .. len - 1; `numbers` says which image each is.

    Args:
        folder: where `mergevq cache-tokens` wrote it.
        expect_tokenizer: fingerprint of the tokenizer the tokens are for.

    Raises:
        TokenFileError: there is no finished cache, a part of it is missing, truncated or not its own, or another
            tokenizer made it.
    """

    def __init__(self, folder: str | Path, expect_tokenizer: str | None = None) -> None:
        self.folder = Path(folder)
        self._shards = Shards(token_folder(folder), CacheSettings)
        if expect_tokenizer is not None and self.tokenizer != expect_tokenizer:
            raise TokenFileError(
                f"{self.folder}: expected tokens of tokenizer {expect_tokenizer[:12]}, got those of "
                f"{self.tokenizer[:12]}: use the model that made them, or encode the images again"
            )
        self.labels: Int[Tensor, " n"] = self._shards.joined("label")
        """Class of each row, -1 without classes."""
        self.numbers: Int[Tensor, " n"] = self._shards.joined("number")
        """Number of each row's image in its data set."""
        if int(self.labels.min()) < -1 or int(self.labels.max()) >= self.num_classes:
            raise TokenFileError(
                f"{self.folder}: expected labels -1..{self.num_classes - 1}, got others: encode the images again"
            )

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def settings(self) -> CacheSettings:
        """What the cache holds."""
        return self._shards.settings

    @property
    def unreadable(self) -> dict[str, str]:
        """Name and reason of each image that was left out."""
        return self._shards.unreadable

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the settings and of all tokens."""
        return self._shards.fingerprint

    @property
    def num_images(self) -> int:
        """Readable images, each encoded at every K in every view."""
        return len(self)

    @property
    def tokenizer(self) -> str:
        """Fingerprint of the tokenizer."""
        return self.settings.tokenizer

    @property
    def data(self) -> str:
        """Fingerprint of the images, by their names, labels and sizes."""
        return self.settings.data

    @property
    def image_size(self) -> int:
        """Side in pixels of what was encoded."""
        return self.settings.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch grid."""
        return self.settings.grid

    @property
    def num_bits(self) -> int:
        """Bits of a codebook index."""
        return self.settings.num_bits

    @property
    def num_tokens(self) -> tuple[int, ...]:
        """Every K there is."""
        return self.settings.num_tokens

    @property
    def views(self) -> tuple[View, ...]:
        """Every view there is."""
        return self.settings.views

    @property
    def class_names(self) -> tuple[str, ...]:
        """One for each label, or empty."""
        return self.settings.class_names

    @property
    def num_classes(self) -> int:
        """Labels lie in -1 .. num_classes - 1."""
        return self.settings.num_classes

    def batch(
        self,
        rows: Sequence[int],
        num_tokens: int | Sequence[int],
        view: View | Sequence[View] = "crop",
        width: int | None = None,
    ) -> TokenBatch:
        """Returns some rows, copied to the CPU.

        Args:
            rows: 0 .. len - 1, in any order, also repeated.
            num_tokens: K, for all or one a row.
            view: for all or one a row.
            width: of `index`; the largest K asked for by default.

        Raises:
            ConfigError: the cache does not hold such a row, K or view, or the width is too small.
            TokenFileError: what was read cannot be tokens of this tokenizer.
        """
        counts = [num_tokens] * len(rows) if isinstance(num_tokens, int) else list(num_tokens)
        views = [view] * len(rows) if isinstance(view, str) else list(view)
        if not rows or not len(rows) == len(counts) == len(views):
            raise ConfigError(
                f"expected at least one row, and one K and view for each, got {len(rows)}, {len(counts)}, {len(views)}"
            )
        if min(rows) < 0 or max(rows) >= len(self):
            raise ConfigError(f"expected rows 0..{len(self) - 1}, got {min(rows)}..{max(rows)}")
        self.check_holds(counts, views)
        if width is not None and width < max(counts):
            raise ConfigError(f"expected a width of at least {max(counts)}, the largest K, got {width}")
        index = np.zeros((len(rows), width or max(counts)), dtype=np.int64)
        source = np.zeros((len(rows), self.settings.num_patches), dtype=np.int64)
        # Rows that lie in one array are copied at once.
        places: dict[tuple[int, View, int], list[int]] = {}
        ends = self._shards.ends
        for at, (row, k, seen) in enumerate(zip(rows, counts, views, strict=True)):
            places.setdefault((bisect_right(ends, row), seen, k), []).append(at)
        for (shard, seen, k), found in sorted(places.items()):
            first = ends[shard - 1] if shard else 0
            inside = [rows[i] - first for i in found]
            arrays = self._shards.arrays[shard]
            index[found, :k] = arrays[index_name(seen, k)][inside]
            source[found] = arrays[source_name(seen, k)][inside]
            if index[found].max() >= 2**self.num_bits or source[found].max() >= k:
                raise TokenFileError(
                    f"{self._shards.files[shard]}: expected indices below {2**self.num_bits} and sources below {k}, "
                    "got others: the file is damaged, encode the images again"
                )
        chosen = torch.tensor(rows)
        return {
            "index": torch.from_numpy(index),
            "source": torch.from_numpy(source),
            "num_tokens": torch.tensor(counts),
            "label": self.labels[chosen],
            "number": self.numbers[chosen],
        }

    def tokens(
        self, rows: Sequence[int], num_tokens: int | Sequence[int], view: View | Sequence[View] = "crop"
    ) -> MergedTokens:
        """Returns some rows as the tokenizer's `encode` returned them, ready for its `decode`.

        Raises:
            ConfigError: the cache does not hold such a row, K or view.
            TokenFileError: what was read cannot be tokens of this tokenizer.
        """
        batch = self.batch(rows, num_tokens, view)
        source = SourceMap(batch["source"], batch["num_tokens"])
        return MergedTokens(
            batch["index"], source, self.grid, self.num_bits, self.tokenizer, num_tokens=batch["num_tokens"]
        )

    def check_holds(self, num_tokens: Sequence[int], views: Sequence[View]) -> None:
        """Checks that the images were encoded at every such K and in every such view.

        Args:
            num_tokens: every K wanted.
            views: every view wanted.

        Raises:
            ConfigError: they were not.
        """
        for name, wanted, held in (("num_tokens", set(num_tokens), self.num_tokens), ("views", set(views), self.views)):
            if not wanted <= set(held):
                missing, known = (", ".join(map(str, sorted(some))) for some in (wanted - set(held), held))
                raise ConfigError(
                    f"{self.folder}: expected {name} among {known}, got {missing}: choose others, or encode the images "
                    "again"
                )

    def verify(self) -> None:
        """Reads every shard whole and compares its SHA-256 with the manifest's.

        Raises:
            TokenFileError: a file is not the one that was written.
        """
        self._shards.verify()
