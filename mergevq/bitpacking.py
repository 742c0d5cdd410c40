"""Integers of any width side by side in bytes, without a gap between values and with whole bytes for each row."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

# Bounds the memory of the unpacked form, which is 32 bytes a value.
_ROWS_AT_ONCE = 1024


def pack(values: NDArray[np.int64], lengths: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Returns the rows one after the other, row r in ceil(lengths[r] * widths[r] / 8) bytes.

    Bits are counted from the least significant one, in values and in bytes; the rest of a row's last byte is 0.

    Args:
        values: [R, M]; of row r the first `lengths[r]` are stored, each below 2 ** `widths[r]`.
        lengths: [R], at most M.
        widths: [R], 0 .. 32.
    """
    sizes = (lengths * widths + 7) // 8
    ends = sizes.cumsum()
    data = np.zeros(sizes.sum(), dtype=np.uint8)
    for rows, length, width in _alike(lengths, widths):
        words = np.ascontiguousarray(values[rows, :length], dtype="<u4").view(np.uint8).reshape(len(rows), length, 4)
        bits = np.unpackbits(words, axis=2, count=width, bitorder="little").reshape(len(rows), length * width)
        packed = np.packbits(bits, axis=1, bitorder="little")
        data[(ends - sizes)[rows][:, None] + np.arange(packed.shape[1])] = packed
    return data


def unpack(data: NDArray[np.uint8], lengths: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the rows that `pack` stored, [R, largest length], padded with 0.

    Raises:
        ValueError: `data` has another size than these rows have.
    """
    sizes = (lengths * widths + 7) // 8
    ends = sizes.cumsum()
    if data.shape != (sizes.sum(),):
        raise ValueError(f"expected {sizes.sum()} bytes of packed data, got {data.shape}")
    values = np.zeros((len(lengths), lengths.max(initial=0)), dtype=np.int64)
    for rows, length, width in _alike(lengths, widths):
        packed = data[(ends - sizes)[rows][:, None] + np.arange((length * width + 7) // 8)]
        bits = np.unpackbits(packed, axis=1, count=length * width, bitorder="little").reshape(len(rows), length, width)
        words = np.zeros((len(rows), length, 32), dtype=np.uint8)
        words[:, :, :width] = bits
        values[rows, :length] = np.packbits(words, axis=2, bitorder="little").view("<u4")[:, :, 0]
    return values


def _alike(lengths: NDArray[np.int64], widths: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], int, int]]:
    """Gives row numbers of equal length and width, in portions, so that nothing loops over values."""
    for length, width in np.unique(np.stack([lengths, widths]), axis=1).T.tolist():
        rows = np.flatnonzero((lengths == length) & (widths == width))
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            yield rows[start : start + _ROWS_AT_ONCE], length, width
