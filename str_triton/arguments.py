"""The parser of every program's command line: wrong input is one line, which suggests the nearest name.

Standard library only.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

MOST_NAMED = 15  # a message names all choices if they are no more than these
KINDS = {"int": "a whole number", "float": "a number"}


class Parser(argparse.ArgumentParser):
    """A parser that raises ``ValueError`` with one line for invalid arguments.

    Options are never abbreviated. An option may be written with underscores, and its value may begin with a dash. Help
    wraps at the width of the terminal.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=Help, **options)
        version = sys.modules[__package__].__version__
        self.add_argument("--version", action="version", version=version, help="print the version and exit")

    def error(self, message: str) -> NoReturn:
        raise ValueError(self.one_line(message))

    def one_line(self, message: str) -> str:
        """Return a message of argparse in plain words, with the command that prints help."""
        return f"{in_plain_words(message)} ({self.prog.removesuffix(' [RECIPE]')} --help)"

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)  # argparse would swallow the error if nobody reads the help

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        if self._subparsers is None:
            args = list(self._joined(args))
        elif args:
            (targets,) = self._subparsers._group_actions
            self._check_option(args[0], [self, *vars(targets)["choices"].values()])
        return super().parse_known_args(args, namespace)

    def _check_option(self, word: str, parsers: Sequence[argparse.ArgumentParser]) -> None:
        """Refuse an option that none of the parsers has."""
        known = [option for parser in parsers for option in parser._option_string_actions if option[:2] == "--"]
        if re.match(r"--[A-Za-z]", word) and (name := word.partition("=")[0].replace("_", "-")) not in known:
            self.error(unknown("option", name, list(dict.fromkeys(known))))

    def _joined(self, args: Sequence[str]) -> Iterator[str]:
        """Yield the arguments with ``--name value`` as ``--name=value``. Refuse options that do not exist."""
        rest = iter(args)
        for word in rest:
            if not re.match(r"--[A-Za-z]", word):
                yield word
                continue
            name, equals, value = word.partition("=")
            name = name.replace("_", "-")
            self._check_option(name, [self])
            if equals:
                yield f"{name}={value}"
            elif self._option_string_actions[name].nargs == 0:
                yield name
            else:
                following = next(rest, None)
                if following is None or following.partition("=")[0] in self._option_string_actions:
                    self.error(f"{name}: a value is missing")
                yield f"{name}={following}"


class Help(argparse.HelpFormatter):
    """Help with the width of the terminal. The description keeps its lines; a continued line is indented further."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(self._wrapped(line, width) for line in text.splitlines())

    @staticmethod
    def _wrapped(line: str, width: int) -> str:
        column = re.match(r"  \S+ +", line)
        indent = " " * column.end() if column else ""
        return textwrap.fill(line, width, subsequent_indent=indent) if line.strip() else ""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        return super()._format_action_invocation(action)


def unknown(kind: str, name: str, known: Sequence[str]) -> str:
    """Return the message for a name that does not exist, with the nearest ones, or with all if none is near."""
    return f"there is no {kind} {name}{suggestion(name, known)}"


def suggestion(name: str, known: Sequence[str]) -> str:
    """Return the end of a message about a wrong name: the nearest ones, or all if none is near and they are few."""
    if near := nearest(name, known):
        return f"; did you mean {' or '.join(near)}?"
    if len(known) > MOST_NAMED:
        return ""
    return f"; choose {' or '.join(known) if len(known) < 10 else ', '.join(known)}"


def unknown_data(spec: str, forms: Sequence[str], layouts: Mapping[str, str]) -> str:
    """Return the message for data that do not exist.

    Args:
        spec: what was given.
        forms: the known data, such as har:PATH.
        layouts: what to write for a folder, DIR, that holds files of a pattern. The first pattern that fits counts.
    """
    if spec and Path(spec).is_dir():
        for pattern, form in layouts.items():
            if next(Path(spec).glob(pattern), None):
                return f"unknown data {spec!r}; for this folder {form.replace('DIR', spec)}"
    near = nearest(re.split(r"[:\[]", spec)[0], [re.split(r"[:\[]", form)[0] for form in forms])
    chosen = [form for form in forms if re.split(r"[:\[]", form)[0] in near]
    return f"unknown data {spec!r}; " + (
        f"did you mean {' or '.join(chosen)}?" if chosen else f"known are {', '.join(forms)}"
    )


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """Return at most three known names: those that are spelled much like ``name``, or else those that contain it."""
    near = get_close_matches(name, known, n=3, cutoff=0.6)
    return near or [other for other in known if len(name) > 2 and name in other][:3]


def in_plain_words(message: str) -> str:
    """Return a message of argparse in plain words."""
    named = re.fullmatch(r"argument (\S+): (.*)", message, re.DOTALL)
    if named is None:
        return message.replace("the following arguments are required: ", "missing: ").replace(
            "unrecognized arguments: ", "one word too many: "
        )
    name, fault = named[1].split("/")[0], named[2]
    if choice := re.fullmatch(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", fault):
        known = re.findall(r"[^\s,']+", choice[2])
        return f"{name} {choice[1]}: there is no such value{suggestion(choice[1], known)}"
    if value := re.fullmatch(r"invalid (\w+) value: '(.*)'", fault):
        return f"{name} {value[2]}: it must be {KINDS.get(value[1], value[1])}{percent_hint(value[2])}"
    if fault.startswith("ignored explicit argument"):
        return f"{name}: it takes no value"
    if fault.startswith("expected one argument"):
        return f"{name}: a value is missing"
    return f"{name} {fault}"


def percent_hint(text: str) -> str:
    """Return how to write a number that was given in %, or an empty text."""
    number = re.fullmatch(r"([\d.]+) ?%", text)
    try:
        return f"; write {text} as {float(number[1]) / 100:g}" if number else ""
    except ValueError:
        return ""
