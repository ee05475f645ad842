"""Conditions on sizes of one that only concern memory formats: one graph serves one image or step and many."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx.node import Node, map_arg

from str_triton.deploy.sparse.graph.signature import Signature

MANY = (2, 3, 7)
_COPIES = (torch.ops.aten.contiguous.default, torch.ops.aten.clone.default)  # made or not as strides demand


@dataclass
class Exported:
    """An exported model; its program is functional.

    Attributes:
        opened: the sizes that may be one although an export says otherwise. Two at a time have not been compared.
        notes: why sizes are not open.
        again: exports the model for other arguments.
    """

    program: ExportedProgram
    signature: Signature
    opened: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    again: "Callable[[tuple, dict[str, Any]], Exported] | None" = None


def one_line(error: Exception | None) -> str:
    """Return the kind of an error and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def with_sizes_of_one(found: Exported, args: tuple, kwargs: dict[str, Any]) -> Exported:
    """Return an export without the conditions on sizes of one that make no difference to the graph.

    torch adds a condition wherever strides depend on whether a size is one. Our graphs have no strides. Two exports
    make no difference if for a size of one they are the same operations; the one from a larger size is for both.
    """
    groups: list[list[list[Any]]] = []  # arguments of every count, for each opened size
    failed: set[str] = set()
    errors: dict[str, str] = {}
    for size in 2 * list(found.signature.named()):  # A size may open after another one.
        old = found.signature.values(pytree.tree_leaves((args, kwargs)))[size]
        calls = {count: _resized(found.signature, args, kwargs, size, count) for count in (1, *MANY) if old}
        every = {count: pytree.tree_leaves(call) for count, call in calls.items()}
        fits = {count: found.signature.fits(leaves) for count, leaves in every.items()}
        if size in failed or all(fits.values()) or not (fits[1] if old == 1 else all(fits[n] for n in MANY)):
            continue
        failed.add(size)
        if found.again is None:
            continue
        try:
            twin = found.again(*calls[2 if old == 1 else 1])
        except Exception as error:  # torch.export fails in as many ways as models do.
            errors[size] = one_line(error)
            continue
        few, many = (found, twin) if old == 1 else (twin, found)
        if twin.signature.leaves != found.signature.leaves or not _same(found.program, twin.program, size):
            continue
        groups.append(list(every.values()))
        both = dict.fromkeys(few.signature.guards + many.signature.guards)
        verdicts = {guard: _is_about_one(replace(found.signature, guards=[guard]), groups) for guard in both}
        if None in verdicts.values():
            groups.pop()
            continue
        guards = [guard for guard, is_about_one in verdicts.items() if not is_about_one]
        signature = replace(many.signature, guards=guards)
        found = replace(found, program=many.program, signature=signature, opened=[*found.opened, size])
        args, kwargs = calls[2] if old == 1 else (args, kwargs)
        failed.clear()
    notes = [f"{found.signature.place(size)} is one as in the example, or never one: {e}" for size, e in errors.items()]
    return replace(found, notes=[*found.notes, *notes])


def _is_about_one(signature: Signature, groups: list[list[list[Any]]]) -> bool | None:
    """Check whether a condition only separates a size of one from others; None if it excludes any other way."""
    verdicts = [tuple(map(signature.fits, group)) for group in groups]
    if any(len(set(many)) > 1 for _, *many in verdicts):
        return None
    return any(one != many[0] for one, *many in verdicts)


def _resized(signature: Signature, args: tuple, kwargs: dict[str, Any], size: str, count: int) -> Any:
    """Return arguments in which every dimension of this name has `count` elements."""
    flat, structure = pytree.tree_flatten((args, kwargs))
    for number, leaf in enumerate(signature.leaves):
        for dim, name in enumerate(leaf.sizes or ()):
            if name == size:
                index = torch.arange(count, device="cpu") % flat[number].shape[dim]
                flat[number] = flat[number].index_select(dim, index)
    return pytree.tree_unflatten(flat, structure)


def _same(one: ExportedProgram, other: ExportedProgram, size: str) -> bool:
    """Check that for a size of one two programs are the same operations on the same constants."""
    if _operations(one, size) != _operations(other, size) or one.constants.keys() != other.constants.keys():
        return False
    pairs = ((value, other.constants[name]) for name, value in one.constants.items())
    return all(isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b) for a, b in pairs)


def _operations(program: ExportedProgram, open_size: str) -> list[tuple[Any, ...]]:
    """Return a program's operations for a size of one, without assertions, copies and slices that take everything.

    Numbers stand for names, which torch.export numbers as it happens, and sizes for the operations that compute them:
    where torch.export knows a size, it leaves these out, and slices of a dimension of size 1, too.
    """
    places: dict[Node, Any] = {}
    found: list[tuple[Any, ...]] = []
    for node in program.graph.nodes:
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            continue
        if isinstance(size := node.meta.get("val"), torch.SymInt):
            expression = size.node.expr
            expression = expression.subs({symbol: 1 for symbol in expression.free_symbols if str(symbol) == open_size})
            places[node] = int(expression) if expression.is_Integer else str(expression)
            continue
        is_all = node.target is torch.ops.aten.slice.Tensor and node.args[2:] in ((), (0, sys.maxsize), (None, None))
        if is_all or node.target in _COPIES:
            places[node] = places[node.args[0]]
            continue
        arguments = map_arg((node.args, node.kwargs), lambda value: places[value])
        places[node] = f"%{len(found)}"
        found.append((node.op, node.target, arguments))
    return found
