"""torch's own recurrent kernel for one layer, as a single op under torch.compile.

torch.compile would unroll torch's kernel into its time steps, about 25 operations each, which takes minutes to compile.
The registered op hides the kernel from the compiler. The op's backward pass runs the kernel's forward pass again,
because the kernel's saved values differ by device and cannot be stored in a graph.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def dense_layer(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    bias: bool,
    bidirectional: bool,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Run one layer of nn.GRU ("gru") or nn.LSTM ("lstm"), differentiable, with nn.GRU's casts under autocast.

    Args:
        x: [T, B, features], or with batch_sizes packed [sum of lengths, features].
        states: h, or h and c, each [directions, B, hidden_size].
        weights: weight_ih, weight_hh and the two biases (if any) of each direction.
        batch_sizes: the batch sizes of a PackedSequence. Under torch.compile they cause the kernel to be unrolled.

    Returns:
        The output [T, B, directions * hidden_size] or packed, and the last states.
    """
    if batch_sizes is not None or not torch.compiler.is_compiling():
        return _run(cell, x, states, weights, bias, bidirectional, batch_sizes)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, *others = (tensor.to(dtype) for tensor in (x, *states, *weights))
        states, weights = others[: len(states)], others[len(states) :]
    return _DenseLayer.apply(cell, bias, bidirectional, len(states), x, *states, *weights)


def _run(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: bool,
    bidirectional: bool,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:
    if x.is_cuda:
        weights = _in_one_buffer(weights)
    elif cell == "lstm" and _autocast_fails():
        with torch.autocast("cpu", enabled=False):
            x, *states = (tensor.to(weights[0].dtype) for tensor in (x, *states))
            return _run(cell, x, states, weights, bias, bidirectional, batch_sizes)
    run = getattr(torch._VF, cell)
    hx = tuple(states) if len(states) > 1 else states[0]
    # cuDNN and oneDNN can run a backward pass only in training mode, so use it whenever gradients are on.
    options = list(weights), bias, 1, 0.0, torch.is_grad_enabled(), bidirectional
    return run(x, hx, *options, False) if batch_sizes is None else run(x, batch_sizes, hx, *options)


def _autocast_fails() -> bool:
    """Return whether autocast casts to a dtype that oneDNN's LSTM does not support on this processor.

    torch's own nn.LSTM raises RuntimeError in that case, for instance for bfloat16 on a processor without AVX-512.
    """
    if not torch.is_autocast_enabled("cpu"):
        return False
    is_half = torch.get_autocast_dtype("cpu") == torch.float16
    mkldnn = torch.ops.mkldnn
    return not (mkldnn._is_mkldnn_fp16_supported() if is_half else mkldnn._is_mkldnn_bf16_supported())


def _in_one_buffer(weights: Sequence[Tensor]) -> list[Tensor]:
    """Copy the weights to views of one buffer, matrices before biases. cuDNN needs no further copy of that layout."""
    order = sorted(range(len(weights)), key=lambda i: weights[i].dim(), reverse=True)
    pieces = torch.cat([weights[i].flatten() for i in order]).split([weights[i].numel() for i in order])
    views = {i: piece.view_as(weights[i]) for i, piece in zip(order, pieces, strict=True)}
    return [views[i] for i in range(len(weights))]


# ---- registration -------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("str_triton_rnn", "FRAGMENT")
_LIBRARY.define(
    "dense_layer(str cell, Tensor x, Tensor[] states, Tensor[] weights, bool bias, bool bidirectional) -> Tensor[]"
)
_LIBRARY.define(
    "dense_layer_backward(Tensor[] grads, str cell, Tensor x, Tensor[] states, Tensor[] weights, bool bias, "
    "bool bidirectional) -> Tensor[]"
)


def _forward(
    cell: str, x: Tensor, states: list[Tensor], weights: list[Tensor], bias: bool, bidirectional: bool
) -> list[Tensor]:
    with torch.no_grad():
        return _contiguous(_run(cell, x.contiguous(), _contiguous(states), weights, bias, bidirectional, None))


def _backward(
    grads: list[Tensor],
    cell: str,
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    bias: bool,
    bidirectional: bool,
) -> list[Tensor]:
    """Return the gradients of x, the states and the weights."""
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (x.contiguous(), *_contiguous(states), *weights)]
        x, states, weights = inputs[0], inputs[1 : 1 + len(states)], inputs[1 + len(states) :]
        results = _run(cell, x, states, weights, bias, bidirectional, None)
        return _contiguous(torch.autograd.grad(results, inputs, grads))


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


_LIBRARY.impl("dense_layer", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("dense_layer_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("str_triton_rnn::dense_layer")
def _(cell, x, states, weights, bias, bidirectional):
    directions, _, hidden_size = states[0].shape
    output = x.new_empty(*x.shape[:2], directions * hidden_size)
    return [output, *(state.new_empty(state.shape) for state in states)]


@torch.library.register_fake("str_triton_rnn::dense_layer_backward")
def _(grads, cell, x, states, weights, bias, bidirectional):
    return [tensor.new_empty(tensor.shape) for tensor in (x, *states, *weights)]


class _DenseLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cell, bias, bidirectional, count, x, *tensors):
        states, weights = list(tensors[:count]), list(tensors[count:])
        ctx.save_for_backward(x, *tensors)
        ctx.options = cell, bias, bidirectional, count
        return tuple(torch.ops.str_triton_rnn.dense_layer(cell, x, states, weights, bias, bidirectional))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        (cell, bias, bidirectional, count), (x, *tensors) = ctx.options, ctx.saved_tensors
        states, weights = list(tensors[:count]), list(tensors[count:])
        gradients = torch.ops.str_triton_rnn.dense_layer_backward(
            list(grads), cell, x, states, weights, bias, bidirectional
        )
        return None, None, None, None, *gradients
