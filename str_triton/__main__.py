"""The program str-triton, or python -m str_triton: every program of the project, and the commands for files of tensors.

``pack``, ``unpack`` and ``inspect`` are here, for files without a training run. The other names start a program of
`str_triton.programs`, whose modules are imported only then.
"""

import argparse
import json
import sys
import textwrap
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

from str_triton import __version__, deploy
from str_triton.arguments import Parser, unknown
from str_triton.deploy.content import VALUES
from str_triton.deploy.state_files import check_suffix, read_state, write_state
from str_triton.files import printable
from str_triton.programs import (
    BAD_INPUT,
    DISK_FULL,
    PROGRAMS,
    command,
    front_name,
    is_about_output,
    require_extra,
    require_module,
    run_until_output_closes,
    trained_by,
)

PACKED = ".packed.safetensors"
TEXT_COLUMN = 16  # the column in which the texts of the help begin
LONGEST = 4000  # the longest metadata to print, in characters of JSON
FILE_COMMANDS = ("pack", "unpack", "inspect")
ONLY = {"train-cnn": "sparse", "train-rnn": "c"}  # the export's target for the runs of one program alone
STARTED = {name: program.purpose for name, program in PROGRAMS.items() if front_name(name) == name}
HELP = """
  export TARGET RUN|FILE OUT
                write a trained network. TARGET is pack, onnx, sparse (convolutional networks) or c (recurrent networks)
  pack FILE     write the weights in FILE, safetensors or a state dict of torch.save, without their zeros
  unpack FILE   write a packed file as plain tensors, bit for bit; a damaged file is refused
  inspect FILE  print the tensors of a packed file, its size and its budget

options of pack, unpack and inspect; the other commands print theirs with --help:
  --to OUT      the file to write; by default NAME.packed.safetensors or NAME.unpacked.safetensors beside \
NAME.safetensors. unpack also writes .pt and .pth, with torch.save
  --values V    pack: round weights to float16 or bfloat16; float32, the default, does not round
  --plain-zeros pack: store -0.0 as 0.0; the sign of -0.0 may take a bit per zero
  --factors     unpack: keep low-rank matrices in their factors u and v
  --help        print this text
  --version     print the version

examples:
  {front} train-cnn --epochs 5 --target-sparsity 0.8
  {front} export pack runs/RUN model.packed.safetensors
  {front} pack model.safetensors --values float16
  {front} unpack model.packed.safetensors --to model.pt

In Python, use str_triton.deploy. The format is described in docs/packed-format.md."""


class FileParser(Parser):
    """The parser of pack, unpack and inspect, which share the help of the whole program."""

    def format_help(self) -> str:
        return f"{help_text()}\n"


def main(args: Sequence[str] | None = None) -> int:
    """Run the program with `args` (default: the command line's) and return its exit code, 2 for bad input."""
    return run_until_output_closes(partial(_main, sys.argv[1:] if args is None else list(args)))


def _main(args: list[str]) -> int:
    name, rest = (args[0], args[1:]) if args else ("", [])
    if name in ("-h", "--help", "--version"):
        print(__version__ if name == "--version" else help_text())
        return 0
    try:
        names = [name] if name != "export" else programs_to_explain(rest) or [export_program(rest)]
    except ValueError as error:
        return _refused(str(error))
    if names[0] in PROGRAMS:
        require_module(names[0])
        require_extra("train", command(names[0]))
        return max(import_module(PROGRAMS[name].module).main(rest) for name in names)
    try:
        text = handle_file(args)
    except OSError as error:
        if error.errno in DISK_FULL or is_about_output(error):
            raise
        text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    except ValueError as error:
        text = str(error)
    else:
        print(text)
        return 0
    return _refused(text)


def _refused(text: str) -> int:
    """Print a message for bad input as one line, and return the exit code."""
    print(f"error: {printable(' '.join(text.split()))}", file=sys.stderr)
    return BAD_INPUT


def help_text() -> str:
    """Return the help of the whole program."""
    lines = [f"  {name:13} {purpose}" for name, purpose in STARTED.items()]
    front = command("")
    text = f"usage: {front} COMMAND [options]\n\n" + "\n".join(["commands:", *lines]) + HELP.format(front=front)
    return "\n".join(_wrapped(line, get_terminal_size().columns) for line in text.splitlines())


def _wrapped(line: str, width: int) -> str:
    """Wrap a line of the help. The text about a command or an option continues in its column."""
    indent = " " * TEXT_COLUMN if line.startswith("  ") else ""
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def export_program(args: Sequence[str]) -> str:
    """Return the program that exports what ``args`` (TARGET RUN|FILE OUT ...) name.

    Raises ValueError for a run whose program does not have the target.
    """
    run, trained = next(((word, program) for word in args[1:] if (program := trained_by(word))), ("", None))
    if trained is not None and args[0] in ONLY.values() and args[0] != ONLY[trained]:
        raise ValueError(f"{run} is a run of {command(trained)}: export it as pack, onnx or {ONLY[trained]}")
    if trained is None and args[:1] == [ONLY["train-rnn"]]:
        trained = "train-rnn"
    return "export-rnn" if trained == "train-rnn" else "export-cnn"


def programs_to_explain(args: Sequence[str]) -> list[str]:
    """Return both exports if ``args`` ask for help without a run, which would tell whose, and both have the target."""
    if not {"-h", "--help"} & set(args) or any(map(trained_by, args)):
        return []
    return ["export-cnn", "export-rnn"] if set(args) <= {"-h", "--help", "pack", "onnx"} else []


def handle_file(args: Sequence[str]) -> str:
    """Run pack, unpack or inspect, and return the text to print. Raise ValueError for invalid arguments."""
    if not args or args[0] not in FILE_COMMANDS:
        fault = "name a command"
        if args and args[0].startswith("-"):
            fault = unknown("option", args[0], ["--help", "--version"])
        elif args:
            fault = unknown("command", args[0], [*STARTED, "export", *FILE_COMMANDS])
        raise ValueError(f"{fault} ({command('')} --help)")
    parser = FileParser(prog=command(args[0]))
    parser.add_argument("file", type=Path, metavar="FILE")
    if args[0] != "inspect":
        parser.add_argument("--to", type=Path, metavar="OUT")
    if args[0] == "pack":
        parser.add_argument("--values", choices=list(VALUES), default="float32")
        parser.add_argument("--plain-zeros", action="store_true")
    if args[0] == "unpack":
        parser.add_argument("--factors", action="store_true")
    options = parser.parse_args(args[1:])
    return {"pack": pack, "unpack": unpack, "inspect": inspect}[args[0]](options)


def pack(options: argparse.Namespace) -> str:
    """Pack a file of plain tensors, and return the text to print."""
    out = _out(options, PACKED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the remarks also say if no tensor got smaller
        summary = deploy.pack(read_state(options.file), out, options.values, plain_zeros=options.plain_zeros)
    return "\n".join([f"wrote {printable(str(out))}", *summary.remarks()])


def unpack(options: argparse.Namespace) -> str:
    """Unpack a file into a file of plain tensors, and return the text to print."""
    out = _out(options, ".unpacked.safetensors")
    check_suffix(out)
    state = deploy.unpack(options.file, factors=options.factors)
    write_state(out, state)
    return f"wrote {printable(str(out))}: {len(state)} plain tensors"


def inspect(options: argparse.Namespace) -> str:
    """Return the text that describes a packed file."""
    summary = deploy.inspect(options.file)
    budget = [] if summary.budget is None else ["", "budget:", str(summary.budget)]
    shown = {name: _short(value) for name, value in summary.metadata.items()}
    metadata = ["", "metadata:", json.dumps(shown, indent=2)] if shown else []
    return "\n".join([str(summary), *budget, *metadata])


def _short(value: Any) -> Any:
    """Return a value of the metadata, or its length if it is long, such as the graph of a compiled network."""
    length = len(json.dumps(value))
    return value if length <= LONGEST else f"({length:,} characters)"


def _out(options: argparse.Namespace, ending: str) -> Path:
    """Return the path to write: --to, or the input's name with another ending, which must be new."""
    file = options.file
    name = file.name.removesuffix(PACKED) if file.name.endswith(PACKED) else file.stem
    out = options.to or file.parent / f"{name}{ending}"
    if out.exists() and file.exists() and out.samefile(file):
        raise ValueError(f"{out} is the input: name another file with --to")
    if out.exists() and options.to is None:
        raise ValueError(f"{out} exists: name the file to write with --to")
    return out


if __name__ == "__main__":
    sys.exit(main())
