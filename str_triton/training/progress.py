"""A progress line for training: position, loss and accuracy, time left."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

DRAW_SECONDS = 0.25
PLAIN_SECONDS, PLAIN_SHARE = 5.0, 0.05  # the least time between plain lines, and the least share of the time so far


class Output(Console):
    """A console that leaves a closed pipe to `run_program`, as print does. rich would exit with code 1."""

    def on_broken_pipe(self) -> None:
        raise  # rich calls this while it handles the BrokenPipeError


class ProgressBar:
    """A progress bar on a terminal; an occasional plain line if output goes to a file or a pipe.

    The loop fetches numbers from the device only when `due` is true.
    """

    def __init__(self, total: int, start: int = 0, *, console: Console | None = None) -> None:
        self.console = console or Output(file=sys.stdout, soft_wrap=True, highlight=False)
        self.total = total
        self._start, self._began = start, time.monotonic()
        self._drawn = float("-inf")
        self._bar: Progress | None = None
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[time_left]}"))
            self._bar = Progress(*columns, console=self.console, auto_refresh=False)
            self._task = self._bar.add_task("", total=total, completed=start, time_left="")
            self._bar.start()

    @property
    def due(self) -> bool:
        """True if it is time to draw again."""
        now = time.monotonic()
        plain = max(PLAIN_SECONDS, PLAIN_SHARE * (now - self._began))
        return now - self._drawn >= (DRAW_SECONDS if self.console.is_terminal else plain)

    def show(self, step: int, text: str) -> None:
        """Draw ``text`` (loss, accuracy, ...) with the position ``step`` and the time left."""
        self._drawn = time.monotonic()
        left = self._time_left(step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text, time_left=left, refresh=True)
        else:
            self.console.print(f"{text}  {100 * step / self.total:.0f} %  {left}")

    def close(self) -> None:
        """Stop the bar and restore the terminal."""
        if self._bar is not None:
            self._bar.stop()

    def _time_left(self, step: int) -> str:
        done = step - self._start
        if done <= 0:
            return ""
        seconds = round((time.monotonic() - self._began) / done * (self.total - step))
        hours, rest = divmod(seconds, 3600)
        clock = f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
        return f"{clock} left"
