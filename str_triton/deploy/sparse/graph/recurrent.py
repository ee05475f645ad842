"""Recurrent layers: how they are exported, and the node that one direction of one layer becomes."""

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from str_triton.deploy.sparse.graph.context import Context, bound, is_float
from str_triton.deploy.sparse.graph.nodes import FREE, Call, Layer, Linear, Node
from str_triton.deploy.sparse.graph.refs import Ref
from str_triton.nn import LowRankGRU, LowRankLSTM, LowRankRNN

aten = torch.ops.aten
LOW_RANK = torch.ops.str_triton.low_rank_rnn.default
# The cells of native/recurrent.h. Blocks of `hidden` rows in the recurrent matrix and of `hidden` elements in the bias,
# states, and elements of `scale`.
SIZES = {"gru": (3, 3, 1, 0), "lstm": (4, 4, 2, 0), "fastgrnn": (1, 2, 1, 2), "mgu": (2, 2, 1, 0)}


@dataclass
class Recurrent(Layer):
    """One direction of one recurrent layer.

    Its inputs are gates_x [T, B, gates * hidden], then h and perhaps c, [B, hidden]. Its value is
    [T + states, B, hidden]: the outputs, then the last h, then the last c.

    Attributes:
        weight: the recurrent matrix [gates * hidden, hidden], or without `v` its factor w [gates * hidden, rank].
        bias: of the gates, as `ops.low_rank_rnn` takes it.
        v: the other factor [hidden, rank] of the matrix w v^T; None: `weight` is the whole matrix.
        scale: the sigmoids of the cell's scalars; None if it has none.
        weight_in, bias_in: if given, the first input is x [T, B, features], and gates_x is weight_in x + bias_in.
        cell: a key of SIZES.
        reverse: run from the last step to the first.
    """

    v: Tensor | None = None
    scale: Tensor | None = None
    weight_in: Tensor | None = None
    bias_in: Tensor | None = None
    cell: str = "gru"
    reverse: bool = False

    @property
    def hidden(self) -> int:
        return self.weight.shape[0] // SIZES[self.cell][0]

    @property
    def states(self) -> int:
        return SIZES[self.cell][2]

    def is_whole(self) -> bool:
        """Check that the fields, which a file may have given, fit together."""
        if not isinstance(self.cell, str) or self.cell not in SIZES:
            return False
        dtype = self.dtypes[0]
        if not _is_tensor(self.weight, 2, dtype):
            return False
        gates, biases, states, scalars = SIZES[self.cell]
        rows, inner = self.weight.shape
        if rows % gates or rows == 0 or inner == 0 or not isinstance(self.reverse, bool):
            return False
        hidden = rows // gates
        has_v = _is_tensor(self.v, 2, dtype) and self.v.shape == (hidden, inner)
        recurrent = inner == hidden if self.v is None else has_v
        vectors = [(self.bias, biases * hidden), (self.scale, scalars or None)]
        projection = self.weight_in is None or (_is_tensor(self.weight_in, 2) and len(self.weight_in) == rows)
        vectors.append((self.bias_in, None if self.weight_in is None else rows))
        sizes = all(x is None if size is None else _is_tensor(x, 1) and len(x) == size for x, size in vectors)
        plain = self.clamp == FREE and self.activation == ""
        whole = recurrent and projection and sizes and plain and len(self.inputs) == 1 + states
        return whole and (self.scale is None or bool(((self.scale >= 0) & (self.scale <= 1)).all()))

    def check_fields(self) -> None:
        """Raise ValueError where the fields do not fit together."""
        if not self.is_whole():
            raise ValueError(f"{self.name} is no recurrent layer")

    def check(self, values: dict[str, Any]) -> list[Tensor]:
        """Return the values of the inputs.

        Raises ValueError where their sizes are not those of the layer.
        """
        x, *states = found = [values[name] for name in self.inputs]
        features = len(self.weight) if self.weight_in is None else self.weight_in.shape[1]
        if x.dim() != 3 or x.shape[2] != features:
            raise ValueError(f"{self.label} takes [T, B, {features}], got {list(x.shape)}")
        for state in states:
            if state.shape != (x.shape[1], self.hidden):
                raise ValueError(f"{self.label} takes states [{x.shape[1]}, {self.hidden}], got {list(state.shape)}")
        return found

    def gates_x(self, x: Tensor) -> Tensor:
        """Return the input's part of the gates at all steps."""
        return x if self.weight_in is None else F.linear(x, self.weight_in, self.bias_in)

    def run(self, values: dict[str, Any]) -> Tensor:
        x, *states = self.check(values)
        v = torch.eye(self.hidden, dtype=torch.float32, device="cpu") if self.v is None else self.v
        scale = self.bias.new_empty(0) if self.scale is None else self.scale
        arguments = (self.gates_x(x).contiguous(), self.weight, v, self.bias, scale)
        states = [state.contiguous() for state in states]
        outputs, *finals = LOW_RANK(self.cell, *arguments, states, None, self.reverse, False, None)
        return torch.cat([outputs, *(final.unsqueeze(0) for final in finals[: self.states])])


def _is_tensor(value: Any, dims: int, dtype: torch.dtype = torch.float32) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype and value.dim() == dims


def exportable(model: nn.Module) -> nn.Module | None:
    """Return a copy of a model in which each direction of a recurrent layer is one operation for torch.export.

    torch.export would fix the number of steps of nn.GRU and nn.LSTM. The copy computes the same with this package's
    layers. Return None if there are no layers to replace.
    """
    if (alone := _replacement(model)) is not None:
        return alone
    places = {
        name: made
        for name, module in model.named_modules(remove_duplicate=False)
        if name and (made := _replacement(module)) is not None
    }
    if not places:
        return None
    copied = copy.deepcopy(model)
    made: dict[int, nn.Module] = {}
    for name, replacement in places.items():
        parent, _, child = name.rpartition(".")
        shared = made.setdefault(id(model.get_submodule(name)), replacement)
        setattr(copied.get_submodule(parent), child, shared)
    return copied


def _replacement(module: nn.Module) -> nn.Module | None:
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    if type(module) in (nn.GRU, nn.LSTM) and not module.proj_size:
        kind = LowRankGRU if type(module) is nn.GRU else LowRankLSTM
        return kind.from_dense(module, factorize="none").eval()
    if isinstance(module, LowRankRNN) and type(module).__module__.startswith("str_triton."):
        return module.compact().eval()
    return None


def recurrent_nodes(context: Context, node: fx.Node) -> tuple[list[Node], list[Ref | None]] | None:
    """Return the nodes that replace the low-rank op, and the values of its results; None where torch executes it."""
    given = bound(node)
    cell, x, states = given["cell"], given["gates_x"], given["states"]
    known = (given["w"], 2), (given["v"], 2), (given["bias"], 1)
    if cell not in SIZES or given["lengths"] is not None or not all(context.is_weight(*pair) for pair in known):
        return None
    _, _, count, scalars = SIZES[cell]
    if scalars and not context.is_weight(given["scale"], 1):
        return None
    reads_more = any(user.users for user in node.users if user.args[1] > count)
    if reads_more or x in context.known or not all(map(is_float, (x, *states))):
        return None
    w, v, bias = (context.known[argument].detach().contiguous() for argument, _ in known)
    name = context.name(node)
    inputs = [context.value(argument).name for argument in (x, *states)]
    made = Recurrent(name, inputs, w, bias, FREE, context.label(node, given["w"]), cell=cell, reverse=given["reverse"])
    if scalars:
        made.scale = context.known[given["scale"]].detach().contiguous()
    is_dense = v.shape[0] == v.shape[1] and torch.equal(v, torch.eye(len(v)))
    made.v = None if is_dense else v
    if not made.is_whole():
        return None
    # Zeros in place of a bias, and an empty scale, take their dtype from x, not its values.
    if all(user is node or user in context.known or user.target is aten.new_empty.default for user in x.users):
        _absorb_projection(context, made)
    # One call of torch returns all results. A state that is stacked alone, as most layers do, stays [1, B, hidden].
    whole = Ref(f"{name}.whole")
    parts = [made, Call(whole.name, [name], aten.tensor_split.indices, (Ref(name), [i - count for i in range(count)]))]
    results = [Ref(f"{name}.{i}") for i in range(count + 1)]
    for i, result in enumerate(results):
        row = Ref(f"{result.name}.row") if i else result
        parts.append(Call(row.name, [whole.name], operator.getitem, (whole, i)))
        if i:
            parts.append(Call(result.name, [row.name], aten.squeeze.dim, (row, 0)))
            context.rows[result] = row
    return parts, [*results, None, None]


def _absorb_projection(context: Context, made: Recurrent) -> None:
    """Move the input's linear layer into the recurrent one, as in torch's own layers.

    A linear layer with many zeros stays a layer of its own, which has sparse executions.
    """
    found = next((node for node in context.nodes if node.name == made.inputs[0]), None)
    if not isinstance(found, Linear) or found.clamp != FREE or found.activation:
        return
    if 2 * int(found.weight.count_nonzero()) > found.weight.numel():
        context.nodes.remove(found)
        made.inputs[0] = found.inputs[0]
        made.weight_in, made.bias_in = found.weight, found.bias
