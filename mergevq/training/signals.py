"""Stopping a run from outside without losing it."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class TrainingStopped(SystemExit):
    """A signal ended the training after its state was saved.

    It is a SystemExit: uncaught, it ends the process with 128 + the signal's number (SIGINT 130, SIGTERM 143), as a
    shell expects. The training has printed the message.

    Args:
        signum: which signal.
        step: optimizer steps done.
        quiet: exit with 0 all the same.
    """

    def __init__(self, signum: int, step: int, quiet: bool = False) -> None:
        super().__init__(0 if quiet else 128 + signum)
        self.signum = signum
        self.step = step

    def __str__(self) -> str:
        return (
            f"stopped by {signal.Signals(self.signum).name} after step {self.step}, everything saved: --resume goes on"
        )


class StopRequest:
    """Within `with StopRequest() as stop`, the first SIGTERM or SIGINT only sets `stop.signum`.

    A second one of the same kind does what it would have done without us, so that an impatient Ctrl-C still works.
    Outside the main thread Python allows no handlers, and nothing is changed.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore(signum)

    def _restore(self, signum: int) -> None:
        previous = self._previous.pop(signum)
        # None: the handler was not installed from Python and cannot be put back.
        signal.signal(signum, signal.SIG_DFL if previous is None else previous)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum in tuple(self._previous):
            self._restore(signum)
