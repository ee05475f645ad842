"""The choice between float32 and integers by time: layers that are not faster on integers here stay in float32."""

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from str_triton.deploy.sparse import stopwatch
from str_triton.deploy.sparse.choose import choose, copy_time, layer_call
from str_triton.deploy.sparse.graph.nodes import Graph, Layer
from str_triton.deploy.sparse.graph.quantized import Dequantize, Quantize
from str_triton.deploy.sparse.runtime.images import Shapes
from str_triton.deploy.sparse.runtime.plan import Plan
from str_triton.deploy.sparse.runtime.trial import try_out

ENOUGH = 0.99  # a change of one layer must save a hundredth of the time
Times = Mapping[str, tuple[float, float]]
"""Milliseconds of each layer in float32 and on integers."""


class Timed:
    """A graph with the fastest execution of each layer, and its plan."""

    def __init__(self, graph: Graph, inputs: Sequence[Tensor], library: ctypes.CDLL) -> None:
        self.trial, self.library = try_out(graph, inputs), library
        self.layers = {node.name: node for node in graph.layers()}
        self.choices, _ = choose(graph, self.trial, inputs, library)
        self.plan = Plan(graph, self.trial, self.choices, library)
        self.plan.run(inputs)

    def call(self, node: Layer) -> tuple[Callable[[], object], int]:
        """Return a call of a layer alone, and how often it runs in a call of the network."""
        return layer_call(node, self.trial, self.plan, self.choices[node.name], self.library)


def faster(
    graph: Graph,
    chosen: set[str],
    converted: Callable[[set[str]], tuple[Graph, dict[str, str]]],
    edges: Callable[[set[str]], Graph],
    inputs: Sequence[Tensor],
    library: ctypes.CDLL,
) -> dict[str, str]:
    """Return the layers of `chosen` that stay in float32 because of their time, with the reason.

    Each layer is timed in float32 and on integers in turns. At the end three networks are timed in turns: in float32,
    on integers, and the mixture that should be the fastest.

    Args:
        graph: the network in float32.
        chosen: the layers that can run on integers.
        converted: returns the graph on integers for a set of layers, and the nodes that hold codes.
        edges: returns a graph with the same nodes between float32 and codes as that, but other layers.
        inputs: an example.
        library: the kernels.
    """
    floats, (made, codes) = Timed(graph, inputs, library), converted(chosen)
    integers, watch = Timed(made, inputs, library), stopwatch.Stopwatch()
    times = {}
    for name in chosen:
        node = integers.layers[name] if name in integers.layers else integers.layers[codes[name]]
        calls = [floats.call(floats.layers[name]), integers.call(node)]
        found = watch.race({index: call for index, (call, _) in enumerate(calls)})
        one, other = (found[index] * passes for index, (_, passes) in enumerate(calls))
        times[name] = (one, other)
    best = select(chosen, times, edges, floats.trial.shapes, copy_time)
    networks: dict[frozenset[str], Timed] = {frozenset(): floats, frozenset(chosen): integers}
    if best not in networks:
        networks[best] = Timed(converted(set(best))[0], inputs, library)
    runs = {names: functools.partial(network.plan.run, inputs) for names, network in networks.items()}
    whole = watch.race(runs, 2 * stopwatch.ROUNDS, cold=False)
    fastest = min(whole, key=lambda names: whole[names])
    return {name: "{:.3f} ms in float32, {:.3f} ms on integers".format(*times[name]) for name in chosen - fastest}


def select(
    chosen: set[str],
    times: Times,
    edges: Callable[[set[str]], Graph],
    shapes: Shapes,
    copy_milliseconds: Callable[[tuple[int, ...]], float],
) -> frozenset[str]:
    """Return the layers that run on integers in the fastest network: one layer at a time is changed, from either end.

    Each value that becomes codes, or float32 again, costs the time of a copy.
    """

    def cost(integers: set[str]) -> float:
        total = sum(times[name][name in integers] for name in chosen)
        for node in edges(integers).nodes:
            if isinstance(node, Quantize | Dequantize):
                name = node.name if isinstance(node, Dequantize) else node.inputs[0]
                total += copy_milliseconds(shapes[name]) if name in shapes else 0.0
        return total

    found = []
    for start in (set(chosen), set[str]()):
        best, changed = cost(start), True
        while changed:
            changed = False
            for name in sorted(chosen):
                other = start ^ {name}
                if (now := cost(other)) < ENOUGH * best:
                    start, best, changed = other, now, True
        found.append((best, sorted(start)))
    return frozenset(min(found)[1])
