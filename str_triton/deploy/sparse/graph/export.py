"""torch.export of a model: a functional graph of ATen operations, with as many sizes left open as the model allows."""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental import _config as shapes_config
from torch.fx.experimental import symbolic_shapes

from str_triton.deploy.sparse.graph.guards import compile_guard
from str_triton.deploy.sparse.graph.limit import Limit
from str_triton.deploy.sparse.graph.ones import Exported, one_line
from str_triton.deploy.sparse.graph.signature import Leaf, Signature, parameter_names
from str_triton.deploy.sparse.quiet import quiet
from str_triton.deploy.sparse.state import fresh

_INPUTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR, InputKind.USER_INPUT)


class NotExported(Exception):
    """The error where a model cannot be exported; the message says why, in one line."""


def exports(model: nn.Module, args: tuple, kwargs: dict[str, Any], limit: Limit) -> Iterator[Exported]:
    """Export `model` for arguments like these in turn: with all sizes open, only the first dimension's, or none.

    Yields the exports that succeed in time; the last form has a limit of its own, as long as that of the others
    together. The best export is the first that gives the same results as the model.

    Raises:
        NotExported: torch.export fails in all of these ways; the message is that of the first failure.
    """
    reason: Exception | None = None
    for sizes, part in _ATTEMPTS:
        own = limit.share(part) if part else Limit(limit.seconds)
        for strict in (False, True):
            export = functools.partial(_exported, model, sizes, strict, own)
            try:
                found = export(args, kwargs)
            except Exception as error:  # torch.export fails in as many ways as models do.
                reason = reason or (TimeoutError(str(own)) if own.is_over() else error)
            else:
                failed = (
                    f"{_OPEN[sizes]} may differ from the example's: torch.export fails with more: {one_line(reason)}"
                )
                yield replace(found, notes=[failed] if reason else [], again=export)
                reason = reason or ValueError("its exported graph gives other values")
                break
    raise NotExported(one_line(reason)) from reason


def _exported(
    model: nn.Module, sizes: Any, strict: bool, limit: Limit, args: tuple, kwargs: dict[str, Any]
) -> Exported:
    with limit():
        program = _export(fresh(model), args, kwargs, sizes, strict)
        if any(isinstance(value, FakeTensor) for value in program.constants.values()):
            raise NotExported("the export has lost the values of a tensor")  # A retrace would end the process.
        # In this order: a retrace may fix sizes that the export had left open.
        program = _functional(program)
    return Exported(program, _signature(program, model, args, kwargs))


def _all(tensor: Tensor) -> Any:
    return dict.fromkeys(range(tensor.dim()), Dim.AUTO)


def _first(tensor: Tensor) -> Any:
    return {0: Dim.AUTO} if tensor.dim() else None


def _none(tensor: Tensor) -> Any:
    return None


_ATTEMPTS = ((_all, 2 / 3), (_first, 1), (_none, None))  # with the part of the time that is left for open sizes
_OPEN = {_all: "all sizes", _first: "only the size of the first dimension (the batch)", _none: "no size"}


def _export(model: nn.Module, args: tuple, kwargs: dict[str, Any], sizes: Any, strict: bool) -> ExportedProgram:
    def dynamic(leaf: Any) -> Any:
        return sizes(leaf) if isinstance(leaf, Tensor) else None

    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    every = None if sizes is _none else pytree.tree_map(dynamic, dict(given))
    with quiet(), _ordinary_ones():
        return torch.export.export(model, args, kwargs, dynamic_shapes=every, strict=strict)


def _ordinary_ones() -> contextlib.AbstractContextManager:
    """Make torch treat sizes of 0 and 1 like others, so that a branch on them becomes a guard."""
    if not hasattr(shapes_config, "backed_size_oblivious"):  # The option is not public in torch.
        return contextlib.nullcontext()
    return shapes_config.patch(backed_size_oblivious=True)


def _functional(program: ExportedProgram) -> ExportedProgram:
    """Return a program without in-place operations. It is traced again only if an operation changes a shared value."""
    regions = [module for module in program.graph_module.modules() if isinstance(module, fx.GraphModule)]
    for node in [node for module in regions for node in module.graph.nodes]:
        if _is_mutable(node):
            functional = _functional_form(node)
            if functional is None:
                with quiet(), _ordinary_ones():
                    return program.run_decompositions({})
            node.target = functional
    return program


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _functional_form(node: fx.Node) -> Any:
    """Return the out-of-place form of an in-place operation on a fresh value; None where the value is not fresh."""
    packet = node.target._schema.name.removeprefix("aten::")
    if not (node.target.namespace == "aten" and packet.endswith("_") and node.args):
        return None
    source = node.args[0]
    overload = node.target._overloadname
    functional = getattr(torch.ops.aten, packet[:-1], None)
    if functional is None or overload not in functional.overloads() or list(source.users) != [node]:
        return None
    schema = getattr(source.target, "_schema", None)
    is_fresh = schema is not None and schema.returns and all(value.alias_info is None for value in schema.returns)
    only_self = sum(argument.alias_info is not None for argument in node.target._schema.arguments) == 1
    found = getattr(functional, overload)
    # An addition in place keeps the shape and the dtype of its first argument.
    same = all(
        _value(source) is not None and getattr(_value(source), what) == getattr(_value(node), what)
        for what in ("shape", "dtype")
    )
    promotes = any(
        isinstance(arg, fx.Node) and getattr(_value(arg), "dtype", None) != _value(source).dtype
        for arg in node.args[1:]
    )
    fits = is_fresh and only_self and same and not promotes and not found._schema.is_mutable
    return found if fits else None


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _signature(program: ExportedProgram, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Signature:
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    leaves, named = [], set()
    given = pytree.tree_leaves((args, kwargs))
    specs = []
    for spec in program.graph_signature.input_specs:
        if spec.kind not in _INPUTS:
            raise NotExported(f"it takes a {spec.kind.name.lower()}")
        if spec.kind is InputKind.USER_INPUT:
            specs.append(spec)
    for spec, leaf in zip(specs, given, strict=True):
        if not isinstance(leaf, Tensor):
            leaves.append(Leaf(None, value=leaf))
            continue
        sizes = []
        for size in _value(placeholders[spec.arg.name]).shape:
            if isinstance(size, int) or size.node.expr.is_Integer:
                sizes.append(int(size))
            elif size.node.expr.is_Symbol:
                sizes.append(str(size.node.expr))
                named.add(size.node.expr)
            else:
                raise NotExported(f"a size is {size.node.expr} of another one")
        leaves.append(Leaf(leaf.dtype, tuple(sizes)))
    names = parameter_names(model.forward, len(args))
    structure = pytree.tree_flatten((args, kwargs))[1]
    return Signature(structure, leaves, _guards(program, named), program.call_spec.out_spec, names)


def _guards(program: ExportedProgram, named: set[Any]) -> list[str]:
    """Return the conditions under which the graph holds, with the sizes by the names of their symbols."""
    values = [_value(node) for node in program.graph.nodes if node.op == "placeholder"]
    sizes = [size for value in values if isinstance(value, Tensor) for size in value.shape if not isinstance(size, int)]
    if not sizes:
        return []
    try:  # These names are not public: without them sizes stay fixed.
        environment = sizes[0].node.shape_env
        sources = environment.var_to_sources
        printer = symbolic_shapes.ShapeGuardPythonPrinter({s: [str(s)] for s in sources}, str, sources)
        conditions = [guard.expr for guard in environment.guards if guard.expr.free_symbols]
    except AttributeError as error:
        raise NotExported(f"this version of torch does not tell its conditions on sizes: {error}") from error
    guards = [printer.doprint(condition) for condition in conditions if condition.free_symbols <= named]
    # A size that is one has a limit of two, which says nothing about other sizes.
    checks = [(c.free_symbols, compile_guard(printer.doprint(c))) for c in conditions if len(c.free_symbols) == 1]
    is_one = {s for (s,), check in checks if check({str(s): 1}) and not check({str(s): 2})}
    for symbol in named - is_one:
        limits = program.range_constraints.get(symbol)
        if limits is not None and limits.lower > 0:
            guards.append(f"{symbol} >= {int(limits.lower)}")
        if limits is not None and limits.upper < 2**31:
            guards.append(f"{symbol} <= {int(limits.upper)}")
    for guard in guards:
        compile_guard(guard)
    return list(dict.fromkeys(guards))
