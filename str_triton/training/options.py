"""Command-line options from a dataclass: names, types and defaults from its fields, help from their docstrings."""

import argparse
import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from str_triton.arguments import Parser, percent_hint, suggestion
from str_triton.training.errors import UserError

OptionsT = TypeVar("OptionsT")
WORDS = {str: "a text", int: "a whole number", float: "a number"}


class OptionParser(Parser):
    """A parser that raises `UserError` for invalid arguments."""

    def error(self, message: str) -> NoReturn:
        raise UserError(self.one_line(message))


def hidden(default: Any = dataclasses.MISSING) -> Any:
    """Return a field that is not an option of the command line."""
    return dataclasses.field(default=default, metadata={"hidden": True})


def positional(metavar: str, *, many: bool = False) -> Any:
    """Return a field that is given by its position. With ``many`` it takes any number of words, as a tuple."""
    default: Any = () if many else dataclasses.MISSING
    return dataclasses.field(default=default, metadata={"positional": metavar, "many": many})


def read_options(kind: type[OptionsT], args: Sequence[str] | None, *, prog: str, description: str) -> OptionsT:
    """Return the options that ``args`` (default: the command line's) give. Raise `UserError` for invalid ones."""
    values = vars(options_parser(kind, prog=prog, description=description).parse_intermixed_args(args))
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def read_command(
    kinds: Mapping[str, type[OptionsT]], args: Sequence[str] | None, *, prog: str, description: str
) -> OptionsT:
    """Return the options of the command that ``args`` begin with. ``kinds`` maps commands to their dataclasses."""
    parser = OptionParser(prog=prog, description=description)
    commands = parser.add_subparsers(title="targets", dest="command", metavar="TARGET", required=True)
    for name, kind in kinds.items():
        text = inspect.getdoc(kind)
        add_options(commands.add_parser(name, help=text, description=text), kind)
    values = vars(parser.parse_args(args))
    return kinds[values.pop("command")](**values)


def options_parser(source: Any, *, prog: str, description: str) -> OptionParser:
    """Return a parser for the fields of a dataclass, whose defaults are those of the class or of an instance."""
    parser = OptionParser(prog=prog, description=description)
    add_options(parser, source)
    places = [action.metavar for action in parser._get_positional_actions()]
    parser.usage = " ".join([prog, *map(str, places), "[OPTIONS]"])
    return parser


def add_options(parser: argparse.ArgumentParser, source: Any) -> None:
    """Add the fields of a dataclass to ``parser``, in the groups that the attribute ``groups`` of its classes names.

    ``groups`` maps a group's title to the names of fields, separated by spaces.
    """
    kind = source if isinstance(source, type) else type(source)
    types, texts = get_type_hints(kind), field_docs(kind)
    titles = group_titles(kind)
    shown = [field for field in dataclasses.fields(kind) if "hidden" not in field.metadata]
    order = list(titles) or [field.name for field in shown]
    groups = {
        title: parser.add_argument_group(title)
        for title in dict.fromkeys(titles[name] for name in titles if name in {field.name for field in shown})
    }
    for field in sorted(shown, key=lambda field: order.index(field.name)):
        default = field.default if source is kind else getattr(source, field.name)
        target = groups[titles[field.name]] if field.name in titles else parser
        if "positional" in field.metadata:
            given: dict[str, Any] = {"nargs": "*", "default": []} if field.metadata["many"] else {}
            target.add_argument(field.name, metavar=field.metadata["positional"], help=texts.get(field.name), **given)
        else:
            _add_option(target, field.name, types[field.name], default, texts.get(field.name, ""))


def _add_option(target: Any, name: str, type_: Any, default: Any, text: str) -> None:
    option = f"--{name.replace('_', '-')}"
    text = text.replace("%", "%%")
    if type_ is bool:
        text += " (default: on)" if default else ""
        target.add_argument(option, dest=name, action=argparse.BooleanOptionalAction, default=default, help=text)
        return
    if default is not None:
        text += f" (default: {str(default).replace('%', '%%')})"
    plain, choices = _parts(type_)
    metavar = "{" + ",".join(choices) + "}" if choices else {int: "N", float: "X"}.get(plain)
    target.add_argument(
        option,
        dest=name,
        type=_converter(option, plain, choices, NoneType in get_args(type_)),
        default=default,
        metavar=metavar or name.rpartition("_")[2].upper(),
        help=text,
    )


def _parts(type_: Any) -> tuple[type, tuple[str, ...]]:
    """Return a field's type without None, and the choices if it is a Literal."""
    (plain,) = [part for part in get_args(type_) if part is not NoneType] if NoneType in get_args(type_) else [type_]
    return (str, get_args(plain)) if get_origin(plain) is Literal else (plain, ())


def _converter(option: str, plain: type, choices: Sequence[str], optional: bool) -> Callable[[str], Any]:
    """Return the function that makes a value of a text, or raises an error that names the option's choices or type."""

    def convert(text: str) -> Any:
        if optional and text in ("none", "None"):
            return None
        if choices and text not in choices:
            raise argparse.ArgumentTypeError(f"{text}: there is no such value{suggestion(text, choices)}")
        try:
            return plain(text)
        except ValueError:
            message = f"{text}: it must be {WORDS[plain]}{percent_hint(text)}"
            raise argparse.ArgumentTypeError(message) from None

    return convert


def group_titles(kind: type) -> dict[str, str]:
    """Return the title of each field's group, in the order of help; empty for a class without groups.

    Groups of a subclass come first. A group may continue in the bases. Fields in no group come last, as "other".
    """
    found: dict[str, str] = {}
    groups = [vars(base).get("groups", {}) for base in kind.__mro__]
    for title in dict.fromkeys(title for group in groups for title in group):
        for group in reversed(groups):
            found |= dict.fromkeys(group.get(title, "").split(), title)
    names = [field.name for field in dataclasses.fields(kind) if field.name not in found]
    return found | dict.fromkeys(names, "other") if found else {}


def field_docs(kind: type) -> Mapping[str, str]:
    """Return the text below each field of a dataclass and its bases, on one line."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        nodes = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base))))
        definition = next(node for node in nodes if isinstance(node, ast.ClassDef))
        for before, after in pairwise(definition.body):
            if (
                isinstance(before, ast.AnnAssign)
                and isinstance(before.target, ast.Name)
                and isinstance(after, ast.Expr)
            ):
                texts[before.target.id] = " ".join(ast.literal_eval(after.value).split())
    return texts
