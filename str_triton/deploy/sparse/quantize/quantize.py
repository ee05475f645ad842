"""`quantize`: calibrate a network on a few batches, and run its layers on 8-bit integers where that is good enough."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from str_triton.deploy.sparse.compile import compile_sparse
from str_triton.deploy.sparse.graph.nodes import FREE, Graph, Layer, Linear, Node
from str_triton.deploy.sparse.graph.pointwise import Pointwise
from str_triton.deploy.sparse.graph.quantized import Grid
from str_triton.deploy.sparse.graph.recurrent import Recurrent
from str_triton.deploy.sparse.model import CompiledModel, SparseModel
from str_triton.deploy.sparse.quantize.convert import Edges, alike, convert, quantized, unfit
from str_triton.deploy.sparse.quantize.faster import faster
from str_triton.deploy.sparse.quantize.model import LayerError, QuantizedModel, Report
from str_triton.deploy.sparse.quantize.ranges import METHODS, Range
from str_triton.deploy.sparse.runtime.trial import try_out
from str_triton.deploy.sparse.surroundings import plain_torch
from str_triton.native.build import library

BOUND = 0.1  # a layer stays in float32 if the relative error of its output is above this
ROUNDS = "_rounds_for_int8"  # an attribute of a layer inside `quantization_aware`, and of copies made there


def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    labels: Iterable[Tensor] | None = None,
    method: str = "percentile",
    bound: float = BOUND,
    example: Any = None,
) -> QuantizedModel:
    """Make a copy of `model` whose convolutions, linear and recurrent layers have 8-bit integers, without training.

    Batch norms are folded. Weights become int8 with a scale for each output channel, symmetric, so zeros stay zeros.
    Each value between layers becomes a byte with one scale and one zero point, found on the batches. A residual sum is
    part of the layer before it. The inputs and outputs of a concatenation, a slice or a max pool share one grid.
    A recurrent layer keeps inputs and states in float32; its recurrent matrix, or both factors of it, become int8.
    A layer stays in float32 if its own error is above `bound`, or if there is no integer form of it; the report says
    which layers and why. The first and the last layer are treated like the others.

    Args:
        model: a model that `compile_sparse` can export. It does not change.
        batches: inputs like those of inference, a tensor each, or a tuple of arguments. A few hundred examples are
            usual.
        labels: the classes [batch] of each batch: the report then has the accuracy in float32 and quantized.
        method: how the range of a value is found: "percentile" (all but 0.005 % of its numbers at either end), "mse"
            (the least squared error) or "minmax".
        bound: the largest relative error of a layer's output, as the root of the mean squares.
        example: an input like those of inference: layers that are not faster on integers, on this machine and with
            `torch.get_num_threads()` threads, then stay in float32, and so does a network that is faster so.

    Returns:
        A module for `compile_sparse`. `print` shows the error by layer.

    Raises:
        TypeError, ValueError: wrong arguments, no batches, or a model that cannot be exported or whose calls change
            its buffers.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if not bound > 0:
        raise ValueError(f"bound must be positive, got {bound}")
    if isinstance(model, CompiledModel | QuantizedModel):
        raise TypeError(f"quantize takes the model itself, got a {type(model).__name__}: quantize first, then compile")
    if isinstance(model, nn.Module) and any(ROUNDS in vars(module) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} rounds already: leave the block of quantization_aware first, and load the state "
            "dict of a copy that was made in it into a model from outside"
        )
    given = calibration_calls(batches)
    classes = None if labels is None else list(labels)
    if classes is not None and len(classes) != len(given):
        raise ValueError(f"labels must have one tensor for each of the {len(given)} batches, got {len(classes)}")
    network = compile_sparse(model, given[0], tune=False)
    if not isinstance(network, SparseModel):
        raise ValueError(f"{type(model).__name__} cannot be quantized: {network.notes[0]}")
    if network.graph.changes:
        raise ValueError(f"{type(model).__name__} cannot be quantized: a call changes {min(network.graph.changes)}")
    with plain_torch():
        wanted = None if example is None else (example if type(example) is tuple else (example,))
        return _Calibration(network, given, method).result(bound, classes, wanted)


def calibration_calls(batches: Iterable[Any]) -> list[tuple]:
    """Return the arguments of a call for each batch. Raises TypeError for one tensor, ValueError for no batches."""
    if isinstance(batches, Tensor):
        raise TypeError("quantize takes several batches, got one tensor: pass [batch]")
    given = [batch if type(batch) is tuple else (batch,) for batch in batches]
    if not given:
        raise ValueError("quantize needs at least one batch to calibrate on")
    return given


class _Calibration:
    """The calibration: the ranges of a network's values on the batches, and the errors of its layers."""

    def __init__(self, network: SparseModel, batches: Sequence[tuple], method: str) -> None:
        self.network, self.graph = network, network.graph
        self.batches = [network.signature.tensors(batch, {}) for batch in batches]
        self.shapes = try_out(self.graph, self.batches[0]).shapes
        self.roots = alike(self.graph, self.shapes)
        self.unfit = {node.name: unfit(node, self.shapes) for node in self.graph.layers()}
        self.sums: dict[str, Grid] = {}
        self.befores: dict[str, Grid] = {}
        self.grids = self._grids(method)

    def _grids(self, method: str) -> dict[str, Grid]:
        """Return the grid of every value that may become codes, and find those inside of layers.

        `sums` has those of convolutions before a residual is added, `befores` those before an activation.
        """
        fit = [node for node in self.graph.layers() if self.unfit[node.name] is None]
        read = [node for node in fit if not isinstance(node, Recurrent)]  # Recurrent layers read and make float32.
        watched = {self.roots[name] for node in read for name in (node.name, *node.inputs)}
        parts = {node.name: _parts(node) for node in read}
        graph = replace(self.graph, nodes=[part for node in self.graph.nodes for part in parts.get(node.name, [node])])
        keys = {node.name: self.roots.get(node.name, node.name) for node in graph.nodes}
        ranges = {key: Range() for key in keys.values() if key in watched or key not in self.roots}
        for note in (Range.widen, Range.count):
            for inputs in self.batches:
                for node, values in graph.steps(inputs):
                    if keys[node.name] in ranges:
                        note(ranges[keys[node.name]], values[node.name])
        found = {key: seen.grid(method) for key, seen in ranges.items()}
        self.sums = {node.name: found[f"{node.name}.sum"] for node in read if len(node.inputs) > 1}
        self.befores = {node.name: found[f"{node.name}.before"] for node in read if node.activation}
        return {name: found[root] for name, root in self.roots.items() if root in found}

    def result(self, bound: float, labels: list[Tensor] | None, example: tuple | None) -> QuantizedModel:
        """Quantize the layers whose errors are within the bound and which are faster so, and measure the result."""
        alone = self._errors_alone()
        left = dict(self.unfit)
        for name, error in alone.items():
            if isinstance(error, str):
                left[name] = error
            elif not error <= bound:
                left[name] = f"its error {error:.3f} is above {bound:g}"
        chosen = {name for name, reason in left.items() if reason is None}
        if example is not None and (kernels := library()) is not None:
            inputs = self.network.signature.tensors(example, {})
            slower = faster(self.graph, chosen, self._converted, self._edges, inputs, kernels)
            left |= slower
            chosen -= slower.keys()
        graph, codes = self._converted(chosen)
        together, error = self._errors_together(graph, codes)
        layers = [
            LayerError(
                node.label or node.name,
                100 * float((node.weight == 0).float().mean()),
                alone.get(node.name) if not isinstance(alone.get(node.name), str) else None,
                together.get(node.name),
                left[node.name] or "",
            )
            for node in self.graph.layers()
            if not isinstance(node, Pointwise)
        ]
        accuracy = None if labels is None else self._accuracy(graph, labels)
        report = Report(layers, error, accuracy)
        sums = {codes[name]: grid for name, grid in self.sums.items() if name in chosen}
        return QuantizedModel(graph, self.network.signature, report, self.network.left, sums)

    def _converted(self, chosen: set[str]) -> tuple[Graph, dict[str, str]]:
        return convert(self.graph, chosen, self.grids, self.befores, self.shapes)

    def _edges(self, chosen: set[str]) -> Graph:
        return Edges(self.graph, chosen, self.grids, self.befores, self.shapes).graph

    def _errors_alone(self) -> dict[str, float | str]:
        """Return the relative error of each layer's output where this layer alone is quantized, or why it cannot be."""
        made: dict[str, Any] = {}
        found: dict[str, float | str] = {}
        for node in self.graph.layers():
            if self.unfit[node.name] is None:
                try:
                    made[node.name] = quantized(node, self.grids, node.name, node.inputs, self.befores.get(node.name))
                except ValueError as error:
                    found[node.name] = str(error)
        sums = _Errors()
        for inputs in self.batches:
            for node, values in self.graph.steps(inputs):
                if node.name in made:
                    y = self._run_codes(node, made[node.name], values)
                    sums.add(node.name, y, values[node.name])
        return found | sums.relative()

    def _run_codes(self, node: Layer, made: Layer, values: dict[str, Any]) -> Tensor:
        """Return the float32 output of a quantized layer for the exact inputs of the layer."""
        if isinstance(node, Recurrent):
            return made.run(values)
        y = made.run({name: self.grids[name].encode(values[name]) for name in node.inputs})
        return y if isinstance(node, Linear) else self.grids[node.name].decode(y)

    def _errors_together(self, graph: Graph, codes: Mapping[str, str]) -> tuple[dict[str, float], float]:
        """Return the relative errors of the layers' outputs in the quantized network, and of its own outputs."""
        sums = _Errors()
        layers = {node.name for node in self.graph.layers()}
        names = {codes.get(name, name): name for name in layers}
        for inputs in self.batches:
            exact = {node.name: values[node.name] for node, values in self.graph.steps(inputs) if node.name in layers}
            for node, values in graph.steps(inputs):
                if (name := names.get(node.name)) is not None:
                    value = values[node.name]
                    found = self.grids[name].decode(value) if value.dtype == torch.uint8 else value
                    sums.add(name, found, exact[name])
            for ours, theirs in zip(_floats(graph, inputs), _floats(self.graph, inputs), strict=True):
                sums.add("", ours, theirs)
        errors = sums.relative()
        error = errors.pop("", 0.0)
        return errors, error

    def _accuracy(self, graph: Graph, labels: list[Tensor]) -> tuple[float, float]:
        right, count = [0, 0], 0
        for inputs, classes in zip(self.batches, labels, strict=True):
            count += len(classes)
            for place, network in enumerate((self.graph, graph)):
                scores = _floats(network, inputs)[0]
                if scores.dim() != 2 or len(scores) != len(classes):
                    raise ValueError(f"labels need outputs [batch, classes], got shape {tuple(scores.shape)}")
                right[place] += int((scores.argmax(1) == classes).sum())
        return right[0] / max(count, 1), right[1] / max(count, 1)


@dataclass
class _Rest(Node):
    """The residual, the clamp and the activation of a layer, for the value of the layer without them."""

    layer: Layer

    def run(self, values: dict[str, Any]) -> Tensor:
        return self.layer.finish(values[self.inputs[0]], values)


def _parts(node: Layer) -> list[Node]:
    """Return the nodes that compute a layer so that the values inside of it have names.

    "<name>.sum" is the value before a residual is added, "<name>.before" the one before an activation.
    """
    parts: list[Node] = [node]
    if len(node.inputs) > 1:
        bare = replace(node, name=f"{node.name}.sum", inputs=node.inputs[:1], clamp=FREE, activation="")
        parts = [bare, _Rest(node.name, [bare.name, *node.inputs[1:]], replace(node, activation=""))]
    if node.activation:
        before = f"{node.name}.before"
        last = replace(parts[-1], name=before) if len(parts) > 1 else replace(node, name=before, activation="")
        alone = replace(node, inputs=node.inputs[:1], clamp=FREE)
        parts = [*parts[:-1], last, _Rest(node.name, [before], alone)]
    return parts


class _Errors:
    """Sums of squares by name: of differences, and of the exact values."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, name: str, found: Tensor, exact: Tensor) -> None:
        sums = self._sums.setdefault(name, [0.0, 0.0])
        sums[0] += float(((found - exact).double() ** 2).sum())
        sums[1] += float((exact.double() ** 2).sum())

    def relative(self) -> dict[str, float]:
        return {name: (error / size) ** 0.5 if size else float(error > 0) for name, (error, size) in self._sums.items()}


def _floats(graph: Graph, inputs: list[Any]) -> list[Tensor]:
    """Return the outputs of a graph that are floating-point tensors."""
    outputs, _ = graph.run(inputs)
    return [value for value in pytree.tree_leaves(outputs) if isinstance(value, Tensor) and value.is_floating_point()]
