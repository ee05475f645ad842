"""A quantized network before it is compiled: its graph on integers, run by torch, and the measured errors."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.utils._pytree as pytree
from torch import nn

from str_triton.deploy.sparse.graph.nodes import Constant, Graph, Layer
from str_triton.deploy.sparse.graph.pointwise import Pointwise
from str_triton.deploy.sparse.graph.quantized import Grid, QuantizedConvolution, QuantizedLinear
from str_triton.deploy.sparse.graph.recurrent import Recurrent
from str_triton.deploy.sparse.graph.signature import Signature
from str_triton.deploy.sparse.surroundings import plain_torch
from str_triton.deploy.sparse.text_table import text_table
from str_triton.files import percent


@dataclass(frozen=True)
class LayerError:
    """The effect of quantization on one layer.

    Attributes:
        label: the layer's name in the model.
        sparsity: zeros among its weights, in %.
        alone: the root mean squared error of its output, relative to the output's root mean square, if only this layer
            is quantized; None: it cannot be quantized.
        together: the same error with all chosen layers quantized.
        left: why it stays in float32; "": it runs on integers.
    """

    label: str
    sparsity: float
    alone: float | None
    together: float | None
    left: str = ""


@dataclass(frozen=True)
class Report:
    """The effect of quantization on a network, on the batches of the calibration.

    Attributes:
        layers: the error by layer, in order.
        error: the relative error of the network's outputs.
        accuracy: the shares of correct classes in float32 and quantized, if labels were given.
    """

    layers: Sequence[LayerError]
    error: float
    accuracy: tuple[float, float] | None = None

    def __str__(self) -> str:
        rows = [("layer", "sparsity", "error alone", "error in the network", "executed in")]
        for layer in self.layers:
            errors = ["" if error is None else f"{error:.4f}" for error in (layer.alone, layer.together)]
            kind = f"float32: {layer.left}" if layer.left else "int8"
            rows.append((layer.label, percent(layer.sparsity / 100), *errors, kind))
        lines = [text_table(rows)]
        lines.append(f"relative error of the outputs: {self.error:.4f}")
        if self.accuracy:
            lines.append("accuracy: {:.2%} in float32, {:.2%} quantized".format(*self.accuracy))
        return "\n".join(lines)


class QuantizedModel(nn.Module):
    """A network whose layers run on 8-bit integers, computed by torch: the reference for the compiled one.

    `compile_sparse(quantized, example)` makes it fast. It takes the arguments of the model that it was made from. Its
    state dict has the int8 weights, their scales and the int32 biases, by the names of the layers after "weights.", and
    `pack` stores it.

    Attributes:
        report: the measured errors; `print(quantized)` shows them.
        sums: for exports, the grids of convolutions' outputs before their residuals are added, by the nodes' names.
    """

    def __init__(
        self, graph: Graph, signature: Signature, report: Report, left: dict[str, str], sums: dict[str, Grid]
    ) -> None:
        super().__init__()
        self.graph, self.signature, self.report, self.left, self.sums = graph, signature, report, left, sums
        self.weights = nn.Module()
        self.training = False
        for node in graph.nodes:
            if isinstance(node, Layer) and not (isinstance(node, Pointwise) and not node.scales):
                self._hold(self._label(node), node)
            elif isinstance(node, Constant):
                self._hold(node.name, node)

    def _label(self, node: Layer) -> str:
        """Return the name of a layer in the state dict. The layers of one recurrent module may have one label."""
        is_taken = isinstance(node, Recurrent) and node.label in dict(self.weights.named_modules())
        return f"{node.label}.{node.name}" if is_taken else node.label or node.name

    def _hold(self, label: str, node: Any) -> None:
        """Register a node's tensors under the name of its layer."""
        place = self.weights
        for part in label.split("."):
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        names = ("value",) if isinstance(node, Constant) else ("weight", "bias")
        if isinstance(node, QuantizedConvolution | QuantizedLinear):
            names += ("scale",)
        elif isinstance(node, Recurrent):
            names += ("v", "steps", "weight_in", "bias_in", "scale")
        for name in names:
            if name not in place._buffers and getattr(node, name, None) is not None:
                place.register_buffer(name, getattr(node, name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.signature.tensors(args, kwargs)
        with plain_torch():
            outputs, _ = self.graph.run(inputs)
        return pytree.tree_unflatten(outputs, self.signature.returns)

    def train(self, mode: bool = True) -> "QuantizedModel":
        if mode:
            raise ValueError("a network made by quantize is for inference: train the model it was made from")
        return super().train(False)

    def __str__(self) -> str:
        return str(self.report)

    def plain_graph(self) -> Graph:
        """Return a copy of the graph, for a compiled network to own."""
        return copy.deepcopy(self.graph)
