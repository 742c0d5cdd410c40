"""What a run tells: log.jsonl for programs, a progress bar or plain lines for people."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mergevq.files import atomic_write


def truncate_log(path: Path, step: int) -> None:
    """Drops the lines of `path` that are later than `step`, and a line that a dying process left half written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    atomic_write(path, "".join(kept).encode())


def validated_steps(path: Path) -> set[int]:
    """Returns the steps of which the log at `path` has a validation."""
    steps = set()
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["kind"] == "val":
            steps.add(record["step"])
    return steps


class RunLog:
    """Appends records to a JSONL file and shows the progress on stderr. Does nothing on processes other than the first.

    Use it as a context manager. On a terminal there is a bar with images/s and time left, elsewhere a line for each
    record.

    Args:
        path: the JSONL file.
        progress: how much of the run is done already, 0 to 1.
        enabled: whether this process is the first.
    """

    def __init__(self, path: Path, progress: float, enabled: bool) -> None:
        self._path = path
        self._enabled = enabled
        self._first = progress
        self._began = time.perf_counter()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "RunLog":
        if self._enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>5.1f} %  {task.fields[rate]}  {task.fields[left]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("step 0", total=1.0, completed=self._first, rate="", left="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int, steps: int, progress: float, rate: float) -> None:
        """Moves the bar.

        Args:
            step: optimizer steps done.
            steps: optimizer steps of the run.
            progress: how much of the run is done, 0 to 1.
            rate: images per second of all processes together.
        """
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=progress,
                description=f"step {step}/{steps}",
                rate=f"{rate:.1f} images/s",
                left=self._time_left(progress),
            )

    def write(self, record: Mapping[str, Any], progress: float) -> None:
        """Appends one record (it holds at least `kind` and `step`) to the file and, if there is no bar, prints it.

        Args:
            record: JSON values. A number that is not finite, for which JSON has no word, becomes null in the file and
                gets a line of its own on stderr.
            progress: how much of the run is done, 0 to 1.
        """
        if not self._enabled:
            return
        infinite = {name: v for name, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
        with self._path.open("a") as file:
            file.write(json.dumps({**record, **dict.fromkeys(infinite)}, allow_nan=False) + "\n")
        if infinite:
            found = ", ".join(f"{name} = {value}" for name, value in infinite.items())
            self.say(f"not finite at step {record['step']}, null in {self._path.name}: {found}")
        if self._bar is None:
            self.say(f"{_readable(record)}  {self._time_left(progress)}")
        elif record["kind"] != "train":
            self.say(_readable(record))

    def say(self, text: str) -> None:
        """Prints one line to stderr, above the bar if there is one."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def _time_left(self, progress: float) -> str:
        done = progress - self._first
        if done <= 0:
            return ""
        seconds = math.ceil((time.perf_counter() - self._began) * (1 - progress) / done)
        hours, minutes = divmod(seconds // 60, 60)
        clock = f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"
        return f"{clock} left"


_SHOWN_AS = {"num_tokens": "K", "images_per_second": "images/s"}


def _readable(record: Mapping[str, Any]) -> str:
    shown = [f"{record['kind']} step {record['step']}"]
    for name, value in record.items():
        if name not in ("kind", "step", "elapsed"):
            number = f"{value:.4g}" if isinstance(value, float) else value
            shown.append(f"{_SHOWN_AS.get(name, name.replace('_', ' '))} {number}")
    return "  ".join(shown)
