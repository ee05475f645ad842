"""SIGINT and SIGTERM as a request to stop, which the training loop checks between steps."""

import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context manager that stores the first SIGINT or SIGTERM in `signum`. A second one has its usual effect.

    Signals that follow within ``patience`` seconds count as the first one. A launcher passes on the signals that it
    gets, so a signal to a whole job reaches its processes twice.
    """

    def __init__(self, patience: float = 0.0) -> None:
        self.signum: int | None = None
        self._patience, self._noted = patience, 0.0
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self._noted = signum, time.monotonic()
            if self._patience == 0:
                self._restore()
        elif time.monotonic() - self._noted > self._patience:
            self._restore()
            signal.raise_signal(signum)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
