"""The registered ops of this library as ONNX operators, for PyTorch's exporter.

A loop over time becomes a Scan, so any number of steps runs and the factors of a recurrent matrix stay two products.
"""

from collections.abc import Callable
from typing import Any

import torch

from str_triton.programs import extra_named

Value = Any  # a value of the ONNX graph under construction; onnxscript is imported only when a module is exported


def onnx_translations() -> dict[Callable, Callable]:
    """Return the `custom_translation_table` for `torch.onnx.export(..., dynamo=True)` of modules with our layers.

    Raises:
        ImportError: onnxscript is not installed.
    """
    with extra_named("onnx", "exporting to ONNX"):
        import onnx
        from onnxscript import opset18

        from str_triton.deploy.onnx_export.loops import LOOPS

    op: Any = opset18  # values of a graph have ONNX's types, which Python's do not express

    def low_rank_rnn(
        cell: str,
        gates_x: Value,
        w: Value,
        v: Value,
        bias: Value,
        scale: Value,
        states: list[Value],
        lengths: Value | None,
        reverse: bool,
        save: bool,
        precision: str | None = None,
    ) -> Value:
        if lengths is not None:
            raise ValueError("sequences of different lengths (packed sequences) have no ONNX form")
        if cell not in LOOPS:
            raise ValueError(f"the cell {cell} has no ONNX form; {', '.join(LOOPS)} have one")
        scalars = [op.Gather(scale, [index]) for index in range(scale.shape[0])]
        return LOOPS[cell](gates_x, w, v, bias, *scalars, *states, direction=[int(reverse)])

    def soft_threshold(weight: Value, threshold: Value) -> Value:
        return op.Mul(op.Sign(weight), op.Relu(op.Sub(op.Abs(weight), threshold)))

    def scalar(value: int) -> Value:
        return op.Constant(value=onnx.helper.make_tensor("zero", onnx.TensorProto.UINT8, [], [value]))

    def quantize_linear(x: Value, scale: float, zero: int) -> Value:
        return op.QuantizeLinear(x, op.Constant(value_float=scale), scalar(zero))

    def dequantize_linear(codes: Value, scale: float, zero: int) -> Value:
        return op.DequantizeLinear(codes, op.Constant(value_float=scale), scalar(zero))

    def dequantize_channels(codes: Value, scale: Value) -> Value:
        return op.DequantizeLinear(codes, scale, axis=0)

    return {
        torch.ops.str_triton.quantize_linear.default: quantize_linear,
        torch.ops.str_triton.dequantize_linear.default: dequantize_linear,
        torch.ops.str_triton.dequantize_channels.default: dequantize_channels,
        torch.ops.str_triton.low_rank_rnn.default: low_rank_rnn,
        torch.ops.str_triton.soft_threshold.default: soft_threshold,
    }
