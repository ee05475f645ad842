"""From an exported program to a graph of this package's nodes; what depends on weights alone is computed once."""

import itertools
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from str_triton.deploy.sparse.graph.context import Context, bound, dimensions
from str_triton.deploy.sparse.graph.export import NotExported
from str_triton.deploy.sparse.graph.handlers import HANDLERS
from str_triton.deploy.sparse.graph.nodes import Call, Graph, Input, State
from str_triton.deploy.sparse.graph.pointwise import Norm
from str_triton.deploy.sparse.graph.recurrent import LOW_RANK, recurrent_nodes
from str_triton.deploy.sparse.graph.refs import Ref, references

aten = torch.ops.aten
# Operations that return their first argument: the graph changes nothing in place, and needs no gradients.
_IDENTITIES = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.lift_fresh.default)
# Checks of facts that the export has established.
_CHECKS = (
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
)
# Strides may differ from those of the export: then a view is not possible, and a reshape is.
_RESHAPES = (aten.view.default, aten._unsafe_view.default)
# Each part of these is a slice.
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
_NORMS = (aten._native_batch_norm_legit.no_stats, aten._native_batch_norm_legit_no_training.default)
_PRODUCTS = ("conv", "linear", "addmm", "mm", "matmul", "bmm", "gru", "lstm", "rnn", "str_triton::low_rank_rnn")


@dataclass
class Lowered:
    """A graph, and the layers in it that torch executes unchanged, with the reason."""

    graph: Graph
    left: dict[str, str]


def lower(program: ExportedProgram) -> Lowered:
    """Lower a functional program.

    Raises:
        NotExported: it has an operation that a functional graph cannot hold.
    """
    lowering = _Lowering()
    nodes = iter(program.graph.nodes)
    changed = {spec.target for spec in program.graph_signature.output_specs if spec.kind is OutputKind.BUFFER_MUTATION}
    for spec in program.graph_signature.input_specs:
        node = next(nodes)
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(spec.arg, TensorArgument):
                lowering.add(node, Input(node.name, []))
            else:
                lowering.values[node] = getattr(spec.arg, "value", None)
            continue
        tensor = program.state_dict.get(spec.target, program.constants.get(spec.target)).detach()
        if spec.target in changed:
            lowering.add(node, State(node.name, [], tensor.clone(), spec.target))
        else:
            lowering.known[node] = tensor
            lowering.labels[node] = spec.target.rpartition(".")[0]
    result: tuple = ()
    for node in nodes:
        if node.op == "output":
            result = lowering.arguments(node.args[0])
        else:
            lowering.lower(node, program.graph_module)
    return Lowered(_finished(program, lowering, result), lowering.left)


def _finished(program: ExportedProgram, lowering: "_Lowering", result: tuple) -> Graph:
    specs = program.graph_signature.output_specs
    outputs = [value for spec, value in zip(specs, result, strict=True) if spec.kind is OutputKind.USER_OUTPUT]
    changes = {}
    states = {node.label: node.name for node in lowering.nodes if isinstance(node, State)}
    for spec, value in zip(specs, result, strict=True):
        match spec.kind:
            case OutputKind.USER_OUTPUT:
                pass
            case OutputKind.BUFFER_MUTATION:
                changes[states[spec.target]] = value
            case OutputKind.USER_INPUT_MUTATION:
                changes[spec.target] = value
            case kind:
                raise NotExported(f"it gives a {kind.name.lower()}")
    return Graph(lowering.nodes, list(outputs), changes)


class _Lowering(Context):
    """The lowering of an exported program's nodes to this package's, one by one."""

    def lower(self, node: fx.Node, owner: torch.nn.Module) -> None:
        """Lower a node of `owner`'s graph."""
        target = node.target
        if node.op == "get_attr":
            found = getattr(owner, target)
            if isinstance(found, fx.GraphModule):
                found._tracer_cls = None  # The tracer of torch.export cannot be created again from a pickle.
            (self.known if isinstance(found, Tensor) else self.values)[node] = found
        elif target in _CHECKS:
            pass
        elif target in _IDENTITIES or (target is aten.dropout.default and not node.args[2]) or _is_same(node):
            source = node.args[0][0] if isinstance(node.args[0], list | tuple) else node.args[0]
            where = self.known if source in self.known else self.values
            where[node] = where[source]
            if source in self.labels:
                self.labels[node] = self.labels[source]
        elif target is aten.stack.default and (row := self._row(node)) is not None:
            self.values[node] = row
        elif target is aten.new_zeros.default and all(isinstance(size, int) for size in node.args[1]):
            self.known[node] = torch.zeros(node.args[1], dtype=node.meta["val"].dtype, device="cpu")
        elif isinstance(target, HigherOrderOperator) and (inner := _inlined(node)) is not None:
            self._inline(node, *inner, owner)
        elif self._is_known(node):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.known.__getitem__)
            self.known[node] = target(*args, **kwargs)
            found = [self.labels[source] for source in node.all_input_nodes if source in self.labels]
            if found:
                self.labels[node] = found[0]
        elif (
            node.op == "call_function"
            and getattr(target, "__name__", "") == "getitem"
            and isinstance(self.values.get(node.args[0]), list)
        ):
            self.values[node] = self.values[node.args[0]][node.args[1]]
        elif target in _SPLITS and (parts := self._parts(node)):
            self.nodes += parts
            self.values[node] = [Ref(part.name) for part in parts]
        elif target is LOW_RANK and (recurrent := recurrent_nodes(self, node)):
            self.nodes += recurrent[0]
            self.values[node] = recurrent[1]
        else:
            handler = HANDLERS.get(target)
            made = handler(self, node) if handler else None
            if made is None:
                made = self._call(node)
            made.variable = _is_variable(node)
            self.nodes.append(made)
            # A norm has three results, of which only the first is read.
            several = target in _NORMS and (isinstance(made, Norm) or made.target is aten.batch_norm.default)
            self.values[node] = [Ref(made.name)] if several else Ref(made.name)

    def _is_known(self, node: fx.Node) -> bool:
        target = node.target
        if isinstance(target, OpOverload):
            random = torch.Tag.nondeterministic_seeded in target.tags or target.namespace != "aten"
            if random or target._schema.is_mutable or not target._schema.returns:
                return False
        elif getattr(target, "__name__", "") != "getitem":
            return False
        return all(source in self.known for source in node.all_input_nodes)

    def _inline(self, node: fx.Node, module: Any, given: tuple, owner: torch.nn.Module) -> None:
        inner = self.values.get(module) if isinstance(module, fx.Node) else module
        placeholders = iter(given)
        outer, self.prefix = self.prefix, f"{self.prefix}{node.name}."
        result: Any = None
        for part in inner.graph.nodes:
            if part.op == "placeholder":
                source = next(placeholders)
                where = self.known if isinstance(source, fx.Node) and source in self.known else self.values
                where[part] = where[source] if isinstance(source, fx.Node) else source
            elif part.op == "output":
                result = part.args[0]
            else:
                self.lower(part, inner)
        self.prefix = outer
        found = self.arguments(result)
        self.values[node] = list(found) if isinstance(found, list | tuple) else found

    def _row(self, node: fx.Node) -> Ref | None:
        """Return the value of a stack of one recurrent state; None for another node."""
        state = self.values.get(node.args[0][0])
        return (
            self.rows.get(state)
            if isinstance(state, Ref) and len(node.args[0]) == 1 and not bound(node)["dim"]
            else None
        )

    def _parts(self, node: fx.Node) -> list[Call] | None:
        """Return the parts of a split as slices; None where their sizes are open."""
        dim = bound(node)["dim"] % dimensions(node.args[0])
        sizes = [part.shape[dim] for part in node.meta["val"]]
        if not all(isinstance(size, int) for size in sizes) or _is_variable(node):
            return None
        x, ends = self.value(node.args[0]), itertools.accumulate(sizes)
        return [
            Call(
                f"{self.name(node)}.{i}", [x.name], aten.slice.Tensor, (x, dim, end - size, end), label=self.label(node)
            )
            for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
        ]

    def _call(self, node: fx.Node) -> Call:
        args, kwargs = self.arguments((node.args, dict(node.kwargs)))
        target = aten.reshape.default if node.target in _RESHAPES else node.target
        if target is aten.new_zeros.default:  # Its values follow from sizes alone.
            target, args, kwargs = aten.zeros.default, args[1:], {}
        if target is aten.stack.default and len(args[0]) == 1:  # A view in place of a copy.
            target, args = aten.unsqueeze.default, (args[0][0], *(args[1:] or (0,)))
        if target in (aten.as_strided.default, aten.sym_stride.int):
            raise NotExported("it reads a tensor by its strides")
        if getattr(getattr(target, "_schema", None), "is_mutable", False):
            raise NotExported(f"it changes a tensor by {target}")
        label = self.label(node)
        name = getattr(getattr(target, "_schema", None), "name", "").removeprefix("aten::")
        weights = [source for source in node.all_input_nodes if source in self.known]
        if name.startswith(_PRODUCTS) and weights:
            self.left[label] = _reason(node, name)
        kwargs = dict(kwargs) | _with_dtype(target, node)
        return Call(self.name(node), references((args, kwargs)), target, args, kwargs, label)


def _is_same(node: fx.Node) -> bool:
    """Check whether a node returns its argument: a slice of all of it, a concatenation of it alone, its own dtype."""
    if node.target is aten.cat.default:
        return len(node.args[0]) == 1
    if node.target is aten.to.dtype:
        source = node.args[0].meta.get("val")
        return isinstance(source, Tensor) and source.dtype == node.meta["val"].dtype and not bound(node)["copy"]
    if node.target is not aten.slice.Tensor:
        return False
    given = bound(node)
    return given["start"] in (None, 0) and given["end"] in (None, sys.maxsize) and given["step"] == 1


def _is_variable(node: fx.Node) -> bool:
    """Check whether a node's shape depends on the values of tensors."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    sizes = [size for leaf in leaves for size in (leaf.shape if isinstance(leaf, Tensor) else [leaf])]
    return any(
        bool(free_unbacked_symbols(size))
        for size in sizes
        if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool)
    )


def _inlined(node: fx.Node) -> tuple[Any, tuple] | None:
    """Return the graph and the arguments of a region that only sets the gradient mode or turns autocast off."""
    name = node.target.name()
    if name == "wrap_with_set_grad_enabled":
        return node.args[1], tuple(node.args[2:])
    if name == "wrap_with_autocast" and node.args[2] is False:
        return node.args[4], tuple(node.args[5:])
    return None


def _reason(node: fx.Node, name: str) -> str:
    value = node.meta.get("val")
    dtype = value.dtype if isinstance(value, Tensor) else torch.float32
    return f"{'' if '::' in name else 'aten.'}{name}" + ("" if dtype == torch.float32 else f" in {dtype}")


def _with_dtype(target: Any, node: fx.Node) -> dict[str, Any]:
    """Return dtype and device for an operation that makes a tensor, so that it does not follow torch's defaults."""
    schema, value = getattr(target, "_schema", None), node.meta.get("val")
    if schema is None or not isinstance(value, Tensor):
        return {}
    options = {argument.name for argument in schema.arguments if argument.kwarg_only}
    is_new = {"dtype", "device"} <= options and not any("Tensor" in str(argument.type) for argument in schema.arguments)
    return {"dtype": value.dtype, "device": value.device} if is_new else {}
