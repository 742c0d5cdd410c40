"""One shard of a cache: a safetensors file of small integers, or of numbers in float32, read in place.

Written here and not by the safetensors package, whose torch side knows 16- and 32-bit unsigned integers only since 0.6,
and read through memory mapping, which that package offers for whole tensors alone. Its readers open these files too.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mergevq.errors import CheckpointError, TokenFileError
from mergevq.files import atomic_path, check_format, read_header

FORM = "token-shard/1"

_NAMES = {"U8": "u1", "U16": "<u2", "U32": "<u4", "I8": "i1", "I16": "<i2", "I32": "<i4", "F32": "<f4"}
_CODES = {np.dtype(kind): code for code, kind in _NAMES.items()}
_ALIGNMENT = 8

Arrays = dict[str, NDArray[Any]]


def unsigned(largest: int) -> np.dtype[Any]:
    """Returns the smallest unsigned type that holds 0 .. `largest`, which is below 2**32."""
    return next(np.dtype(kind) for kind in ("u1", "<u2", "<u4") if largest <= np.iinfo(kind).max)


def signed(largest: int) -> np.dtype[Any]:
    """Returns the smallest signed type that holds -1 .. `largest`, which is below 2**31."""
    return next(np.dtype(kind) for kind in ("i1", "<i2", "<i4") if largest <= np.iinfo(kind).max)


def save_shard(path: Path, arrays: Mapping[str, NDArray[Any]], header: Mapping[str, str], form: str = FORM) -> None:
    """Writes arrays of 8-, 16- or 32-bit integers or float32, and a header of strings.

    The same values give the same bytes. `form` is kind and version of the contents.

    Raises:
        WriteError: the disk is full, or the folder does not allow the file.
    """
    # The format wants the widest types first, so that each tensor is aligned.
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    entries: dict[str, Any] = {"__metadata__": dict(sorted({"mergevq": form, **header}.items()))}
    end = 0
    for name in names:
        start, end = end, end + arrays[name].nbytes
        code = _CODES[arrays[name].dtype]
        entries[name] = {"dtype": code, "shape": list(arrays[name].shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(np.ascontiguousarray(arrays[name]).data)


def read_shard_header(path: Path, form: str = FORM) -> dict[str, str]:
    """Returns the header of a shard.

    Raises:
        TokenFileError: the file is missing, truncated, or no shard of this kind and version.
    """
    try:
        header = read_header(path)
        check_format(header, form, path)
    except CheckpointError as error:
        raise TokenFileError(str(error)) from error
    return header


def map_shard(path: Path, form: str = FORM) -> Arrays:
    """Returns the arrays of a shard, read-only and in place: only the rows that are copied are ever read.

    Raises:
        TokenFileError: the file is missing, truncated, or no shard of this kind and version.
    """
    read_shard_header(path, form)  # Also checks that the tensors lie inside the file and fill it.
    try:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(start - 8))
        # Python's own mmap would hold a file descriptor for each shard, of which a process may have few.
        data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()[start:]
        data.flags.writeable = False
        return {
            name: data[slice(*entry["data_offsets"])].view(_NAMES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
        raise TokenFileError(f"{path}: expected arrays of numbers, got {error!r}: write the cache again") from error
