"""The program python -m str_triton pack|unpack|inspect FILE, for files of tensors without their zeros."""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from str_triton import deploy
from str_triton.deploy.content import VALUES
from str_triton.deploy.state_files import check_suffix, read_state, write_state
from str_triton.files import printable

PACKED = ".packed.safetensors"
LONGEST = 4000  # the longest metadata to print, in characters of JSON
HELP = """commands:
  pack FILE     write the weights in FILE, safetensors or a state dict of torch.save, without their zeros
  unpack FILE   write a packed file as plain tensors, bit for bit; a damaged file is refused
  inspect FILE  print the tensors of a packed file, its size and its budget

options:
  --to OUT      the file to write; by default NAME.packed.safetensors or NAME.unpacked.safetensors beside
                NAME.safetensors. unpack also writes .pt and .pth, with torch.save
  --values V    pack: round weights to float16 or bfloat16; float32, the default, does not round
  --plain-zeros pack: store -0.0 as 0.0; the sign of -0.0 may take a bit per zero
  --factors     unpack: keep low-rank matrices in their factors u and v
  --help        print this text

examples:
  python -m str_triton pack model.safetensors --values float16
  python -m str_triton inspect model.packed.safetensors
  python -m str_triton unpack model.packed.safetensors --to model.pt

To pack a run of cnn/train.py or rnn/train.py, use python -m str_triton.cnn.export or
python -m str_triton.rnn.export. In Python, use str_triton.deploy. The format is described in docs/packed-format.md."""


class Parser(argparse.ArgumentParser):
    """A parser whose error messages are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see python -m str_triton --help\n")

    def format_help(self) -> str:
        return f"usage: python -m str_triton COMMAND FILE [options]\n\n{HELP}\n"


def main(args: Sequence[str] | None = None) -> int:
    """Run the program with `args` (default: the command line's) and return its exit code, 2 for bad input."""
    parser = Parser(prog="python -m str_triton")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in ("pack", "unpack", "inspect"):
        command = commands.add_parser(name)
        command.add_argument("file", type=Path, metavar="FILE")
        if name != "inspect":
            command.add_argument("--to", type=Path, metavar="OUT")
        if name == "pack":
            command.add_argument("--values", choices=list(VALUES), default="float32")
            command.add_argument("--plain-zeros", action="store_true")
        if name == "unpack":
            command.add_argument("--factors", action="store_true")
    options = parser.parse_args(args)
    try:
        text = {"pack": pack, "unpack": unpack, "inspect": inspect}[options.command](options)
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    except ValueError as error:
        text = str(error)
    else:
        print(text)
        return 0
    print(f"error: {printable(' '.join(text.split()))}", file=sys.stderr)
    return 2


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
    """Return the path to write: --to, or the input's name with another ending."""
    file = options.file
    name = file.name.removesuffix(PACKED) if file.name.endswith(PACKED) else file.stem
    out = options.to or file.parent / f"{name}{ending}"
    if out.exists() and file.exists() and out.samefile(file):
        raise ValueError(f"{out} is the input: name another file with --to")
    return out


if __name__ == "__main__":
    sys.exit(main())
