"""What a person can put right is one line and exit code 2; everything else is a bug and keeps its traceback."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from str_triton.files import printable

BAD_INPUT = 2


class UserError(Exception):
    """Something a person can put right. The message is one line that names the offending value and what to do."""


class Interrupted(Exception):
    """The run was asked to stop by a signal and has saved its state."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


@contextmanager
def as_user_error(*kinds: type[Exception]) -> Iterator[None]:
    """Turn the named exceptions of a block that handles outside input into a `UserError` with the same message."""
    try:
        yield
    except kinds as error:
        raise UserError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """The message of ``error`` on one line; an ``OSError`` as its reason and its file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def run_program(program: Callable[[], None]) -> int:
    """Run ``program`` and return the exit code of the process.

    0 for success, 2 for a `UserError` (one line on stderr), 128 plus the signal's number for a run that was asked to
    stop. Any other exception passes through. Programs that several processes may run together take `job.run_job`.
    """
    try:
        program()
        return 0
    except SystemExit as leaving:  # the command-line parser has printed its own message
        return leaving.code if isinstance(leaving.code, int) else 0
    except UserError as error:
        tell(f"error: {error}")
        return BAD_INPUT
    except Interrupted as stop:
        tell(str(stop))
        return 128 + stop.signum
    except KeyboardInterrupt:
        tell("interrupted")
        return 130


def warn(message: str) -> None:
    """Print a warning on standard error, from the first process of a job alone."""
    tell(f"warning: {message}")


def tell(message: str) -> None:
    """Print a line on standard error, from the first process of a job alone; names in it cannot act on a terminal."""
    if is_first_process():
        print(printable(message), file=sys.stderr)


def is_first_process() -> bool:
    """Whether this process is the only one of its job, or the one of them that speaks."""
    return os.environ.get("RANK", "0") == "0"
