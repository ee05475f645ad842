"""Strict reading of JSON from untrusted files, checked against the types of a dataclass."""

import dataclasses
import json
import math
import reprlib
from collections.abc import Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

LARGEST = 2**63 - 1
DEEPEST = 100  # the largest number of nested lists and objects


def loads(text: str | bytes) -> Any:
    """Return the value of a JSON text, which can safely be printed, written again, and traversed.

    Raises ValueError, one line, for texts that are not JSON, and for four things that Python's own reader accepts: a
    key that occurs twice, NaN and infinities, texts that are not Unicode, and more than `DEEPEST` levels.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse, parse_float=_float)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("it is not JSON") from None
    level: list[dict[str, Any] | list[Any]] = [[value]]
    for _ in range(DEEPEST + 1):
        inside = [child for parent in level for child in _inside(parent)]
        for wrong in inside:
            if isinstance(wrong, str) and not wrong.isascii() and any("\ud800" <= char <= "\udfff" for char in wrong):
                raise ValueError(f"the text {_short(wrong)} is not Unicode")
        level = [child for child in inside if isinstance(child, dict | list)]
        if not level:
            return value
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")


def typed(kind: Any, value: Any, where: str) -> Any:
    """Convert a value from `loads` to `kind`. Raise ValueError, beginning with `where`, if it does not fit.

    Args:
        kind: a dataclass (an object with exactly its fields), list[...], tuple[...], dict[str, ...], Literal[...], a
            union of these, int (a whole number from 0 to `LARGEST`), float, str, bool, None, or Any.
    """
    if kind is Any:
        return value
    is_integer = type(value) is int and 0 <= value <= LARGEST
    if is_integer if kind is int else type(value) is kind:
        return value
    if kind is float and is_integer:
        return float(value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _instance(kind, value, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return _member(args, value, where)
    if origin is Literal and isinstance(value, str) and value in args:
        return value
    if origin is list and isinstance(value, list):
        return [typed(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is tuple and isinstance(value, list):
        kinds = [args[0]] * len(value) if args[1:] == (...,) else args
        if len(value) == len(kinds):
            return tuple(typed(*pair, f"{where}[{i}]") for i, pair in enumerate(zip(kinds, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {key: typed(args[1], item, f"{where}[{_short(key)}]") for key, item in value.items()}
    raise ValueError(f"{where}: expected {_name(kind)}, got {_short(value)}")


def _instance(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {_short(value)}")
    types = _types(kind)
    for field in dataclasses.fields(kind):
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.name not in value and not optional:
            raise ValueError(f"{where}: {field.name!r} is missing")
    for key in value:
        if key not in types:
            raise ValueError(f"{where}: {_short(key)} is unknown")
    return kind(**{key: typed(types[key], item, f"{where}.{key}") for key, item in value.items()})


@cache
def _types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _member(kinds: Sequence[Any], value: Any, where: str) -> Any:
    """Return the value as the first of the kinds that it fits."""
    if value is None and NoneType in kinds:
        return None
    kinds = [kind for kind in kinds if kind is not NoneType]
    for kind in kinds[:-1]:
        try:
            return typed(kind, value, where)
        except ValueError:
            pass
    return typed(kinds[-1], value, where)


def _inside(parent: dict[str, Any] | list[Any]) -> list[Any]:
    """Return the items of a list, the keys and values of an object."""
    return [*parent, *parent.values()] if isinstance(parent, dict) else parent


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple and ... not in get_args(kind):
        return f"a list of {len(get_args(kind))}"
    if get_origin(kind) in (list, tuple):
        return "a list"
    if get_origin(kind) is dict:
        return "an object"
    names = {int: f"a whole number from 0 to {LARGEST}", float: "a number", str: "a text", bool: "true or false"}
    return names.get(kind, "null")


def _short(value: Any) -> str:
    """Return a value for a message, without control characters and at most a line long."""
    return reprlib.repr(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {_short(key)} occurs twice")
            seen.add(key)
    return made


def _float(text: str) -> float:
    return number if math.isfinite(number := float(text)) else _refuse(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text[:30]} is not a number of JSON")
