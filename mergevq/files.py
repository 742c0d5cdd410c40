"""Files: written whole or not at all, tensors with a header and no pickle, strict loading.

Everything mergevq writes goes through `atomic_path`: a temporary file in the same folder, fsync, rename. A full disk or
a killed process leaves the file that was there before. The formats are described in docs/file_formats.md.
"""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from mergevq.errors import CheckpointError, OutputExistsError, ShapeError, WriteError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SHOWN_KEYS = 10
_WORDS = {"tokens": "token file (.mvq)"}
"""Kinds of files that are not called by their own name."""
_MAGIC = (
    (b"\x89PNG", "a PNG image", "give a model or token file"),
    (b"\xff\xd8\xff", "a JPEG image", "give a model or token file"),
    (b"PK\x03\x04", "a zip archive, perhaps a PyTorch checkpoint", "convert it with `mergevq convert`"),
    (b"\x80", "a pickle, perhaps a PyTorch checkpoint", "convert it with `mergevq convert`"),
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the file with `git lfs pull`"),
)


# ---------------------------------------------------------------------------------------------------------- writing


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Gives a temporary file to write, which becomes `path` if the block ends well, and else is removed.

    The temporary file lies in the same folder (created if need be), starts with a dot and keeps the suffix, which some
    writers choose the format by. Only a killed process leaves it behind. A symbolic link is followed, not replaced.

    Raises:
        WriteError: the disk is full, or the folder does not allow the file. What was at `path` is untouched.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.tmp{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Created here so that a forbidden folder is told before the block's work, and with a new file's permissions.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise _write_error(path, target, error) from error
    try:
        try:
            yield temporary
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise _write_error(path, target, error) from error
        try:
            _fsync(temporary)
            temporary.replace(target)
        except OSError as error:
            raise _write_error(path, target, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # Not every file system can sync a folder; the file itself is safe.
        _fsync(target.parent)


def atomic_write(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path`, whole or not at all.

    Raises:
        WriteError: the disk is full, or the folder does not allow the file.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def refuse_existing(path: str | Path, force: bool) -> None:
    """Raises unless `path` is free (nothing there, or an empty folder) or `force` is given.

    Raises:
        OutputExistsError: there is something already.
    """
    path = Path(path)
    if force or not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return
    raise OutputExistsError(f"{path} exists already: choose another name, or overwrite it with force=True")


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON; paths become strings, tuples become lists.

    Raises:
        ShapeError: a number is not finite, which JSON cannot say.
        WriteError: the file cannot be written.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=_json_value)
    except ValueError as error:
        raise ShapeError(f"expected finite numbers for {path}, got NaN or infinity: store None instead") from error
    atomic_write(path, text.encode() + b"\n")


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Writes named tensors and a header of strings as one safetensors file; the same values give the same bytes.

    Args:
        path: the file, replaced if it exists.
        tensors: on any device; stored contiguous. No two may be the same memory.
        header: what the file is, under the key "mergevq" ("tokenizer/1"), and anything else.

    Raises:
        WriteError: the disk is full, or the folder does not allow the file.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        mode = temporary.stat().st_mode
        try:
            safetensors.torch.save_file(stored, temporary, metadata=dict(header))
        except safetensors.SafetensorError as error:  # An OSError in disguise; its number is only in the text.
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        temporary.chmod(mode)  # It put a file of its own there, which nobody else may read.
        _sort_header(temporary)


# ---------------------------------------------------------------------------------------------------------- reading


def read_json(path: str | Path) -> Any:
    """Returns the value of a JSON file.

    Raises:
        CheckpointError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: expected a JSON file, got: {_reason(error)}: check the path") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON, the file is damaged ({error}): restore or delete it") from error


def load_tensors(
    path: str | Path, names: Sequence[str] | None = None, what: str = "safetensors file"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors, on the CPU, and the header of a safetensors file.

    Args:
        path: the file.
        names: read these tensors only; None reads all.
        what: is expected there, for messages.

    Raises:
        CheckpointError: the file is missing, truncated, or not a safetensors file; or it has no tensor of a name.
    """
    with _opened(Path(path), what) as file:
        known = file.keys()
        missing = [name for name in names or () if name not in known]
        if missing:
            raise CheckpointError(f"{path}: expected the tensor {missing[0]}, it is missing: restore the file")
        wanted = known if names is None else names
        return {name: file.get_tensor(name) for name in wanted}, dict(file.metadata() or {})


def read_header(path: str | Path) -> dict[str, str]:
    """Returns the header of a safetensors file without reading its tensors.

    Raises:
        CheckpointError: the file is missing, truncated, or not a safetensors file.
    """
    with _opened(Path(path)) as file:
        return dict(file.metadata() or {})


def check_format(header: Mapping[str, Any], form: str, path: str | Path) -> None:
    """Checks that a header names the kind and version of contents that are wanted.

    Args:
        header: as `load_tensors` or `read_header` gives it; or a JSON object with the same key "mergevq".
        form: kind and version, such as "tokenizer/1".
        path: the file, for messages.

    Raises:
        CheckpointError: the file is not ours, or of another kind or version.
    """
    kind, _, version = form.partition("/")
    found = header.get("mergevq") if isinstance(header, Mapping) else None  # JSON may hold anything.
    if not isinstance(found, str):
        raise CheckpointError(
            f"{path}: expected a mergevq {kind} file, got a file of another origin: "
            "give one of mergevq's own, or convert the authors' with `mergevq convert`"
        )
    found_kind, _, found_version = found.partition("/")
    if found_kind != kind:
        wanted, came = (_WORDS.get(name, f"{name} file") for name in (kind, found_kind))
        raise CheckpointError(f"{path}: expected a {wanted}, got a {came}: give the path of a {wanted}")
    if found_version != version:
        newer = found_version.isdecimal() and int(found_version) > int(version)
        advice = f"mergevq {header.get('version', '?')} wrote it, upgrade mergevq" if newer else "write it again"
        raise CheckpointError(f"{path}: expected format {form}, got {found}: {advice}")


# ---------------------------------------------------------------------------------------------------- model loading


def check_fields(record: Any, names: Sequence[str], path: str | Path) -> None:
    """Checks that what a file holds has every field of `names`.

    Raises:
        CheckpointError: one is missing; the message names it.
    """
    for name in names:
        if not isinstance(record, Mapping) or name not in record:
            raise CheckpointError(f"{path}: expected the field {name}, it is missing: restore the file")


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copies `tensors` into `module`; every name and shape must agree, or nothing is copied.

    Args:
        module: the receiver.
        tensors: one for each entry of its state_dict; floating-point types are converted to the module's.
        what: where the tensors come from, for the message.

    Raises:
        CheckpointError: lists at most ten missing, unexpected and misshaped names each.
    """
    own = module.state_dict()
    wrong = [name for name in own if name in tensors and not _fits(own[name], tensors[name])]
    found = {
        "missing": [name for name in own if name not in tensors],
        "unexpected": [name for name in tensors if name not in own],
        "misshaped": [f"{n}: expected {_describe(own[n])}, got {_describe(tensors[n])}" for n in wrong],
    }
    problems = []
    for title, names in found.items():
        if names:
            more = f" and {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
            problems.append(f"{len(names)} {title} ({'; '.join(names[:_SHOWN_KEYS])}{more})")
    if problems:
        raise CheckpointError(f"{what} does not fit the model: {', '.join(problems)}: use the config it was saved with")
    module.load_state_dict(dict(tensors), strict=True)


# ---------------------------------------------------------------------------------------------------------- details


def _json_value(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sort_header(path: Path) -> None:
    """Sorts the header's strings: safetensors writes them in an order that changes from run to run."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # The same characters in another order; were they ever escaped otherwise, leave them.
            file.seek(8)
            file.write(text.ljust(size))


def _write_error(path: Path, target: Path, error: OSError) -> WriteError:
    if error.errno in _NO_ROOM:
        folder = next(parent for parent in target.parents if parent.exists())
        free = shutil.disk_usage(folder).free / 2**20
        return WriteError(
            f"{path}: no room to write it ({free:.1f} MiB free on the disk): make room or write elsewhere"
        )
    place = error.filename2 or error.filename or path  # Perhaps a parent that is a file.
    return WriteError(f"{path}: cannot be written ({place}: {_reason(error)}): write elsewhere")


def _reason(error: OSError) -> str:
    return (error.strerror or str(error) or type(error).__name__).lower()


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _fits(own: Tensor, given: Tensor) -> bool:
    return own.shape == given.shape and own.is_floating_point() == given.is_floating_point()


@contextmanager
def _opened(path: Path, what: str = "safetensors file") -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        came, advice = _what_came(path, error)
        raise CheckpointError(f"{path}: expected a {what}, got {came}: {advice}") from error


def _what_came(path: Path, error: Exception) -> tuple[str, str]:
    """Says what an unreadable safetensors file is instead, and what to do about it."""
    if not path.exists():
        return "nothing, there is no such file", "check the path"
    if path.is_dir():
        return "a folder", "give the file in it"
    try:
        with path.open("rb") as file:
            start = file.read(64)
            size, promised = path.stat().st_size, _promised_size(path)
    except OSError as failure:
        return f"none ({_reason(failure)})", "check its permissions"
    if size == 0:
        return "an empty file", "save or copy it again"
    if promised > size:
        return f"{size} of at least {promised} bytes, it is truncated", "save or copy it again"
    for magic, name, advice in _MAGIC:
        if start.startswith(magic) and not promised:
            return name, advice
    return f"something else or a damaged one ({str(error).splitlines()[0]})", "save or copy it again"


def _promised_size(path: Path) -> int:
    """Returns the least size that a safetensors file must have by its own header, 0 if it does not start like one."""
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if file.read(1) != b"{":
            return 0
        if 8 + header_size > path.stat().st_size:
            return 8 + header_size
        file.seek(8)
        with suppress(ValueError, TypeError, LookupError):
            header = json.loads(file.read(header_size))
            ends: list[int] = [e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"]
            return 8 + header_size + max(ends)
        return 8 + header_size
