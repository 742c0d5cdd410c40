"""Several numbers in one option: with commas between, and, where the words may be many, with spaces."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import tyro


def several(
    of: Callable[[str], Any], metavar: str, words: Literal[1, "*"] = 1, count: int | None = None
) -> tyro.constructors.PrimitiveConstructorSpec[tuple[Any, ...]]:
    """Returns how several numbers are read and written.

    Args:
        of: what makes a number of a word.
        metavar: what the help calls them.
        words: 1, so that other words may follow; or "*", so that spaces do as well as commas.
        count: how many they must be; None is at least one.
    """
    example = "0.2,0.8" if count else "1,2"

    def read(given: list[str]) -> tuple[Any, ...]:
        text = " ".join(given)
        try:
            values = tuple(of(word) for part in given for word in part.removesuffix(",").split(","))
        except ValueError as error:
            raise ValueError(f"expected numbers with commas between, such as {example}, got {text!r}") from error
        if not values or count not in (None, len(values)):
            wanted = f"{count} numbers" if count else "at least one number"
            raise ValueError(f"expected {wanted} with commas between, such as {example}, got {text!r}")
        return values

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=words,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(f"{number:g}" for number in value)],
    )


Floats = Annotated[tuple[float, ...], several(float, "X,...")]
Integers = Annotated[tuple[int, ...], several(int, "INT,...")]
GroupFloats = Annotated[tuple[float, ...], several(float, "X,...", "*")]
"""One for all bit groups or one for each; spaces do, too."""
GroupIntegers = Annotated[tuple[int, ...], several(int, "INT,...", "*")]
Interval = Annotated[tuple[float, float], several(float, "X,X", "*", count=2)]
"""From and to."""
