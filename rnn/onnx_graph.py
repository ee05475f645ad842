"""A builder of ONNX graphs, and the recurrent cells as ONNX operators.

ONNX's own GRU and LSTM operators take only dense matrices. Here a matrix in factors stays two products.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from str_triton import LowRankRNN, LowRankWeight

States = tuple[str, ...]  # the names of h, or of h and c


class Graph:
    """A graph under construction: its nodes and constants. Every value is identified by its name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []  # onnx.NodeProto; onnx is imported with the first node
        self.constants: dict[str, np.ndarray] = {}

    def constant(self, name: str, values: Tensor | np.ndarray) -> str:
        """Add a constant and return its name."""
        if isinstance(values, Tensor):
            values = values.detach().cpu().numpy()
        self.constants[name] = np.ascontiguousarray(values)
        return name

    def add(self, operator: str, *inputs: str, name: str | None = None, **attributes: int) -> str:
        """Add a node with one output and return the output's name, by default the operator and the node's number."""
        return self._node(operator, inputs, [name or f"{operator}_{len(self.nodes)}"], attributes)[0]

    def split(self, value: str, sizes: list[int], axis: int = -1) -> list[str]:
        """Split a value into pieces of these sizes along `axis` and return their names."""
        if len(sizes) == 1:
            return [value]
        lengths = self.constant(f"sizes_{'_'.join(map(str, sizes))}", np.array(sizes, np.int64))
        names = [f"Split_{len(self.nodes)}_{piece}" for piece in range(len(sizes))]
        return self._node("Split", (value, lengths), names, {"axis": axis})

    def _node(self, operator: str, inputs: Sequence[str], outputs: list[str], attributes: dict[str, int]) -> list[str]:
        from onnx import helper

        self.nodes.append(helper.make_node(operator, list(inputs), outputs, f"node_{len(self.nodes)}", **attributes))
        return outputs


class Layer:
    """One direction of a recurrent layer as ONNX nodes.

    `cell` maps the projected input [batch, ..., gates * hidden] and the states [batch, ..., hidden] to the next states.
    """

    def __init__(self, graph: Graph, rnn: LowRankRNN, suffix: str) -> None:
        self.graph, self.hidden, self.suffix = graph, rnn.hidden_size, suffix
        self.cell = getattr(self, f"_{rnn.cell}")
        self.weights = {
            name: factors(graph, name, getattr(rnn, name)) for name in (f"weight_ih_{suffix}", f"weight_hh_{suffix}")
        }
        own = rnn.biases if rnn.bias else ()
        self.biases = {name: graph.constant(f"{name}_{suffix}", getattr(rnn, f"{name}_{suffix}")) for name in own}
        for name in rnn.scalars:
            graph.constant(f"sigmoid_{name}_{suffix}", getattr(rnn, f"{name}_{suffix}").sigmoid())

    def project(self, x: str) -> str:
        """Project the input of all steps to the gates; return the result's name."""
        return self._biased(product(self.graph, x, self.weights[f"weight_ih_{self.suffix}"]), "bias_ih")

    def _recur(self, h: str) -> str:
        return self._biased(product(self.graph, h, self.weights[f"weight_hh_{self.suffix}"]), "bias_hh")

    def _biased(self, value: str, name: str) -> str:
        return self.graph.add("Add", value, self.biases[name]) if name in self.biases else value

    def _gru(self, x: str, states: States) -> States:
        add, split, hidden = self.graph.add, self.graph.split, self.hidden
        (x_rz, x_n), (h_rz, h_n) = (split(gates, [2 * hidden, hidden]) for gates in (x, self._recur(states[0])))
        r, z = split(add("Sigmoid", add("Add", x_rz, h_rz)), [hidden, hidden])
        n = add("Tanh", add("Add", x_n, add("Mul", r, h_n)))
        return (add("Add", n, add("Mul", z, add("Sub", states[0], n))),)

    def _lstm(self, x: str, states: States) -> States:
        add, (h, c) = self.graph.add, states
        i, f, g, o = self.graph.split(add("Add", x, self._recur(h)), [self.hidden] * 4)
        kept = add("Mul", add("Sigmoid", f), c)
        c = add("Add", kept, add("Mul", add("Sigmoid", i), add("Tanh", g)))
        return add("Mul", add("Sigmoid", o), add("Tanh", c)), c

    def _fastgrnn(self, x: str, states: States) -> States:
        add, (h,) = self.graph.add, states
        zeta, nu = f"sigmoid_zeta_{self.suffix}", f"sigmoid_nu_{self.suffix}"
        one = self.graph.constant("one", np.ones(1, np.float32))
        a = add("Add", x, self._recur(h))
        z = add("Sigmoid", self._biased(a, "bias_gate"))
        c = add("Tanh", self._biased(a, "bias_update"))
        share = add("Add", add("Mul", zeta, add("Sub", one, z)), nu)
        return (add("Add", add("Mul", share, c), add("Mul", z, h)),)


def factors(graph: Graph, name: str, weight: LowRankWeight | Tensor) -> list[str]:
    """Add the factors of the transpose of `weight` as constants: v and u^T, or one transposed dense matrix."""
    if isinstance(weight, LowRankWeight):
        u = graph.constant(f"{name}.u", (weight.u * weight.spectrum()).mT)
        return [graph.constant(f"{name}.v", weight.v), u]
    return [graph.constant(name, weight.mT)]


def product(graph: Graph, x: str, factors: list[str]) -> str:
    """Multiply row vectors with one factor after the other; return the product's name."""
    for factor in factors:
        x = graph.add("MatMul", x, factor)
    return x
