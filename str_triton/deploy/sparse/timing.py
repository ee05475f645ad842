"""Chooses the execution of every layer by timing all that are exact, on this machine, with the real shapes."""

import ctypes
import functools
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from str_triton.deploy.sparse.by_torch import can_be_csr, run_torch
from str_triton.deploy.sparse.choice import Choice
from str_triton.deploy.sparse.graph import Convolution, Graph, Input, Layer, Linear, MaxPool, Mean, Node
from str_triton.deploy.sparse.plan import Plan, Segment
from str_triton.deploy.sparse.structs import LINEAR

_DENSE = ("dense", "channels_last")
BUDGET = 0.02  # seconds for one candidate
CALLS = 30
PASSES = 30
COLD_CALLS = 5
EVICTED = 16 * 2**20  # bytes that fill the caches of several cores


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


class Cold:
    """Times calls whose weights and inputs lie in no nearby cache, as in a network whose other layers filled it."""

    def __init__(self) -> None:
        self._scratch = torch.zeros(EVICTED // 4)

    def milliseconds(self, call: Callable[[], object]) -> float:
        """The median of COLD_CALLS calls; one before is not counted."""
        call()
        seconds = []
        for _ in range(COLD_CALLS):
            self._scratch += 1
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
        return 1e3 * median(seconds)


def choose(
    graph: Graph, shapes: dict[str, tuple[int, ...]], example: Tensor, library: ctypes.CDLL | None
) -> dict[str, Choice]:
    """The choices by layer that are fastest for the whole network.

    A layer by the kernels beside one by torch costs a copy between their forms, which is weighed against the time won.
    """
    cold, example = Cold(), example.clone()  # An in-place layer may come first.
    timed = {node.name: _by_torch(node, shapes, cold) for node in graph.layers()}
    by_torch = {name: min(found.values(), key=lambda choice: choice.ms) for name, found in timed.items()}
    if library is None or not by_torch:
        return by_torch
    ours = {node.name: Choice("sparse", tiles=4 * torch.get_num_threads()) for node in graph.layers()}
    plan = Plan(graph, shapes, ours, library)
    plan.run(example)
    by_kernel = {node.name: _by_kernel(plan, node.name, library, cold) for node in graph.layers()}
    by_kernel = {
        name: replace(choice, ms_dense=by_torch[name].ms_dense) for name, choice in by_kernel.items() if choice
    }
    candidates = [_weigh(graph, shapes, by_torch, by_kernel)]
    # Beside channels_last there are no changes of format to pay, which each layer alone has to.
    candidates += [{name: found.get(e, found["dense"]) for name, found in timed.items()} for e in _DENSE]
    plans = [Plan(graph, shapes, choices, library) for choices in candidates]
    times = [milliseconds(lambda plan=plan: plan.run(example), budget=10 * BUDGET) for plan in plans]
    return candidates[times.index(min(times))]


def _weigh(
    graph: Graph,
    shapes: dict[str, tuple[int, ...]],
    by_torch: dict[str, Choice],
    by_kernel: dict[str, Choice],
) -> dict[str, Choice]:
    """Start from the kernels wherever they can run, and change one layer at a time for as long as that saves time."""
    copies = {name: _copy_milliseconds(shape) for name, shape in shapes.items()}
    readers: dict[str, set[str]] = {node.name: set() for node in graph.nodes}
    for node in graph.nodes:
        for name in node.inputs:
            readers[name].add(node.name)
    nodes = {node.name: node for node in graph.nodes}
    pools = {node.name for node in graph.nodes if isinstance(node, MaxPool | Mean)}
    choices = by_torch | by_kernel

    def ours(name: str) -> bool:
        if isinstance(nodes[name], MaxPool):
            return ours(nodes[name].inputs[0])
        return isinstance(nodes[name], Convolution) and choices[name].execution == "sparse"

    def crossings(name: str) -> float:
        """Milliseconds of the copies of one value; a pool reads whatever form there is."""
        forms = {ours(reader) for reader in readers[name] - pools}
        return copies[name] * len(forms - {ours(name)})

    def local(name: str) -> float:
        return choices[name].ms + sum(map(crossings, {name, *nodes[name].inputs}))

    changed = True
    while changed:
        changed = False
        for name in by_kernel:
            before, now = choices[name], local(name)
            choices[name] = by_torch[name] if before.execution == "sparse" else by_kernel[name]
            if local(name) < 0.99 * now:
                changed = True
            else:
                choices[name] = before
    return choices


@functools.lru_cache(maxsize=1024)
def _copy_milliseconds(shape: tuple[int, ...]) -> float:
    x = torch.ones(shape)
    y = torch.empty_like(x)
    return milliseconds(lambda: y.copy_(x), budget=BUDGET / 10)


def profile(plan: Plan, x: Tensor, passes: int = PASSES) -> list[tuple[str, str, float]]:
    """Layer, kind and milliseconds of every step of a plan: medians over passes through the network, step by step."""
    rows: dict[tuple[int, int], tuple[str, str]] = {}
    seconds: dict[tuple[int, int], list[float]] = {}
    threads = torch.get_num_threads()

    def timed(step: tuple[int, int], node: Node, task: str, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = call()
        seconds.setdefault(step, []).append(time.perf_counter() - begin)
        rows[step] = (getattr(node, "label", node.name), _kind(node, task))
        return result

    for _ in range(passes):
        values: dict[str, Any] = {}
        for index, segment in enumerate(plan.segments):
            if not isinstance(segment, Segment):
                call = functools.partial(plan.value, segment, values, x)
                values[segment.name] = timed((index, 0), segment, "torch", call)
                continue
            kept = segment.bind(values)
            for number, (task, stage) in enumerate(zip(segment.tasks, segment.stages, strict=True)):
                call = functools.partial(plan.library.str_triton_run, ctypes.addressof(stage), 1, threads)
                timed((index, number), task.node, task.kind, call)
            del kept
    return [(*rows[step], 1e3 * median(seconds[step])) for step in rows if rows[step][1] != "input"]


def _kind(node: Node, task: str) -> str:
    match node:
        case _ if task == "copy":
            return "copy"
        case Input():
            return "input"
        case Convolution():
            return "depthwise" if node.groups == node.weight.shape[0] > 1 else "convolution"
        case Linear():
            return "linear"
        case MaxPool() | Mean():
            return "pool"
    return "torch"


def _by_torch(node: Layer, shapes: dict[str, tuple[int, ...]], cold: Cold) -> dict[str, Choice]:
    """The executions by torch, with their times and that of the fastest dense one."""
    values: dict[str, Tensor] = {name: torch.randn(shapes[name]) for name in node.inputs}
    times = {}
    for execution in _executions(node, values):
        times[execution] = cold.milliseconds(functools.partial(run_torch, node, values, Choice(execution)))
    dense = min(ms for execution, ms in times.items() if execution in _DENSE)
    return {execution: Choice(execution, ms=ms, ms_dense=dense) for execution, ms in times.items()}


def _executions(node: Layer, values: dict[str, Tensor]) -> list[str]:
    executions = ["dense"]
    if isinstance(node, Convolution) and values[node.inputs[0]].dim() == 4:
        executions.append("channels_last")
    x = values[node.inputs[0]]
    sparse = int(node.weight.count_nonzero()) < 0.5 * node.weight.numel()
    if sparse and can_be_csr(node) and x.dim() == (4 if isinstance(node, Convolution) else x.dim()):
        executions.append("csr")
    return executions


def _by_kernel(plan: Plan, name: str, library: ctypes.CDLL, cold: Cold) -> Choice | None:
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
    plan.cut(name, best)
    return replace(best, ms=cold.milliseconds(lambda: library.str_triton_run(stage, 1, threads)))


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
