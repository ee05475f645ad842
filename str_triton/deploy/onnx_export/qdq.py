"""Quantized networks in the form that ONNX engines fuse into integer operations: QuantizeLinear and DequantizeLinear.

Every value that is codes in the quantized network becomes float32 -> QuantizeLinear -> DequantizeLinear, and every
int8 weight and int32 bias a constant -> DequantizeLinear. What stands between is plain float32.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

from str_triton.deploy.sparse.graph.nodes import Call, Input, Node
from str_triton.deploy.sparse.graph.quantized import (
    TOP,
    Dequantize,
    Grid,
    Quantize,
    QuantizedConvolution,
    QuantizedGate,
    QuantizedLinear,
    QuantizedMean,
    grids_of_codes,
)
from str_triton.deploy.sparse.graph.refs import substitute
from str_triton.deploy.sparse.quantize.model import QuantizedModel
from str_triton.deploy.sparse.runtime.images import PAD

torch.library.define("str_triton::quantize_linear", "(Tensor x, float scale, int zero) -> Tensor")
torch.library.define("str_triton::dequantize_linear", "(Tensor codes, float scale, int zero) -> Tensor")
torch.library.define("str_triton::dequantize_channels", "(Tensor codes, Tensor scale) -> Tensor")


@torch.library.impl("str_triton::quantize_linear", "CompositeExplicitAutograd")
def _quantize(x: Tensor, scale: float, zero: int) -> Tensor:
    return Grid(scale, zero).encode(x)


@torch.library.impl("str_triton::dequantize_linear", "CompositeExplicitAutograd")
def _dequantize(codes: Tensor, scale: float, zero: int) -> Tensor:
    return Grid(scale, zero).decode(codes)


@torch.library.impl("str_triton::dequantize_channels", "CompositeExplicitAutograd")
def _dequantize_channels(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.float() * scale.view(-1, *[1] * (codes.dim() - 1))


torch.library.register_fake("str_triton::quantize_linear")(
    lambda x, scale, zero: torch.empty_like(x, dtype=torch.uint8)
)
torch.library.register_fake("str_triton::dequantize_linear")(
    lambda codes, scale, zero: torch.empty_like(codes, dtype=torch.float32)
)
torch.library.register_fake("str_triton::dequantize_channels")(
    lambda codes, scale: torch.empty_like(codes, dtype=torch.float32)
)


def _rounded(x: Tensor, grid: Grid) -> Tensor:
    codes = torch.ops.str_triton.quantize_linear(x, grid.scale, grid.zero)
    return torch.ops.str_triton.dequantize_linear(codes, grid.scale, grid.zero)


class QdqNetwork(nn.Module):
    """A quantized network in this form, for PyTorch's exporter. Its values are those of `model` but for rounding.

    A residual sum is part of the convolution before it in `model`. Engines want the convolution's own output as codes,
    so it is rounded once more, on the grid that the calibration found for it.
    """

    def __init__(self, model: QuantizedModel) -> None:
        super().__init__()
        self.graph, self.signature, self.sums = model.graph, model.signature, model.sums
        self.grids = grids_of_codes(model.graph.nodes)
        self._places: dict[str, int] = {}
        for node in model.graph.nodes:
            if isinstance(node, QuantizedConvolution | QuantizedLinear):
                self._hold(node)

    def _hold(self, node: QuantizedConvolution | QuantizedLinear) -> None:
        place = self._places[node.name] = len(self._places)
        scales = {"weight": node.scale, "bias": node.scale * node.grids[0].scale}
        for name, scale in scales.items():
            self.register_buffer(f"{name}{place}", getattr(node, name))
            self.register_buffer(f"{name}{place}_scale", scale)

    def _decoded(self, node: Node, name: str) -> Tensor:
        key = f"{name}{self._places[node.name]}"
        return torch.ops.str_triton.dequantize_channels(getattr(self, key), getattr(self, f"{key}_scale"))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = iter(self.signature.only_tensors(self.signature.flatten(args, kwargs)))
        values: dict[str, Any] = {}
        for node in self.graph.nodes:
            values[node.name] = next(given) if isinstance(node, Input) else self._value(node, values)
        return pytree.tree_unflatten(substitute(self.graph.outputs, values), self.signature.returns)

    def _value(self, node: Node, values: dict[str, Any]) -> Any:
        """Compute a node. Codes are replaced by the float32 values that they stand for."""
        match node:
            case Quantize():
                return _rounded(values[node.inputs[0]], node.grid)
            case Dequantize():
                return values[node.inputs[0]]
            case QuantizedConvolution():
                return self._convolution(node, values)
            case QuantizedLinear():
                y = F.linear(values[node.inputs[0]], self._decoded(node, "weight"), self._decoded(node, "bias"))
                return node.finish(y, values)
            case QuantizedMean():
                return values[node.inputs[0]].mean((-2, -1), keepdim=node.keep)
            case QuantizedGate():
                return _rounded(values[node.inputs[0]] * values[node.inputs[1]], node.grids[1])
            case Call(target=target) if target is PAD and node.name in self.grids:
                node = replace(node, args=(*node.args[:2], 0.0))  # not the code of zero
        value = node.run(values)
        return _rounded(value, self.grids[node.name]) if node.name in self.grids else value

    def _convolution(self, node: QuantizedConvolution, values: dict[str, Any]) -> Tensor:
        weight, bias = self._decoded(node, "weight"), self._decoded(node, "bias")
        geometry = (node.stride, node.padding, node.dilation, node.groups)
        y = F.conv2d(values[node.inputs[0]], weight, bias, *geometry)
        grid = node.rounded
        if len(node.inputs) > 1:
            y = _rounded(y, self.sums.get(node.name, grid)) + values[node.inputs[1]]
        if grid.limits(node.clamp) != (-grid.zero, TOP - grid.zero):
            # The quantization does not clamp by itself. Engines fuse no clamp between a layer and its quantization.
            y = _rounded(y, grid).clamp(*node.clamp)
        y = _rounded(y, grid)
        if node.table is not None:
            y = _rounded(node.activate(y), node.grids[1])
        return y


def separate_constants(proto: Any) -> None:
    """Give each reader of weights in an ONNX model a DequantizeLinear with constants, and a zero point, of its own.

    onnxruntime fuses a linear layer only if there is a zero point, and fails on AVX2 where two nodes share constants.
    The exporter shares those that are equal.
    """
    import onnx

    graph = proto.graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    decoders = {
        node.output[0]: list(node.input)
        for node in graph.node
        if node.op_type == "DequantizeLinear" and len(node.input) == 2
    }
    nodes: list[Any] = []
    added: list[Any] = []
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in decoders:
                codes, scale = (constants[source] for source in decoders[name])
                own = f"{name}.{len(nodes)}"
                parts = {"codes": codes, "scale": scale, "zeros": np.zeros(len(codes), codes.dtype)}
                added += [onnx.numpy_helper.from_array(array, f"{own}.{part}") for part, array in parts.items()]
                read = [f"{own}.{part}" for part in parts]
                nodes.append(onnx.helper.make_node("DequantizeLinear", read, [own], own, axis=0))
                node.input[place] = own
        if node.output[0] not in decoders:
            nodes.append(node)
    replaced = {source for sources in decoders.values() for source in sources}
    kept = [tensor for tensor in graph.initializer if tensor.name not in replaced]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *added])
