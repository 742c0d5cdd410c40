"""Tokens as a value: everything that `decode` needs, in memory (`MergedTokens`) and in a file (`.mvq`).

A tokenizer makes them, a generator makes them, a decoder draws them; none of the three remembers anything in between.
The file format is described in docs/file_formats.md.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from mergevq import __version__
from mergevq.bitpacking import pack, unpack
from mergevq.checksum import checksum, with_checksum
from mergevq.configuration import check_is
from mergevq.errors import CheckpointError, ShapeError, TokenFileError
from mergevq.files import check_format, load_tensors, refuse_existing, save_tensors
from mergevq.merging import SourceMap

_FORM = "tokens/1"


@dataclass(frozen=True, eq=False)
class TokenBits:
    """Size of the tokens of each image in bits, without what a file adds."""

    index: Int[Tensor, " B"]
    """K * num_bits, the codebook indices."""
    source: Int[Tensor, " B"]
    """L * ceil(log2 K), the source map; 0 without one."""

    @property
    def total(self) -> Int[Tensor, " B"]:
        """Both together."""
        return self.index + self.source


@dataclass(frozen=True, eq=False, repr=False)
class MergedTokens:
    """The kept tokens of a batch of images, and where their patches are.

    Attributes:
        index: codebook index of each kept token, int64, 0 <= i < 2**num_bits. Ordered by first raster position
            unless the tokenizer is configured otherwise (`merging.order`). K is the largest of the batch; images with
            fewer tokens are padded with 0, see `mask`.
        source: the kept token of each patch; None leaves it to the recovery model.
        grid: rows and columns of the patch grid; rows * columns = L.
        num_bits: bits of an index.
        tokenizer: fingerprint of the tokenizer that made them; None if nobody knows.
        num_tokens: K of each image, int64, 1 .. L. Left out, it is the source map's, or the width of `index`.

    Raises:
        ShapeError: the parts do not fit together, or a value is out of range.
    """

    index: Int[Tensor, "B K"]
    source: SourceMap | None
    grid: tuple[int, int]
    num_bits: int
    tokenizer: str | None = None
    num_tokens: Int[Tensor, " B"] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.num_tokens is None:
            known = torch.full(self.index.shape[:1], self.index.shape[-1], device=self.index.device)
            object.__setattr__(self, "num_tokens", known if self.source is None else self.source.num_tokens)
        _check_parts(self)
        _check_values(self)

    @property
    def num_patches(self) -> int:
        """L, the number of patches of an image."""
        return self.grid[0] * self.grid[1]

    def mask(self) -> Bool[Tensor, "B K"]:
        """Returns which entries of `index` are tokens; the others are padding."""
        return torch.arange(self.index.shape[1], device=self.index.device) < self.num_tokens[:, None]

    def full_index(self) -> Int[Tensor, "B L"]:
        """Returns the codebook index of every patch, in raster order.

        Raises:
            ShapeError: there is no source map, and an image has fewer tokens than patches.
        """
        if self.source is not None:
            return self.index.gather(1, self.source.index)
        if bool((self.num_tokens < self.num_patches).any()):
            raise ShapeError(
                f"expected a source map to place {self.index.shape[1]} tokens on {self.num_patches} patches, got none: "
                "let the tokenizer predict one"
            )
        return self.index

    @staticmethod
    def from_full_index(
        index: Int[Tensor, "B L"], grid: tuple[int, int], num_bits: int, tokenizer: str | None = None
    ) -> "MergedTokens":
        """Returns tokens in which patches of equal index share one: the inverse of `full_index`.

        Args:
            index: codebook index of every patch in raster order, int64.
            grid: rows and columns, rows * columns = L.
            num_bits: bits of an index.
            tokenizer: fingerprint of the tokenizer whose codebook is meant.

        Raises:
            ShapeError: the index does not fit grid or num_bits.
        """
        batch, num_patches = index.shape
        # Equal indices become neighbours; the sort is stable, so the first of each run is the first in raster order.
        ordered, position = index.sort(dim=1, stable=True)
        is_start = torch.ones_like(ordered, dtype=torch.bool)
        is_start[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        patches = torch.arange(num_patches, device=index.device).expand(batch, -1)
        start = torch.where(is_start, patches, 0).cummax(1).values
        position_cache = torch.empty_like(position).scatter(1, position, position.gather(1, start))
        is_first = position_cache == patches
        source = (is_first.cumsum(1) - 1).gather(1, position_cache)
        num_tokens = is_first.sum(1)
        # Patches that share a token write the same value.
        width = int(num_tokens.max()) if batch else 0
        kept = index.new_zeros(batch, width).scatter(1, source, index)
        return MergedTokens(kept, SourceMap(source, num_tokens), grid, num_bits, tokenizer, num_tokens)

    def without_source(self) -> "MergedTokens":
        """Returns the tokens alone; decoding them asks the recovery model where they go."""
        return MergedTokens(self.index, None, self.grid, self.num_bits, self.tokenizer, self.num_tokens)

    def bits_per_image(self) -> TokenBits:
        """Returns the bits of the indices, of the source map and of both, for each image."""
        index = self.num_tokens * self.num_bits
        source = torch.zeros_like(index) if self.source is None else self.num_patches * _ceil_log2(self.num_tokens)
        return TokenBits(index, source)

    def to(self, device: torch.device | str) -> "MergedTokens":
        """Returns the tokens on another device."""
        if self.index.device == torch.device(device):
            return self
        source = None if self.source is None else self.source.to(device)
        return MergedTokens(
            self.index.to(device), source, self.grid, self.num_bits, self.tokenizer, self.num_tokens.to(device)
        )

    def equal(self, other: "MergedTokens") -> bool:
        """Returns whether both hold the same tokens, source maps and tokenizer; the device does not matter."""
        if (self.grid, self.num_bits, self.tokenizer) != (other.grid, other.num_bits, other.tokenizer):
            return False
        if (self.source is None) != (other.source is None):
            return False
        other = other.to(self.index.device)
        same = torch.equal(self.num_tokens, other.num_tokens) and torch.equal(self.index, other.index)
        if self.source is None or other.source is None:
            return same
        return same and torch.equal(self.source.index, other.source.index)

    def __len__(self) -> int:
        return self.index.shape[0]

    def __getitem__(self, image: int | slice) -> "MergedTokens":
        """Returns the tokens of one image, as a batch of one, or of a slice of images, trimmed to their own K."""
        if not isinstance(image, slice):
            number = range(len(self))[image]  # IndexError beyond the end, which is also what ends a for loop.
            image = slice(number, number + 1)
        num_tokens = self.num_tokens[image]
        width = int(num_tokens.max()) if num_tokens.numel() else 0
        source = None if self.source is None else SourceMap(self.source.index[image], num_tokens)
        return MergedTokens(self.index[image, :width], source, self.grid, self.num_bits, self.tokenizer, num_tokens)

    def __repr__(self) -> str:
        low, high = (int(v) for v in self.num_tokens.aminmax())
        kept = f"{low}" if low == high else f"{low}..{high}"
        source = "without source" if self.source is None else "with source"
        made_by = "" if self.tokenizer is None else f", tokenizer {self.tokenizer[:12]}"
        return (
            f"MergedTokens({len(self)} images, {kept} tokens of {self.num_bits} bits, "
            f"grid {self.grid[0]}x{self.grid[1]}, {source}{made_by})"
        )

    @staticmethod
    def join(parts: Sequence["MergedTokens"]) -> "MergedTokens":
        """Returns the images of all parts as one batch, padded to the largest K.

        Raises:
            ShapeError: there is no part, or grids, bits, tokenizers or the presence of source maps differ.
        """
        if not parts:
            raise ShapeError("expected at least one batch of tokens to join, got none")
        first = parts[0]
        for part in parts[1:]:
            for name in ("grid", "num_bits", "tokenizer"):
                if getattr(part, name) != getattr(first, name):
                    raise ShapeError(
                        f"expected tokens of equal {name} to join, got {getattr(first, name)} and {getattr(part, name)}"
                    )
            if (part.source is None) != (first.source is None):
                raise ShapeError("expected all parts with a source map or all without, got both: use without_source()")
        width = max(part.index.shape[1] for part in parts)
        index = torch.cat([torch.nn.functional.pad(part.index, (0, width - part.index.shape[1])) for part in parts])
        num_tokens = torch.cat([part.num_tokens for part in parts])
        sources = [part.source.index for part in parts if part.source is not None]
        source = SourceMap(torch.cat(sources), num_tokens) if sources else None
        return MergedTokens(index, source, first.grid, first.num_bits, first.tokenizer, num_tokens)


# --------------------------------------------------------------------------------------------------------- validity


def _check_parts(tokens: MergedTokens) -> None:
    index, num_tokens, source, grid = tokens.index, tokens.num_tokens, tokens.source, tokens.grid
    if index.ndim != 2 or index.dtype != torch.int64 or index.shape[0] == 0:
        raise ShapeError(f"expected an int64 index [B, K] of at least one image, got {_describe(index)}")
    if num_tokens.shape != index.shape[:1] or num_tokens.dtype != torch.int64:
        raise ShapeError(
            f"expected int64 num_tokens [{index.shape[0]}], one for each image, got {_describe(num_tokens)}"
        )
    if len(grid) != 2 or min(grid) < 1:
        raise ShapeError(f"expected a grid of rows and columns, both at least 1, got {grid}")
    if not 1 <= tokens.num_bits <= 30:
        raise ShapeError(f"expected num_bits 1..30, got {tokens.num_bits}")
    if source is None:
        return
    shape = (index.shape[0], tokens.num_patches)
    if source.index.shape != shape or source.index.dtype != torch.int64 or source.num_tokens.shape != shape[:1]:
        raise ShapeError(
            f"expected an int64 source map {list(shape)} for {shape[0]} images of grid {grid[0]}x{grid[1]}, "
            f"got {_describe(source.index)}"
        )


def _check_values(tokens: MergedTokens) -> None:
    """Checks ranges with one transfer from the device, so that an invalid value never travels on."""
    index, num_tokens, source = tokens.index, tokens.num_tokens, tokens.source
    kept, patches, limit = index.shape[1], tokens.num_patches, 2**tokens.num_bits
    tests = {
        f"num_tokens 1..{patches}": (num_tokens >= 1) & (num_tokens <= patches),
        f"an index as wide as the largest num_tokens, not {kept}": num_tokens.max() == kept,
        f"indices 0..{limit - 1} ({tokens.num_bits} bits)": (index >= 0) & (index < limit),
        "padding of 0 after the last token": tokens.mask() | (index == 0),
    }
    if source is not None:
        tests["the num_tokens of the source map"] = source.num_tokens == num_tokens
        tests["source entries 0..K-1 in every image"] = (source.index >= 0) & (source.index < num_tokens[:, None])
    passed = torch.stack([test.all() for test in tests.values()]).tolist()
    if not all(passed):
        name, test = next(item for item, good in zip(tests.items(), passed, strict=True) if not good)
        where = "" if test.ndim == 0 else f" in image {int((~test).nonzero()[0, 0])}"
        raise ShapeError(f"expected {name}, got something else{where}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _ceil_log2(count: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Returns the bits that distinguish `count` values; 0 for one."""
    powers = 2 ** torch.arange(31, device=count.device)
    return (count[:, None] > powers).sum(1)


# ------------------------------------------------------------------------------------------------------------ files


def save_tokens(path: str | Path, tokens: MergedTokens, force: bool = False) -> None:
    """Writes tokens to an `.mvq` file: a header, and ceil(K N / 8) + ceil(L ceil(log2 K) / 8) bytes for each image.

    Args:
        path: the file.
        tokens: any number of images, of any mix of K.
        force: replace an existing file.

    Raises:
        OutputExistsError: the file exists.
        WriteError: it cannot be written; what was there before is untouched.
    """
    check_is(tokens, MergedTokens, "save_tokens(path, tokens) takes the path first")
    refuse_existing(path, force)
    tokens = tokens.to("cpu")
    num_tokens = tokens.num_tokens.numpy()
    payload = {"index": pack(tokens.index.numpy(), num_tokens, np.full_like(num_tokens, tokens.num_bits))}
    if tokens.source is not None:
        lengths = np.full_like(num_tokens, tokens.num_patches)
        payload["source"] = pack(tokens.source.index.numpy(), lengths, _ceil_log2(tokens.num_tokens).numpy())
    starts = np.flatnonzero(np.diff(num_tokens, prepend=0))
    fields = {
        "grid": tokens.grid,
        "num_bits": tokens.num_bits,
        "tokenizer": tokens.tokenizer,
        "count": len(tokens),
        "num_tokens": np.stack([num_tokens[starts], np.diff(starts, append=len(tokens))], 1).tolist(),
        "has_source": tokens.source is not None,
    }
    header = {"mergevq": _FORM, "version": __version__, **{name: json.dumps(value) for name, value in fields.items()}}
    tensors = {name: torch.from_numpy(data) for name, data in payload.items()}
    save_tensors(path, tensors, with_checksum(header, tensors))


def load_tokens(path: str | Path, expect_tokenizer: str | None = None) -> MergedTokens:
    """Returns the tokens in an `.mvq` file, on the CPU.

    Args:
        path: the file.
        expect_tokenizer: fingerprint of the model they are for. Tokens that do not name theirs are accepted.

    Raises:
        TokenFileError: the file is missing, damaged, of another kind or version, or of another tokenizer.
    """
    try:
        tensors, header = load_tensors(path, what="token file (.mvq)")
        check_format(header, _FORM, path)
    except CheckpointError as error:
        raise TokenFileError(str(error)) from error
    for name, data in tensors.items():
        if data.dtype != torch.uint8:  # NumPy does not know them all.
            raise TokenFileError(f"{path}: expected packed bytes, got {name} in {_describe(data)}: encode again")
    payload = {name: data.numpy() for name, data in tensors.items()}
    if header.get("sha256") != checksum(header, tensors):
        raise TokenFileError(
            f"{path}: expected the tokens that were saved, the checksum differs: restore or encode again"
        )
    try:
        tokens = _decode_file(payload, header)
    # A ShapeError is a ValueError; the last two are of numbers beyond all reason.
    except (ValueError, TypeError, LookupError, MemoryError, OverflowError) as error:
        raise TokenFileError(f"{path}: expected a header that fits the data, got {error!r}: encode again") from error
    if expect_tokenizer is not None and tokens.tokenizer not in (None, expect_tokenizer):
        raise TokenFileError(
            f"{path}: expected tokens of tokenizer {expect_tokenizer[:12]}, got those of {str(tokens.tokenizer)[:12]}: "
            "use the model that made them"
        )
    return tokens


def _decode_file(payload: dict[str, NDArray[np.uint8]], header: dict[str, str]) -> MergedTokens:
    rows, columns = json.loads(header["grid"])
    num_bits, tokenizer = json.loads(header["num_bits"]), json.loads(header["tokenizer"])
    runs = json.loads(header["num_tokens"])
    kept, repeats = np.array(runs, dtype=np.int64).T
    count = sum(repeat for _, repeat in runs)
    if count != json.loads(header["count"]) or ("source" in payload) != json.loads(header["has_source"]):
        raise ValueError("another number of images or tensors")
    # Before a few digits become as much memory: every image has a token, and a token has a bit.
    if count > payload["index"].size or min(repeats) < 0 or not 1 <= min(kept) <= max(kept) <= rows * columns:
        raise ValueError(f"{count} images of {min(kept)} to {max(kept)} tokens in {payload['index'].size} bytes")
    num_tokens = torch.from_numpy(np.repeat(kept, repeats))
    counts = num_tokens.numpy()
    index = torch.from_numpy(unpack(payload["index"], counts, np.full_like(counts, num_bits)))
    source = None
    if "source" in payload:
        lengths = np.full_like(counts, rows * columns)
        widths = _ceil_log2(num_tokens).numpy()
        source = SourceMap(torch.from_numpy(unpack(payload["source"], lengths, widths)), num_tokens)
    return MergedTokens(index, source, (rows, columns), num_bits, tokenizer, num_tokens)
