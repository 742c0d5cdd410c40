"""Configurations as plain frozen dataclasses: their types checked, and carried through JSON.

No torch is imported here.
"""

import difflib
import math
import operator
from dataclasses import asdict, fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from mergevq.errors import ConfigError

T = TypeVar("T")


def check_is(value: object, kind: type, advice: str) -> None:
    """Checks that an argument is what the signature says, where another thing is easily given.

    Args:
        value: the argument.
        kind: its class.
        advice: what makes or names one.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(value, kind):
        came = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
        raise ConfigError(f"expected a {kind.__name__}, got {came}: {advice}")


def check_types(config: Any, path: str = "") -> None:
    """Checks that every field of a dataclass, and of those in it, has a value of its type.

    Raises:
        ConfigError: one has not; a misspelt word gets its nearest neighbour.
    """
    hints = get_type_hints(type(config))
    for f in fields(config):
        name, value = f"{path}{f.name}", getattr(config, f.name)
        if is_dataclass(value):
            check_types(value, f"{name}.")
        elif not _fits(value, hints[f.name]):
            words = [w for w in get_args(hints[f.name]) if isinstance(w, str)]
            near = difflib.get_close_matches(str(value), words, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{name} must be {_named(hints[f.name])}, got {value!r}{hint}")


def check_seed(seed: Any, name: str = "a seed") -> int:
    """Returns the seed, of whatever integer type it came.

    Raises:
        ConfigError: it is no whole number, or torch takes none so large.
    """
    try:
        number = operator.index(seed)
    except TypeError:
        raise ConfigError(f"expected {name} that is a whole number, got {seed!r}") from None
    if not -(2**63) <= number < 2**64:
        raise ConfigError(f"expected {name} of at most 64 bits, got {number}")
    return number


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        kinds = [inner[0]] * len(value) if inner[-1:] == (...,) and isinstance(value, tuple) else inner
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _named(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if hint is float:
        return "a finite number"
    return str(hint) if get_origin(hint) else f"of type {hint.__name__}"


def config_to_dict(config: Any) -> dict[str, Any]:
    """Returns the dataclass as nested dicts of JSON values (tuples become lists)."""
    return asdict(config)


def config_from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """Builds the dataclass `cls` from nested dicts as written by `config_to_dict`.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type. Missing keys take their defaults.
    """
    hints = get_type_hints(cls)
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise ConfigError(f"{cls.__name__}.{name} must be a table, got {value!r}")
            arguments[name] = config_from_dict(hints[name], value)  # type: ignore[arg-type]
        else:
            arguments[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ConfigError(f"{cls.__name__}: {error}") from error
