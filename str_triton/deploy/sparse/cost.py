"""A model of the time that executions take, from a few rates of this machine, measured once in a process."""

import ctypes
import functools
import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from str_triton.deploy.sparse.executions import EXECUTIONS, kernel_name
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.nodes import Convolution, Graph, Layer
from str_triton.deploy.sparse.graph.pointwise import Pointwise
from str_triton.deploy.sparse.graph.quantized import QuantizedConvolution, QuantizedLinear
from str_triton.deploy.sparse.graph.recurrent import Recurrent
from str_triton.deploy.sparse.runtime.images import is_row
from str_triton.deploy.sparse.runtime.plan import Plan
from str_triton.deploy.sparse.runtime.structs import CONVOLUTION, CONVOLUTION_BYTES, LINEAR, LINEAR_BYTES

BYTES = 10e9  # bytes that a copy moves in a second
CALL = 5e-3  # milliseconds of one call of a torch operation
# The kernels' multiplications a second relative to torch's dense ones, measured on two processors. For bytes: quads.
RATES = {CONVOLUTION: 0.45, LINEAR: 0.04, CONVOLUTION_BYTES: 0.15, LINEAR_BYTES: 0.04}
# Torch's multiplications a second in depthwise layers, and in linear layers for one row, in the same unit.
DEPTHWISE, ONE_ROW = 0.1, 0.2

# How many times as long torch takes for a layer on integers, whose codes it converts to floating point and back.
REFERENCE = 8


@functools.cache
def dense_rate(threads: int) -> float:
    """Return torch's multiplications per millisecond in a dense convolution of usual size."""
    x = torch.randn((1, 128, 28, 28), dtype=torch.float32, device="cpu")
    weight = torch.randn((128, 128, 3, 3), dtype=torch.float32, device="cpu")
    ms = _fastest(lambda: F.conv2d(x, weight, padding=1))
    return weight.numel() * 28 * 28 / ms


def _fastest(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return 1e3 * min(seconds)


def estimate(
    graph: Graph, shapes: dict[str, tuple[int, ...]], plan: Plan | None, threads: int
) -> tuple[dict[str, Choice], dict[str, Choice]]:
    """Return the choices by torch and, where they can run, by the kernels, with estimated milliseconds."""
    rate = dense_rate(threads)
    by_torch, by_kernel = {}, {}
    for node in graph.layers():
        shape = shapes.get(node.name)
        if shape is None:
            by_torch[node.name] = Choice("dense", ms=0.0)
            continue
        if isinstance(node, Recurrent):
            by_torch[node.name] = Choice("loop" if EXECUTIONS["loop"].fits(node, shapes) else "dense")
            continue
        pixels = _pixels(node, shape)
        slow = 1.0
        if isinstance(node, Convolution) and node.is_depthwise:
            slow = DEPTHWISE
        elif is_row(node, shapes):
            slow = ONE_ROW
        dense = CALL + node.weight.numel() * pixels / (rate * slow)
        if isinstance(node, QuantizedConvolution | QuantizedLinear):
            dense *= REFERENCE
        if isinstance(node, Pointwise):
            dense = CALL + copy_milliseconds(shape)
        by_torch[node.name] = Choice("dense", ms=dense, ms_dense=dense)
        found = _operation(plan, node)
        if found is not None:
            kind, vectors, nonzeros = found
            # Each output costs about as much as two weights.
            weights = nonzeros + 2 * node.weight.shape[0]
            ms = weights * pixels / (rate * RATES[kind])
            by_kernel[node.name] = replace(_cut(vectors, threads, ms, dense), execution=kernel_name(node))
    return by_torch, by_kernel


def copy_milliseconds(shape: tuple[int, ...]) -> float:
    """Return an estimate of how long it takes to read and write a value."""
    return 1e3 * math.prod(shape) * 8 / BYTES


def _pixels(node: Layer, shape: tuple[int, ...]) -> int:
    return math.prod(shape) // node.weight.shape[0]


def _operation(plan: Plan | None, node: Layer) -> tuple[int, int, int] | None:
    """Return the kind of a layer's operation in a plan, its vectors of pixels, and its weights that are not zero."""
    try:
        segment, number = plan.operation(node.name) if plan is not None else (None, 0)
    except KeyError:
        return None
    if segment is None:
        return None
    op = segment.operations[number][0]
    first = ctypes.cast(op.first, ctypes.POINTER(ctypes.c_int32))
    return op.kind, op.length // plan.library.str_triton_lanes() * op.images * op.planes, first[op.channels]


def _cut(vectors: int, threads: int, ms: float, dense: float) -> Choice:
    if vectors == 0:
        return Choice("sparse", blocks=4 * threads, ms=ms, ms_dense=dense)
    width = min(8, max(1, vectors // threads))
    strips = -(-vectors // width)
    if strips <= 2 * threads:
        return Choice("sparse", width, tiles=strips, blocks=threads, ms=ms, ms_dense=dense)
    return Choice("sparse", width, tiles=-(-strips // threads) * threads, ms=ms, ms_dense=dense)
