"""Chooses the execution of every layer by timing all that are exact, on this machine, with the real shapes."""

import ctypes
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from str_triton.deploy.sparse.by_torch import can_be_csr, run_torch
from str_triton.deploy.sparse.choice import Choice
from str_triton.deploy.sparse.graph import Convolution, Graph, Layer
from str_triton.deploy.sparse.plan import Plan
from str_triton.deploy.sparse.structs import LINEAR

BUDGET = 0.02  # seconds for one candidate
CALLS = 30


def milliseconds(call: Callable[[], object], budget: float = BUDGET) -> float:
    """The fastest of up to CALLS calls within `budget` seconds, at least three; one call before is not counted."""
    call()
    best, begin = float("inf"), time.perf_counter()
    for count in range(CALLS):
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        best = min(best, end - start)
        if count >= 2 and end - begin > budget:
            break
    return 1e3 * best


def choose(
    graph: Graph, shapes: dict[str, tuple[int, ...]], example: Tensor, library: ctypes.CDLL | None
) -> dict[str, Choice]:
    """The fastest choice for each layer by name."""
    choices = {node.name: _by_torch(node, shapes) for node in graph.layers()}
    if library is None:
        return choices
    ours = {node.name: Choice("sparse", tiles=4 * torch.get_num_threads()) for node in graph.layers()}
    plan = Plan(graph, shapes, ours, library)
    plan.run(example)
    for node in graph.layers():
        kernel = _by_kernel(plan, node.name, library)
        if kernel is not None and kernel.ms < choices[node.name].ms:
            choices[node.name] = replace(kernel, ms_dense=choices[node.name].ms_dense)
    return choices


def _by_torch(node: Layer, shapes: dict[str, tuple[int, ...]]) -> Choice:
    """The fastest execution by torch, with the time of the fastest dense one."""
    values: dict[str, Tensor] = {name: torch.randn(shapes[name]) for name in node.inputs}
    found = []
    for execution in _executions(node, values):
        choice = Choice(execution)
        found.append(replace(choice, ms=milliseconds(lambda choice=choice: run_torch(node, values, choice))))
    dense = min(choice.ms for choice in found if choice.execution != "csr")
    return replace(min(found, key=lambda choice: choice.ms), ms_dense=dense)


def _executions(node: Layer, values: dict[str, Tensor]) -> list[str]:
    executions = ["dense"]
    if isinstance(node, Convolution) and values[node.inputs[0]].dim() == 4:
        executions.append("channels_last")
    x = values[node.inputs[0]]
    sparse = int(node.weight.count_nonzero()) < 0.5 * node.weight.numel()
    if sparse and can_be_csr(node) and x.dim() == (4 if isinstance(node, Convolution) else x.dim()):
        executions.append("csr")
    return executions


def _by_kernel(plan: Plan, name: str, library: ctypes.CDLL) -> Choice | None:
    """The microkernel's fastest cut; None if it cannot run this layer."""
    try:
        segment, number = plan.operation(name)
    except KeyError:
        return None
    threads = torch.get_num_threads()
    stage = ctypes.addressof(segment.stages[number])
    op = segment.operations[number][0]
    lanes = library.str_triton_lanes()
    if op.kind == LINEAR:  # Its tensors are gone.
        x, y = torch.randn(op.images * op.x.image), torch.empty(op.images * op.y.image)
        op.x.data, op.y.data = x.data_ptr(), y.data_ptr()
    best: Choice | None = None
    for choice in _cuts(op.length // lanes * op.images * op.planes, threads, lanes):
        plan.cut(name, choice)
        ms = milliseconds(lambda: library.str_triton_run(stage, 1, threads))
        if best is None or ms < best.ms:
            best = replace(choice, ms=ms)
    return best


def _cuts(vectors: int, threads: int, lanes: int) -> list[Choice]:
    """Candidates: widths of strips, and the pixels or the channels shared out among the threads."""
    if vectors == 0:
        return [Choice("sparse", blocks=blocks) for blocks in (threads, 4 * threads)]
    widths = [w for w in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14) if lanes == 16 or w <= 8]
    cuts = []
    for width in widths:
        strips = -(-vectors // width)
        if strips >= threads:
            cuts.append(Choice("sparse", width, tiles=-(-strips // threads) * threads))
        if strips <= 8 * threads:
            cuts.append(Choice("sparse", width, tiles=strips, blocks=threads))
    return cuts
