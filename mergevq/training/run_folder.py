"""The folder of a run: whether it may be written, what run.json says, whether a run may go on in it."""

import platform
import sys
from pathlib import Path
from typing import Any

import torch

from mergevq import __version__
from mergevq.configuration import config_from_dict, config_to_dict
from mergevq.errors import CheckpointError, ConfigError, DataError
from mergevq.files import check_fields, check_format, read_json, refuse_existing, write_json
from mergevq.training.checkpoint import has_state
from mergevq.training.config import TokenizerRun, flat_config

KIND = "tokenizer-run/1"

FREE_FIELDS = (
    "loop.steps",
    "loop.minutes",
    "loop.val_num_tokens",
    "loop.val_every",
    "loop.val_images",
    "loop.save_every",
    "loop.log_every",
    "data.train",
    "data.val",
    "data.workers",
)
"""Fields that may change when a run goes on. Every other one shaped the weights trained so far.

Images may lie elsewhere, but they must be the same under the same names; only their number is compared.
"""


def check_folder(out: Path, run: TokenizerRun, resume: bool, force: bool) -> None:
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
    before, now = flat_config(load_run(out)), flat_config(run)
    differing = [name for name in now if before[name] != now[name] and name not in FREE_FIELDS]
    if differing:
        named = ", ".join(f"{name} ({before[name]!r} before, {now[name]!r} now)" for name in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ConfigError(
            f"expected the configuration that {out} was started with, got other {named}{more}: "
            "put them back, or start another run from its model with --init"
        )


def check_images(out: Path, train: int, val: int) -> None:
    """Checks that a run that goes on in `out` has as many images as before.

    Raises:
        DataError: it has not.
    """
    before = _read_record(out)["images"]
    if before != {"train": train, "val": val}:
        raise DataError(
            f"expected the {before['train']} images and {before['val']} held-out ones that {out} was started with, "
            f"got {train} and {val}: point data.train and data.val at the same images"
        )


def begin(out: Path, run: TokenizerRun, resume: bool, train: int, val: int) -> None:
    """Writes `run.json`: version, commands, resolved configuration. Without `resume` an earlier run's results go.

    Args:
        out: folder of the run.
        run: its configuration.
        resume: whether it goes on there.
        train: number of images to train on.
        val: number of held-out images.

    Raises:
        WriteError: the folder cannot be written.
    """
    commands = [sys.argv]
    if resume:
        commands = [*read_json(out / "run.json").get("commands", []), *commands]
    else:
        # Only a run's own files: with --force the folder may hold others.
        for pattern in ("model.safetensors", "log.jsonl", "run.json", "state/*", "images/step_*.png"):
            for path in out.glob(pattern):
                path.unlink()
    record = {
        "mergevq": KIND,
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commands": commands,
        "images": {"train": train, "val": val},
        "config": config_to_dict(run),
    }
    write_json(out / "run.json", record)


def load_run(out: Path) -> TokenizerRun:
    """Returns the run whose folder `out` is.

    Raises:
        CheckpointError: there is no run.json, or it is damaged.
    """
    return config_from_dict(TokenizerRun, _read_record(out)["config"])


def _read_record(out: Path) -> dict[str, Any]:
    path = out / "run.json"
    record: dict[str, Any] = read_json(path)
    check_format(record, KIND, path)
    check_fields(record, ("images", "config"), path)
    check_fields(record["images"], ("train", "val"), path)
    return record
