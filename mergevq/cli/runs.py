"""What the verbs that train share: a run's fields as options whose defaults are those of a preset."""

import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import tyro

from mergevq.cli.options import read_numbers
from mergevq.errors import ConfigError
from mergevq.training.config import Run

M = TypeVar("M")
R = TypeVar("R", bound=Run)


def number_lists() -> tyro.constructors.ConstructorRegistry:
    """Returns what lets lists of K be written 144,64 as with the other verbs, or 144 64."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def numbers(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[tuple[int, ...]] | None:
        if get_origin(info.type) is not tuple or get_args(info.type) != (int, ...):
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="INT,...",
            instance_from_str=read_numbers,
            is_instance=lambda value: isinstance(value, tuple) and all(isinstance(k, int) for k in value),
            str_from_instance=lambda value: [",".join(map(str, value))],
        )

    return registry


def base_run(
    words: Sequence[str], kind: type[R], find: Callable[[str], R], known: Sequence[str]
) -> tuple[str | None, R]:
    """Returns the preset's name and the run that gives the defaults: the preset's, or the one that is resumed."""
    name, folder = value_of(words, "--preset"), value_of(words, "--out", "-o")
    asked_help = any(word in ("-h", "--help") for word in words)
    if name is None and folder is not None and "--resume" in words and not asked_help:
        from mergevq.training.run_folder import load_run

        return name, load_run(Path(folder), kind)
    if name is None and not asked_help:
        raise ConfigError(f"expected --preset and one of {', '.join(known)}, got none")
    return name, find(name or known[0])  # --help shows the first one's defaults.


def preset_help(known: Sequence[str]) -> str:
    """Returns the help of --preset."""
    return f"One of {', '.join(known)}. Not needed with --resume."


def tell(path: Path) -> None:
    """Prints the path of the result, once."""
    if os.environ.get("RANK", "0") == "0":  # Processes that torchrun started all end here.
        print(path)


def parts(cls: type[M], config: Any, **others: Any) -> M:
    """Returns a `cls` with the fields of `config`, which has the same ones but is checked more or less."""
    return cls(**{f.name: getattr(config, f.name) for f in fields(cls)} | others)  # type: ignore[arg-type]


def value_of(words: Sequence[str], *names: str) -> str | None:
    """Returns the value of an option, the last if it is repeated; None if it is not there."""
    found = None
    for word, after in zip(words, [*words[1:], None], strict=True):
        name, equals, value = word.partition("=")
        if name in names and (equals or after is not None):
            found = value if equals else after
    return found
