"""The programs of the project: their names on the command line, how this process was started, and how it ends.

Standard library only. Programs are named by strings, so that no folder has to import the programs.
"""

import errno
import importlib.util
import json
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, NoReturn

from str_triton.arguments import nearest


class Program(NamedTuple):
    """A program: the module whose ``main()`` runs it, one line about it, and the module of its recipes, if any."""

    module: str
    purpose: str
    recipes: str = ""


PROGRAMS = {
    "train-cnn": Program(
        "str_triton.cnn.train",
        "train a convolutional network to an exact sparsity or FLOP budget",
        "str_triton.cnn.recipes",
    ),
    "train-rnn": Program(
        "str_triton.rnn.train", "train a recurrent network with a learned rank", "str_triton.rnn.recipes"
    ),
    "evaluate": Program(
        "str_triton.cnn.evaluate", "measure accuracy, budget and throughput of a convolutional network"
    ),
    "predict": Program("str_triton.cnn.predict", "name what images show"),
    "export-cnn": Program(
        "str_triton.cnn.export", "write a convolutional network as packed file, ONNX or sparse network"
    ),
    "export-rnn": Program("str_triton.rnn.export", "write a recurrent network as C99, ONNX or packed file"),
    "listen": Program("str_triton.rnn.listen", "print the words in a stream of sound"),
    "generate": Program("str_triton.rnn.generate", "write text with a language model"),
}
SCRIPTS = frozenset({"train-cnn", "train-rnn", "evaluate", "predict", "listen", "generate"})  # documented as files
# What each extra installs, as imported. Programs need the extra train.
EXTRAS = {"train": ("accelerate", "datasets", "matplotlib", "PIL", "rich", "soundfile", "tensorboard")}
BAD_INPUT = 2
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
OUTPUT_CLOSED = 141  # 128 plus the number of SIGPIPE, as a shell reports it
ENTRY = "str-triton"


def command(name: str) -> str:
    """Return how to call the program ``name`` in the way in which this process was started.

    ``name`` is one of `PROGRAMS`, a command of `str_triton.__main__`, or "" for the program of all commands. The ways
    are ``str-triton NAME``, ``python -m str_triton NAME``, ``python -m str_triton.cnn.NAME`` and
    ``python cnn/NAME.py``. A program that was started as a file is named by the path that was typed.
    """
    module = PROGRAMS[name].module if name in PROGRAMS else "str_triton"
    started = module_started()
    if Path(sys.argv[0]).stem == ENTRY:
        return f"{ENTRY} {front_name(name)}".rstrip()
    if started in ("str_triton", "str_triton.__main__") or name not in PROGRAMS:
        return f"python -m str_triton {front_name(name)}".rstrip()
    script = script_of(module)
    if started is not None or name not in SCRIPTS:
        return f"python -m {module}"
    if Path(sys.argv[0]).absolute().parts[-2:] == script.parts:
        return f"python {sys.argv[0]}"
    return f"python {script}"


def script_of(module: str) -> Path:
    """Return the file of a program's module in the repository, such as cnn/train.py."""
    return Path(*module.split(".")[1:]).with_suffix(".py")


def front_name(name: str) -> str:
    """Return the name of a program for the user: the two exports have one, which finds out what it is given."""
    return "export" if name.startswith("export-") else name


def module_started() -> str | None:
    """Return the module of this package that was started by ``python -m``; None for anything else."""
    interpreter = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    module = interpreter[-1] if interpreter[-2:-1] == ["-m"] else ""
    return module if module.split(".")[0] == "str_triton" else None


def trained_by(folder: str | Path) -> str | None:
    """Return the program that wrote a run's folder, by the options in its config.json; None if there is no telling."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, RecursionError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    return "train-rnn" if "cell" in config else "train-cnn" if "model" in config else None


def recipes_elsewhere(name: str, program: str) -> str | None:
    """Return one line about a recipe ``name`` that ``program`` lacks and another program has, or None."""
    for other in PROGRAMS:
        near = nearest(name, recipes_of(other)) if other != program else []
        if name in near:
            return f"{name} is a recipe of another program: {command(other)} {name}"
        if near:
            return f"there is no recipe {name}; {command(other)} has {' and '.join(near)}"
    return None


def require_module(name: str) -> None:
    """End the process with one line where the package lacks the folder of the program ``name``."""
    folder, here = PROGRAMS[name].module.rpartition(".")[0], Path(__file__).parents[1]
    if importlib.util.find_spec(folder) is None:
        leave(f"{here} holds str_triton without {folder}: pip install -e {here}, or start {ENTRY} in another folder")


def recipes_of(name: str) -> list[str]:
    """Return the names of a program's recipes."""
    return list(import_module(PROGRAMS[name].recipes).RECIPES) if PROGRAMS[name].recipes else []


def require_extra(extra: str, what: str) -> None:
    """End the process with one line unless the packages of an extra can be imported. ``what`` needs them."""
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        leave(f"{what} needs the extra {extra} ({', '.join(missing)}): pip install 'str-triton[{extra}]'")


@contextmanager
def extra_named(extra: str, what: str) -> Iterator[None]:
    """Add the extra to the message of an ``ImportError`` in the block. ``what`` needs the extra."""
    try:
        yield
    except ImportError as error:
        message = f"{what} needs the package {error.name}: pip install 'str-triton[{extra}]'"
        raise ImportError(message, name=error.name) from error


def check_started_program() -> None:
    """Check the extra of the program that this process was started as, if it is one. Packages of programs call this."""
    typed = Path(sys.argv[0]).absolute()
    for name, program in PROGRAMS.items():
        script = script_of(program.module)
        if module_started() == program.module or (typed.parts[-2:] == script.parts and typed.is_file()):
            require_extra("train", command(name))


def leave(message: str) -> NoReturn:
    """Print an error in one line and exit with the code for bad input."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(BAD_INPUT)


def run_until_output_closes(program: Callable[[], int]) -> int:
    """Return the exit code of ``program``, also where its output cannot be written.

    If the reader of the output has gone (``| head``), the program ends without a message. If the disk is full, it ends
    with one line and the code for bad input.
    """
    try:
        try:
            code = program()
        except SystemExit as leaving:  # the parser has printed its help, or a fault its message
            code = leaving.code if isinstance(leaving.code, int) else 0
        if sys.stdout is not None:  # as in a process that was started without standard output
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not output_is_closed():
            raise
        return OUTPUT_CLOSED
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        place = error.filename or ("standard output" if is_about_output(error) else "")
        with suppress(OSError):
            print(f"error: {place}{': ' * bool(place)}{error.strerror}", file=sys.stderr)
        return BAD_INPUT
    finally:
        _drop_unwritable()


def _drop_unwritable() -> None:
    """Drop what standard output and error hold but cannot write: Python writes once more when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def is_about_output(error: BaseException) -> bool:
    """Return whether ``error`` says that standard output cannot be written: its reader has gone or the disk is full."""
    if isinstance(error, BrokenPipeError):
        return output_is_closed()
    if not isinstance(error, OSError) or error.errno not in DISK_FULL or error.filename or sys.stdout is None:
        return False
    try:
        print(flush=True)  # a flush alone is not enough: no buffer may hold the text that could not be written
    except OSError:
        return True
    return False


def output_is_closed() -> bool:
    """Return whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except (AttributeError, OSError, ValueError):  # standard output was replaced or closed
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))
