"""The choice of every layer's execution: all exact executions are timed on this machine with the real shapes."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from str_triton.deploy.sparse import stopwatch
from str_triton.deploy.sparse.cost import copy_milliseconds, estimate
from str_triton.deploy.sparse.executions import EXECUTIONS, kernel_name
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.nodes import Convolution, Graph, Layer, Linear
from str_triton.deploy.sparse.graph.pointwise import Pointwise
from str_triton.deploy.sparse.graph.pools import AvgPool, MaxPool, Mean
from str_triton.deploy.sparse.runtime.images import is_row, leader
from str_triton.deploy.sparse.runtime.plan import Plan
from str_triton.deploy.sparse.runtime.segment import Segment
from str_triton.deploy.sparse.runtime.structs import LINEAR, LINEAR_BYTES
from str_triton.deploy.sparse.runtime.trial import Trial

_DENSE = ("dense", "channels_last")
CUT_LIMIT = 0.02  # seconds for timing one division of a layer's work; there are about twenty


def choose(
    graph: Graph, trial: Trial, example: Sequence[Tensor], library: ctypes.CDLL | None, *, tune: bool = True
) -> tuple[dict[str, Choice], bool]:
    """Return the choices by layer that are fastest for the whole network, and whether the machine was quiet.

    Where a layer of the kernels meets a layer of torch, a copy changes the form of the value. The time of the copy is
    weighed against the time saved.

    Args:
        graph: the network.
        trial, example: its values and its inputs for the example's shapes.
        library: the kernels, if there are any.
        tune: time the executions; False: a model of their costs decides alone.
    """
    threads = torch.get_num_threads()
    if not graph.layers():
        return {}, True
    ours = {node.name: Choice(kernel_name(node), tiles=4 * threads) for node in graph.layers()}
    plan = Plan(graph, trial, ours, library) if library is not None else None
    if not tune:
        by_torch, by_kernel = estimate(graph, trial.every(), plan, threads)
        return _weigh(graph, trial.shapes, by_torch, by_kernel, copy_milliseconds), True
    if plan is not None:
        plan.run(example)
    watch = stopwatch.Stopwatch()
    timed = {node.name: _time(node, trial, plan, library, watch) for node in graph.layers()}
    by_torch = {
        name: min((c for c in found.values() if not EXECUTIONS[c.execution].by_kernels), key=lambda c: c.ms)
        for name, found in timed.items()
    }
    kernels = {name: [c for c in found.values() if EXECUTIONS[c.execution].by_kernels] for name, found in timed.items()}
    by_kernel = {name: found[0] for name, found in kernels.items() if found}
    candidates = [_weigh(graph, trial.shapes, by_torch, by_kernel, copy_time)]
    # A layer timed alone pays for changes of the memory format. A whole network in channels_last does not.
    others = {name: choice for name, choice in by_torch.items() if choice.execution not in (*_DENSE, "csr")}
    candidates += [{name: found.get(e, found["dense"]) for name, found in timed.items()} | others for e in _DENSE]
    plans = [Plan(graph, trial, choices, library) for choices in candidates]
    calls = {index: functools.partial(plan.run, example) for index, plan in enumerate(plans)}
    times = watch.race(calls, 2 * stopwatch.ROUNDS, cold=False)
    return candidates[min(times, key=times.get)], watch.is_quiet


def _time(
    node: Layer, trial: Trial, plan: Plan | None, library: ctypes.CDLL | None, watch: stopwatch.Stopwatch
) -> dict[str, Choice]:
    """Return the executions of one layer with their times."""
    shapes, every, ours = trial.shapes, trial.every(), kernel_name(node)
    if any(name not in every for name in (*node.inputs, node.name)):  # Torch alone, untimed.
        return {"dense": Choice("dense", ms=0.0)}
    values = _random_inputs(node, trial)
    calls: dict[str, Callable[[], object]] = {}
    for name, execution in EXECUTIONS.items():
        if not execution.by_kernels and execution.fits(node, shapes):
            calls[name] = functools.partial(execution.run, node, values)
    cut = Choice("dense")
    kernel = _Stage.find(plan, node.name, library)
    if kernel is not None:
        cut = kernel.best_cut(watch)
        calls[ours] = kernel.run
    times = watch.race(calls)
    passes = {name: kernel.passes if name == ours else 1 for name in times}
    dense = min(ms for name, ms in times.items() if name in (*_DENSE, "torch_layer"))
    return {
        name: replace(cut if name == ours else Choice(name), execution=name, ms=ms * passes[name], ms_dense=dense)
        for name, ms in times.items()
    }


def _random_inputs(node: Layer, trial: Trial) -> dict[str, Tensor]:
    return {
        name: torch.randn(trial.shapes[name], dtype=torch.float32, device="cpu")
        if name in trial.shapes
        else torch.randint(256, trial.codes[name], dtype=torch.uint8, device="cpu")
        for name in node.inputs
    }


def layer_call(
    node: Layer, trial: Trial, plan: Plan, choice: Choice, library: ctypes.CDLL
) -> tuple[Callable[[], object], int]:
    """Return a call of one layer alone, as a plan executes it, and how often it runs in a call of the network."""
    kernel = _Stage.find(plan, node.name, library)
    if kernel is not None:
        kernel.hold_tensors()
        return kernel.run, kernel.passes
    return functools.partial(EXECUTIONS[choice.execution].run, node, _random_inputs(node, trial)), 1


@dataclass
class _Stage:
    """A layer's operation in a plan, which can run alone.

    Attributes:
        passes: how often it runs in a call, once for each group of images.
    """

    plan: Plan
    name: str
    library: ctypes.CDLL
    segment: Segment
    number: int
    threads: int
    passes: int

    @classmethod
    def find(cls, plan: Plan | None, name: str, library: ctypes.CDLL | None) -> "_Stage | None":
        if plan is None:
            return None
        try:
            segment, number = plan.operation(name)
        except KeyError:
            return None
        return cls(plan, name, library, segment, number, torch.get_num_threads(), segment.groups)

    def run(self) -> None:
        stage = ctypes.addressof(self.segment.stages[self.number])
        self.library.str_triton_run(stage, 1, self.threads)

    def hold_tensors(self) -> None:
        """Make tensors for an operation that reads and writes them: those of the plan's run are freed."""
        op = self.segment.operations[self.number][0]
        if op.kind in (LINEAR, LINEAR_BYTES):
            x = torch.randn(op.images * op.x.image) if op.kind == LINEAR else torch.zeros(op.images * op.x.image).byte()
            self._tensors = x, torch.empty(op.images * op.y.image)
            op.x.data, op.y.data = (tensor.data_ptr() for tensor in self._tensors)

    def best_cut(self, watch: stopwatch.Stopwatch) -> Choice:
        """Divide the work in the fastest way, and return that choice."""
        op = self.segment.operations[self.number][0]
        lanes = self.library.str_triton_lanes()
        self.hold_tensors()
        cuts = _cuts(op.length // lanes * op.images * op.planes, self.threads, lanes)
        if isinstance(self.segment.tasks[self.number].node, Pointwise):  # Limited by memory: any will do.
            cuts = cuts[-1:]
        rounds, kept = 2, cuts
        while len(kept) > 1 and rounds <= 8:
            best: dict[Choice, float] = {}
            for choice in kept:
                self.plan.cut(self.name, choice)
                best[choice] = watch.race({0: self.run}, rounds, cold=False, limit=CUT_LIMIT)[0]
            kept = sorted(best, key=best.get)[: max(1, len(kept) // 4)]
            rounds *= 2
        self.plan.cut(self.name, kept[0])
        return kept[0]


def _cuts(vectors: int, threads: int, lanes: int) -> list[Choice]:
    """Return candidates: widths of strips, and pixels or channels divided among the threads."""
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


def _weigh(
    graph: Graph,
    shapes: dict[str, tuple[int, ...]],
    by_torch: dict[str, Choice],
    by_kernel: dict[str, Choice],
    copy_milliseconds: Callable[[tuple[int, ...]], float],
) -> dict[str, Choice]:
    """Start from the kernels wherever they can run, and change one layer at a time for as long as that saves time."""
    # Turned values cost about twice as much.
    copies = {name: copy_milliseconds(shape) * (1 if len(shape) == 4 else 2) for name, shape in shapes.items()}
    readers = {name: {node.name for node in nodes} for name, nodes in graph.readers().items()}
    nodes = {node.name: node for node in graph.nodes}
    kept = set(graph.kept())
    pools = {node.name for node in graph.nodes if isinstance(node, MaxPool | AvgPool | Mean)}
    leaders = {node.name: leader(node, shapes) for node in graph.nodes}
    choices = by_torch | by_kernel

    def form(name: str) -> type | None:
        """Return the kind of layer whose padded buffers a node reads and writes; None: it uses torch's tensors."""
        while leaders[name] is not None:
            name = leaders[name]
        node = nodes[name]
        if not isinstance(node, Layer) or not EXECUTIONS[choices[name].execution].by_kernels or is_row(node, shapes):
            return None
        return Linear if isinstance(node, Linear) else Convolution

    def crossings(name: str) -> float:
        """Return the milliseconds of the copies of one value; a pool reads any form."""
        forms = {form(reader) for reader in readers[name] - pools} | ({None} if name in kept else set())
        return copies.get(name, 0.0) * len(forms - {form(name)})

    def local(name: str) -> float:
        return choices[name].ms + sum(map(crossings, {name, *nodes[name].inputs}))

    changed = True
    while changed:
        changed = False
        for name in by_kernel:
            before, now = choices[name], local(name)
            choices[name] = by_torch[name] if EXECUTIONS[before.execution].by_kernels else by_kernel[name]
            if local(name) < 0.99 * now:
                changed = True
            else:
                choices[name] = before
    return choices


@functools.lru_cache(maxsize=1024)
def copy_time(shape: tuple[int, ...]) -> float:
    """Measure the milliseconds of a copy of a float32 tensor."""
    x = torch.ones(shape, dtype=torch.float32, device="cpu")
    y = torch.empty_like(x)
    return stopwatch.Stopwatch(torch.empty(0)).race({0: lambda: y.copy_(x)}, cold=False)[0]
