"""The finished parts of an evaluation in a folder, from which an interrupted one goes on."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergevq.errors import OutputExistsError
from mergevq.evaluation.feature_cache import remove_features
from mergevq.evaluation.schema import reading
from mergevq.files import read_json, refuse_existing, write_json

SCHEMA = "mergevq.evaluation-part/2"

PARTS = ("reconstruction", "generation", "representation", "sanity")
"""Every part by name, in the order in which they are made."""

FEATURES = "features"
RESULTS = ("evaluation.json", "report.html", "card.md")

_PARTS = "parts"


@dataclass(frozen=True, eq=False)
class Part:
    """What one part found."""

    result: dict[str, Any]
    """The JSON of its report."""
    section: Callable[[], str]
    """Gives its section of the page."""


class KeptParts:
    """Finished parts by name, each with what it depends on.

    Args:
        folder: where; None keeps nothing.
        requests: of each part that is wanted, all that its result depends on, as JSON values.
        force: parts that are there are made anew.
    """

    def __init__(self, folder: Path | None, requests: Mapping[str, Mapping[str, Any]], force: bool) -> None:
        self.folder, self.force = folder, force
        # As they come back from a file: tuples as lists.
        self.requests: dict[str, Any] = json.loads(json.dumps(requests))

    def claim(self) -> None:
        """Checks that the folder may be written to, and with `force` removes the parts that are there.

        Raises:
            OutputExistsError: it holds other files, or the part of another model, other images or other settings.
            CheckpointError: the file of a part is damaged.
        """
        if self.folder is None:
            return
        if not self.force:
            own = {_PARTS, FEATURES, *RESULTS}
            there = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
            if not (self.folder / _PARTS).is_dir() or any(name not in own and name[0] != "." for name in there):
                refuse_existing(self.folder, False)
            for name in self.requests:
                self.read(name)
            return
        # Only what an evaluation wrote: "parts" and "features" are anybody's names.
        for name in PARTS:
            self._path(name).unlink(missing_ok=True)
        remove_features(self.folder / FEATURES)

    def read(self, name: str) -> dict[str, Any] | None:
        """Returns result and section of a finished part, as JSON values; None if it is not there.

        Raises:
            OutputExistsError: it is one of another model, other images or other settings.
            CheckpointError: its file is damaged.
        """
        if self.folder is None or not self._path(name).exists():
            return None
        with reading(read_json(self._path(name)), SCHEMA, str(self._path(name))) as found:
            kept, wanted = found["request"], self.requests[name]
            if kept != wanted:
                other = next(key for key in {**wanted, **kept} if kept.get(key) != wanted.get(key))
                came, asked = (_short(value.get(other)) for value in (kept, wanted))
                raise OutputExistsError(
                    f"{self.folder} holds the {name} of another {other.replace('_', ' ')}, {came} instead of {asked}: "
                    "choose another folder, or start anew with force=True"
                )
            return {"result": found["result"], "section": found["section"]}

    def write(self, name: str, result: Any, section: str) -> None:
        """Keeps a finished part.

        Raises:
            WriteError: the disk is full.
        """
        if self.folder is not None:
            value = {"schema": SCHEMA, "request": self.requests[name], "result": result, "section": section}
            write_json(self._path(name), value)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / _PARTS / f"{name}.json"


def _short(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
