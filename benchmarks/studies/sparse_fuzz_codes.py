"""Recurrent layers with int8 weights, computed plainly, for benchmarks/studies/sparse_fuzz.py and the tests.

The loop in C multiplies int8 weights with 16-bit codes of the states. Here are the same codes and sums in torch. Given
equal inputs, the loop must give equal bits. In a network the inputs come from other layers, whose rounding may change a
code by one; as the next steps may amplify that, changes of the network's inputs by rounding bound the difference.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from benchmarks.studies.sparse_fuzz_compare import Tally, Wrong, difference, sizes, tensors
from benchmarks.studies.sparse_fuzz_networks import Case
from str_triton.deploy.sparse.executions import EXECUTIONS
from str_triton.deploy.sparse.graph.quantized_recurrent import QuantizedRecurrent, quantized_recurrent
from str_triton.deploy.sparse.graph.recurrent import SIZES, Recurrent
from str_triton.deploy.sparse.model import SparseModel

TOLERANCE = 1e-4  # of the largest value, at least of 1
CHANGES = 4  # of the inputs
ROUNDING = 2.0**-22


def codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 16-bit codes of the rows of x [rows, count] as int64, and their scales [rows, 1]."""
    top = x.abs().amax(1, keepdim=True)
    # A tensor: torch computes number / tensor as a product with the reciprocal, which is rounded twice.
    reach = torch.full_like(top, min((2**31 - 1) // (127 * x.shape[1]), 2**15 - 1))
    inverse = torch.where(top > 0, reach / top, 0.0)
    return torch.round(x * inverse).long(), top / reach


def product(node: QuantizedRecurrent, h: Tensor) -> Tensor:
    """Return R h by sums of integers, with one rounding for each operation that follows."""
    x, scale = codes(h)
    if node.v is not None:
        x, scale = codes((x @ node.v.long()).float() * scale)
    return (x @ node.weight.long().t()).float() * scale * node.steps


def one_step(node: QuantizedRecurrent, x: Tensor, states: list[Tensor]) -> Tensor:
    """Return the value of a node for one step of one sequence: the loop in float32 gets R h with the bias or with x."""
    gates, _, _, scalars = SIZES[node.cell]
    q = product(node, states[0])
    plain = Recurrent("y", node.inputs, torch.zeros(gates * node.hidden, 1), node.bias, cell=node.cell)
    plain.v, plain.scale = torch.zeros(node.hidden, 1), node.scale
    if scalars:
        x = x + q
    else:
        plain.bias = q[0] + node.bias
    values = dict(zip(node.inputs, [x.view(1, 1, -1), *states], strict=True))
    return EXECUTIONS["loop"].run(plain, values)


def sequence(node: QuantizedRecurrent, values: dict[str, Tensor]) -> Tensor:
    """Return the value of a node for the only sequence of a batch, step by step."""
    x, *states = (values[name] for name in node.inputs)
    outputs = torch.empty(len(x), 1, node.hidden)
    for time in reversed(range(len(x))) if node.reverse else range(len(x)):
        outputs[time], *states = one_step(node, x[time], states)
    return torch.stack([*outputs, *states])


def plain(node: QuantizedRecurrent, values: dict[str, Tensor]) -> Tensor:
    """Return the value of a node for a batch."""
    x, *states = node.check(values)
    if x.shape[1] == 0:
        return node.decoded().run(values)
    found = dict(zip(node.inputs, [node.gates_x(x), *states], strict=True))
    alone = [{name: value.narrow(value.dim() - 2, i, 1) for name, value in found.items()} for i in range(x.shape[1])]
    return torch.cat([sequence(node, each) for each in alone], 1)


def compare_codes(network: Case, compiled: SparseModel, force: Callable[[SparseModel], None], tally: Tally) -> None:
    """Compare a compiled network whose recurrent matrices become int8 with the same graph computed plainly.

    Args:
        force: draws the executions; those of the recurrent layers become the loop afterwards.

    Raises Wrong for a difference.
    """
    changed = copy.deepcopy(compiled)
    graph = changed.graph
    graph.nodes = [quantized_recurrent(node) if type(node) is Recurrent else node for node in graph.nodes]
    names = [node.name for node in graph.nodes if isinstance(node, QuantizedRecurrent)]
    if not names:
        return
    changed._held_source = (None,)
    force(changed)
    for name in names:
        changed.choices[name] = replace(changed.choices[name], execution="loop")
    for size in sizes(network):
        args = network.model.example(*size)
        try:
            found = tensors(changed(*args))
        except ValueError:  # The export holds for other sizes.
            continue
        given = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
        wanted = _computed(changed, given)
        error = max(map(difference, found, wanted), default=0.0)
        bound = TOLERANCE
        if not error <= bound:
            near = [
                _computed(changed, [x * (1 + ROUNDING * torch.randn_like(x)) for x in given]) for _ in range(CHANGES)
            ]
            bound = 4 * max(difference(a, b) for other in near for a, b in zip(other, wanted, strict=True))
        if math.isnan(error) or error > bound:
            raise Wrong(f"int8 for {[tuple(x.shape) for x in given]}: off by {error:.2g} of the largest value")
        tally.int8 += 1
        tally.largest_int8 = max(tally.largest_int8, error)


def _rounded(x: Tensor) -> Tensor:
    return x * (1 + ROUNDING * torch.randn_like(x))


def _computed(network: SparseModel, given: list[Tensor]) -> list[Tensor]:
    with mock.patch.object(QuantizedRecurrent, "run", plain), torch.no_grad():
        outputs, _ = network.graph.run(given)
    return tensors(outputs)
