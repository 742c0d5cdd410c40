"""Where models are: files, the folders of runs, the models that come with the package, the Hugging Face hub."""

import re
from pathlib import Path

from mergevq.errors import CheckpointError

_SHIPPED = Path(__file__).parent / "weights"


def shipped_names() -> tuple[str, ...]:
    """Returns the names of the models that come with the package."""
    return tuple(sorted(path.name for path in _SHIPPED.iterdir() if path.is_dir())) if _SHIPPED.is_dir() else ()


def shipped_roles(name: str) -> tuple[str, ...]:
    """Returns which models come with the package under a name: tokenizer, merge_ar, random_ar."""
    return tuple(sorted(file.stem for file in (_SHIPPED / name).glob("*.safetensors")))


def find_model_file(name: str | Path, suffix: str = ".safetensors", role: str = "tokenizer") -> Path:
    """Returns the path of a model file.

    Args:
        name: a file; a folder with `model.safetensors` in it, such as a training run; the name of models that come with
            the package, such as "emoji_64"; or a Hugging Face hub id "owner/name", whose `model.safetensors` is
            downloaded once. What is on the disk under that name comes first.
        suffix: of the file looked for in a folder; with another suffix the hub is not asked.
        role: which model of those that come with the package under one name: tokenizer, merge_ar or random_ar.

    Raises:
        CheckpointError: there is no such file, or the hub cannot be reached or does not have it.
    """
    if not isinstance(name, str | Path):
        raise CheckpointError(f"expected the name of a model, a file, a folder or a hub id, got {name!r}: give one")
    file_name = f"model{suffix}"
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / file_name).is_file():
            return path / file_name
        raise CheckpointError(f"{path}: expected {file_name} in this folder, found none: give the file itself")
    if suffix == ".safetensors" and str(name) in shipped_names():
        if (_SHIPPED / str(name) / f"{role}{suffix}").is_file():
            return _SHIPPED / str(name) / f"{role}{suffix}"
        there = ", ".join(shipped_roles(str(name)))
        raise CheckpointError(f"{name}: expected one of the models that come with mergevq ({there}), it has no {role}")
    if suffix != ".safetensors" or str(name).endswith(suffix) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):
        raise CheckpointError(
            f"{name}: expected a model, there is no such file: give a file, a folder with {file_name}, "
            f'{_shipped_words()}or a hub id such as "owner/name"'
        )
    return _download(str(name), file_name)


def _shipped_words() -> str:
    return "".join(f"{name} (comes with mergevq), " for name in shipped_names())


def _download(repository: str, file_name: str) -> Path:
    from huggingface_hub import errors, hf_hub_download  # Slow to import, and most models are local files.

    here = f"{repository}: no such file or folder here, and"
    try:
        _ask_once(repository, file_name)
        return Path(hf_hub_download(repository, file_name))
    except errors.LocalEntryNotFoundError as error:  # One of the EntryNotFoundErrors, but it means: no connection.
        raise CheckpointError(f"{here} the hub cannot be reached: check the path, or the network connection") from error
    except errors.EntryNotFoundError as error:
        raise CheckpointError(f"{here} on the hub it has no {file_name}, the only file read: ask its owner") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{here} the hub has none, or a private one: check the name, or log in there") from error
    except Exception as error:  # The client's, its HTTP library's and the system's errors have no common base.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"{here} the hub does not give it ({reason}): try again, or give a file") from error


def _ask_once(repository: str, file_name: str) -> None:
    """Raises if the hub cannot be reached and nothing is kept from before.

    The client itself would try six times, half a minute long, and tell of each.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repository, file_name), str):
        return  # Then the client tries once.
    try:
        get_hf_file_metadata(hf_hub_url(repository, file_name))
    except errors.HfHubHTTPError:
        return  # An answer; the client knows what it means.
    except Exception as error:  # The HTTP library's errors have no base of the client's.
        raise errors.LocalEntryNotFoundError(str(error)) from error
