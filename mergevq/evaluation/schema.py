"""Reading results back: the JSON of another kind or version is refused."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mergevq.errors import CheckpointError


@contextmanager
def reading(value: Any, schema: str, source: str) -> Iterator[Mapping[str, Any]]:
    """Gives a result to take apart, having checked its schema; a field that is missing inside the block is told.

    Args:
        value: as JSON gives it.
        schema: kind and version that are wanted, such as "mergevq.generation/1".
        source: what to call it in messages: its file.

    Raises:
        CheckpointError: it is no such result, or is damaged.
    """
    check_schema(value, schema, source)
    try:
        yield value
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        what = f"no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise CheckpointError(
            f"{source}: expected all of a {schema}, got a damaged one ({what}): evaluate again"
        ) from error


def check_schema(value: Any, schema: str, source: str) -> None:
    """Checks that a JSON value is a result of the kind and version that are wanted.

    Args:
        value: as JSON gives it.
        schema: such as "mergevq.generation/1".
        source: what to call it in messages: its file.

    Raises:
        CheckpointError: it is none.
    """
    found = value.get("schema") if isinstance(value, Mapping) else None
    if not isinstance(found, str):
        raise CheckpointError(
            f"{source}: expected a result with the schema {schema}, got JSON without one: give a file of `mergevq eval`"
        )
    (kind, _, version), (found_kind, _, found_version) = schema.partition("/"), found.partition("/")
    if found_kind != kind:
        raise CheckpointError(f"{source}: expected the schema {schema}, got {found}: give the file of the other kind")
    if found_version != version:
        newer = found_version.isdecimal() and int(found_version) > int(version)
        advice = "upgrade mergevq, a newer one wrote it" if newer else "evaluate again, an older mergevq wrote it"
        raise CheckpointError(f"{source}: expected the schema {schema}, got {found}: {advice}")
