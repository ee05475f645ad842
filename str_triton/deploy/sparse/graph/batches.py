"""Conditions on the batch size that only concern memory formats: one graph serves one image and many."""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx.node import Node, map_arg

from str_triton.deploy.sparse.graph.signature import Signature

MANY = (2, 3, 7)


@dataclass
class Exported:
    """An exported model; its program is functional."""

    program: ExportedProgram
    signature: Signature


def with_every_batch(
    found: Exported, args: tuple, kwargs: dict[str, Any], export: Callable[[tuple, dict[str, Any]], Exported]
) -> Exported:
    """Return an export without the conditions on the batch size that make no difference to the graph.

    torch adds a condition wherever strides depend on whether a batch has one image. Our graphs have no strides. Two
    exports make no difference if for a batch of 1 they are the same operations; the one from many images is for both.
    """
    size = next((leaf.sizes[0] for leaf in found.signature.leaves if leaf.sizes), None)
    if not isinstance(size, str):
        return found
    old = next(
        given.shape[0]
        for leaf, given in zip(found.signature.leaves, pytree.tree_leaves((args, kwargs)), strict=True)
        if leaf.sizes and leaf.sizes[0] == size
    )
    other = _resized(found.signature, args, kwargs, size, 2 if old == 1 else 1)
    if old == 0 or found.signature.fits(pytree.tree_leaves(other)):
        return found
    try:
        twin = export(*other)
    except Exception:  # torch.export fails in as many ways as models do.
        return found
    if twin.signature.leaves != found.signature.leaves or not _same(found.program, twin.program, size):
        return found
    few, many = (found, twin) if old == 1 else (twin, found)
    every = {count: pytree.tree_leaves(_resized(found.signature, args, kwargs, size, count)) for count in (1, *MANY)}
    if not few.signature.fits(every[1]) or not all(many.signature.fits(every[count]) for count in MANY):
        return found
    guards = [
        guard
        for guard in dict.fromkeys(few.signature.guards + many.signature.guards)
        if all(dataclasses.replace(found.signature, guards=[guard]).fits(leaves) for leaves in every.values())
    ]
    return Exported(many.program, dataclasses.replace(many.signature, guards=guards))


def _resized(signature: Signature, args: tuple, kwargs: dict[str, Any], size: str, count: int) -> Any:
    """Return arguments in which every dimension of this name has `count` elements."""
    flat, structure = pytree.tree_flatten((args, kwargs))
    for number, leaf in enumerate(signature.leaves):
        for dim, name in enumerate(leaf.sizes or ()):
            if name == size:
                index = torch.arange(count, device="cpu") % flat[number].shape[dim]
                flat[number] = flat[number].index_select(dim, index)
    return pytree.tree_unflatten(flat, structure)


def _same(one: ExportedProgram, other: ExportedProgram, batch: str) -> bool:
    """Check that for a batch of 1 two programs are the same operations on the same constants."""
    if _operations(one, batch) != _operations(other, batch) or one.constants.keys() != other.constants.keys():
        return False
    pairs = ((value, other.constants[name]) for name, value in one.constants.items())
    return all(isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b) for a, b in pairs)


def _operations(program: ExportedProgram, batch: str) -> list[tuple[Any, ...]]:
    """Return a program's operations for a batch of 1, without assertions and slices that take everything.

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
            expression = expression.subs({symbol: 1 for symbol in expression.free_symbols if str(symbol) == batch})
            places[node] = int(expression) if expression.is_Integer else str(expression)
            continue
        if node.target is torch.ops.aten.slice.Tensor and node.args[2:] in ((), (0, sys.maxsize), (None, None)):
            places[node] = places[node.args[0]]
            continue
        arguments = map_arg((node.args, node.kwargs), lambda value: places[value])
        places[node] = f"%{len(found)}"
        found.append((node.op, node.target, arguments))
    return found
