"""The folder of a run: whether it may be written, what run.json says, whether a run may go on in it."""

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from mergevq import __version__
from mergevq.configuration import config_from_dict, config_to_dict
from mergevq.errors import CheckpointError, ConfigError, DataError
from mergevq.files import check_fields, check_format, read_json, refuse_existing, write_json
from mergevq.training.checkpoint import FILES, has_state
from mergevq.training.config import Run, flat_config

R = TypeVar("R", bound=Run)


def check_folder(out: Path, run: Run, resume: bool, force: bool) -> None:
    """Checks that the run may begin in `out`, or go on there. Writes nothing.

    Raises:
        OutputExistsError: there is something in `out`, and neither `resume` nor `force` is given.
        CheckpointError: there is nothing to resume.
        ConfigError: the run in `out` has another configuration (the message names the fields), or both were given.
    """
    if resume and force:
        raise ConfigError("expected one of --resume (go on) and --force (start again), got both")
    if not resume:
        refuse_existing(out, force)
        return
    if not has_state(out / "state"):
        raise CheckpointError(f"expected a training state in {out}/state, found none: drop --resume to start there")
    before, now = flat_config(load_run(out, type(run))), flat_config(run)
    differing = [name for name in now if before[name] != now[name] and name not in run.free_fields]
    if differing:
        named = ", ".join(f"{name} ({before[name]!r} before, {now[name]!r} now)" for name in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ConfigError(
            f"expected the configuration that {out} was started with, got other {named}{more}: "
            "put them back, or start another run from its model with --init"
        )


# Files that every run writes anew, and those that it may leave as another left them.
_REPLACED = ("model.safetensors", "log.jsonl", "run.json", *(f"state/{name}" for name in FILES))
_RESULTS = ("result.json", "images/step_*.png")

# What a run may take from a cache, by the name of the field in `data` and in run.json.
_CACHES = {"tokens": "tokens", "teacher_cache": "features of the teacher"}


def check_images(out: Path, run: Run, caches: Mapping[str, str], train: int, val: int) -> None:
    """Checks that a run that goes on in `out` has as many images as before, and the same caches.

    Raises:
        DataError: it has not.
    """
    record = _read_record(out, run.kind)
    before = record["images"]
    if before != {"train": train, "val": val}:
        raise DataError(
            f"expected the {before['train']} images and {before['val']} held-out ones that {out} was started with, "
            f"got {train} and {val}: point data.train and data.val at the same images"
        )
    for name, what in _CACHES.items():
        # The first runs did not tell.
        if record.get(name, caches.get(name)) != caches.get(name):
            raise DataError(
                f"expected the {what} that {out} was started with, got others: point data.{name} at the same cache, or "
                "start another run from its model with --init"
            )


def begin(out: Path, run: Run, resume: bool, caches: Mapping[str, str], train: int, val: int) -> None:
    """Writes `run.json`: version, commands, resolved configuration. Without `resume` an earlier run's results go.

    Args:
        out: folder of the run.
        run: its configuration.
        resume: whether it goes on there.
        caches: fingerprint of each cache to train on, by its name in `data`.
        train: number of images to train on.
        val: number of held-out images.

    Raises:
        WriteError: the folder cannot be written.
    """
    commands = [sys.argv]
    if resume:
        commands = [*read_json(out / "run.json").get("commands", []), *commands]
    else:
        # Only a run's own files: with --force the folder may hold others, and without a run.json it is nobody's run.
        results = _RESULTS if (out / "run.json").is_file() else ()
        for pattern in (*_REPLACED, *results):
            for path in out.glob(pattern):
                if path.is_file() or path.is_symlink():
                    path.unlink()
    record = {
        "mergevq": run.kind,
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commands": commands,
        "images": {"train": train, "val": val},
        **{name: caches.get(name) for name in _CACHES},
        "config": config_to_dict(run),
    }
    write_json(out / "run.json", record)


def load_run(out: Path, cls: type[R]) -> R:
    """Returns the run whose folder `out` is.

    Args:
        out: folder of the run.
        cls: the kind of run, such as TokenizerRun.

    Raises:
        CheckpointError: there is no run.json, it is damaged, or the run is of another kind.
    """
    return config_from_dict(cls, _read_record(out, cls.kind)["config"])


def _read_record(out: Path, kind: str) -> dict[str, Any]:
    path = out / "run.json"
    record: dict[str, Any] = read_json(path)
    check_format(record, kind, path)
    check_fields(record, ("images", "config"), path)
    check_fields(record["images"], ("train", "val"), path)
    return record
