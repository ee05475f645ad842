"""Errors of programs: a mistake that a user can fix is one line and exit code 2; a bug keeps its traceback."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from str_triton.files import printable
from str_triton.programs import BAD_INPUT, is_about_output, run_until_output_closes

TOO_LARGE = re.compile("can't allocate memory|out of memory|size calculation overflowed", re.IGNORECASE)
"""What PyTorch says about memory."""


class UserError(Exception):
    """A mistake that a user can fix. The message is one line that names the wrong value and what to do."""


class Interrupted(Exception):
    """The end of a run that a signal has asked to stop, after its state was saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


@contextmanager
def as_user_error(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of these types that the block raises into `UserError` with the same message."""
    try:
        yield
    except kinds as error:
        if is_about_output(error):
            raise
        raise UserError(one_line(error)) from error


@contextmanager
def as_too_large(option: str) -> Iterator[None]:
    """Turn the errors of a network that does not fit into memory into `UserError`, which names the option."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not TOO_LARGE.search(str(error)):
            raise
        raise UserError(f"{option}: this network does not fit into memory") from error


def one_line(error: BaseException) -> str:
    """Return the message of ``error`` on one line; for an ``OSError`` its file and its reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def run_program(program: Callable[[], None]) -> int:
    """Run ``program`` and return the exit code of the process.

    The code is 0 for success, 2 for a `UserError` (one line on stderr), and 128 plus the signal's number for a run that
    was asked to stop. It is 141 if the reader of the output has gone (``| head``). Any other exception is not caught.
    Programs of several processes use `job.run_job`.
    """
    return run_until_output_closes(lambda: _exit_code(program))


def _exit_code(program: Callable[[], None]) -> int:
    try:
        program()
        return 0
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
    """Print a warning on standard error, in the first process of a job only."""
    tell(f"warning: {message}")


def tell(message: str) -> None:
    """Print a line on standard error, in the first process of a job only. Control characters are escaped."""
    if is_first_process():
        print(printable(message), file=sys.stderr)


def is_first_process() -> bool:
    """Return whether this process is the first or only one of its job, which is the one that prints."""
    return os.environ.get("RANK", "0") == "0"
