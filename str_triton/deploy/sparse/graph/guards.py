"""Conditions on the sizes of arguments, as texts that a file may hold."""

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Div: operator.truediv,
}
_COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_SEVERAL: dict[str, Callable[..., Any]] = {"max": max, "min": min}
_ONE: dict[str, Callable[[Any], Any]] = {
    "abs": abs, "math.ceil": math.ceil, "math.floor": math.floor, "math.trunc": math.trunc
}  # fmt: skip


def compile_guard(text: str) -> Callable[[dict[str, int]], bool]:
    """Return a function of the named sizes for an expression of numbers, comparisons, and, or, not, and few functions.

    A guard comes from a file: nothing else is evaluated.

    Raises ValueError for any other expression.
    """
    try:
        tree = ast.parse(text, mode="eval").body
        _evaluate(tree, None)
    except (SyntaxError, RecursionError, MemoryError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{text[:80]!r} is no condition on sizes") from error

    def check(sizes: dict[str, int]) -> bool:
        try:
            return bool(_evaluate(tree, sizes))
        except (ZeroDivisionError, OverflowError, ValueError, KeyError):
            return False

    return check


def _evaluate(node: ast.expr, sizes: dict[str, int] | None) -> Any:
    """Evaluate an expression; with sizes None, look only whether it is of the permitted kind."""
    match node:
        case ast.Constant(value=int() | float() as value) if abs(value) < 2**63:
            return value
        case ast.Name(id=name):
            return 1 if sizes is None else sizes[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            parts = _evaluate(left, sizes), _evaluate(right, sizes)
            return 1 if sizes is None else _BINARY[type(op)](*parts)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, sizes)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _evaluate(operand, sizes)
        case ast.BoolOp(op=op, values=values):
            each = (_evaluate(value, sizes) for value in values)
            if sizes is None:
                return len(list(each))
            return all(each) if isinstance(op, ast.And) else any(each)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARE for op in ops):
            found = [_evaluate(left, sizes), *(_evaluate(other, sizes) for other in others)]
            pairs = zip(ops, found[:-1], found[1:], strict=True)
            return all(_COMPARE[type(op)](a, b) for op, a, b in pairs)
        case ast.Call(func=ast.Name() | ast.Attribute() as function, args=[first, *others], keywords=[]):
            name, found = ast.unparse(function), [_evaluate(arg, sizes) for arg in (first, *others)]
            if name in _ONE and not others:
                return _ONE[name](found[0])
            if name in _SEVERAL:
                return _SEVERAL[name](found)
    raise ValueError(ast.dump(node)[:80])
