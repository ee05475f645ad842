"""The plan for inputs of one shape: buffers, and the steps that use them.

A value has two forms: a tensor of torch's, which torch's layers read and write, and an image in a padded buffer, which
kernels.c reads and writes. A copy is inserted wherever the form changes.
"""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

from str_triton.deploy.sparse.executions import EXECUTIONS
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.nodes import Convolution, Graph, Input, Layer, Linear, Node, State
from str_triton.deploy.sparse.graph.quantized import QuantizedGate, QuantizedLinear, QuantizedMean
from str_triton.deploy.sparse.runtime.buffers import FLOAT, Buffers, Key
from str_triton.deploy.sparse.runtime.draft import Draft
from str_triton.deploy.sparse.runtime.integers import ByteOperations
from str_triton.deploy.sparse.runtime.segment import Segment
from str_triton.deploy.sparse.runtime.structs import Operation
from str_triton.deploy.sparse.runtime.tasks import Task, place
from str_triton.deploy.sparse.runtime.trial import Trial
from str_triton.native.threads import thread_count

GROUP_BYTES = 2**18  # the limit for a group's largest value: groups run one after the other and stay in the caches


def _fitting(graph: Graph, trial: Trial, choices: dict[str, Choice]) -> dict[str, Choice]:
    """Return the choices, with dense ones where they do not fit: they may come from a file or be for other shapes."""
    unfit = [
        node.name
        for node in graph.layers()
        if not (execution := EXECUTIONS[choices[node.name].execution]).by_kernels
        and not execution.fits(node, trial.shapes)
    ]
    return choices | dict.fromkeys(unfit, Choice("dense")) if unfit else choices


class Plan:
    """A network for inputs of one shape.

    Args:
        graph: the network.
        trial: the shapes of its values.
        choices: the execution of every layer.
        library: the kernels; None: torch runs the layers that were chosen for them.
    """

    def __init__(self, graph: Graph, trial: Trial, choices: dict[str, Choice], library: ctypes.CDLL | None) -> None:
        self.graph, self.shapes, self.library = graph, trial.every(), library
        self.codes = trial.codes.keys()
        self.choices = _fitting(graph, trial, choices)
        draft = Draft(graph, trial, self.choices, library is not None)
        self.tasks = draft.tasks
        group = _group(draft.images, self.shapes)
        self.segments = _split(self.tasks, self.shapes, group)
        whole = _crossing(self.segments) if group else set()
        self.buffers = Buffers(self.shapes, group, whole, self.codes)
        place(self.tasks, self.buffers)
        self._operations = ByteOperations(self.buffers, library.str_triton_lanes() if library is not None else 1)
        for segment in self.segments:
            if isinstance(segment, Segment):
                segment.close([self._make(task) for task in segment.tasks], self.shapes, self.buffers)
        self.fixed = trial.fixed
        self.held = trial.fixed.keys() | {node.name for node in graph.nodes if isinstance(node, State)}
        self._last_reads = _last_reads(self.segments, set(graph.kept()) | trial.fixed.keys())
        for segment, dropped in zip(self.segments, self._last_reads, strict=True):
            if isinstance(segment, Segment):
                segment.keep_scratch(dropped)
        # If no step calls torch, then autocast, gradients and torch's defaults do not matter.
        self.by_kernels = not graph.changes and all(isinstance(part, Segment | Input) for part in self.segments)

    def run(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """Return the values that are read after the last node, by name.

        Raises:
            Mismatch: a value has another shape or dtype than at the trial; nothing was changed.
        """
        values = dict(self.fixed)
        given = iter(inputs)
        threads = thread_count()
        for index, segment in enumerate(self.segments):
            if isinstance(segment, Segment):
                segment.run(values, self.library, threads)
            else:
                values[segment.name] = next(given) if isinstance(segment, Input) else self.value(segment, values)
            for name in self._last_reads[index]:
                values.pop(name, None)  # A value that only one segment uses is not in `values`.
        return values

    def value(self, node: Node, values: dict[str, Any]) -> Any:
        """Compute a node with torch."""
        if isinstance(node, Layer):
            return EXECUTIONS[self.choices[node.name].execution].run(node, values)
        return node.run(values)

    def operation(self, name: str) -> tuple["Segment", int]:
        """Return the segment, and the number of the stage in it, in which the kernels compute a layer."""
        for segment in self.segments:
            if isinstance(segment, Segment):
                for number, task in enumerate(segment.tasks):
                    if task.node.name == name and task.kind in ("window", "linear"):
                        return segment, number
        raise KeyError(name)

    def cut(self, name: str, choice: Choice) -> None:
        """Divide the work of a layer as `choice` says."""
        segment, number = self.operation(name)
        self._operations.cut(segment.operations[number][0], choice)

    def _make(self, task: Task) -> tuple[list[Operation], list[int]]:
        """Return the operations of a task, and the offset in its tensor, in bytes, at which each one begins."""
        choice = self.choices.get(task.node.name, Choice("sparse", tiles=64))
        match task.kind:
            case "window":
                residual = task.reads[1] if len(task.reads) > 1 else None
                make = self._operations.byte_window if task.node.name in self.codes else self._operations.window
                made = make(task.node, task.window, task.reads[0], task.writes, residual, choice)
                return [made], [0]
            case "mean":
                if isinstance(task.node, QuantizedMean):
                    return [self._operations.byte_mean(task.node, task.reads[0])], [0]
                return [self._operations.mean(task.reads[0])], [0]
            case "linear" if isinstance(task.node, QuantizedLinear):
                return [self._operations.byte_linear(task.node, self.shapes[task.node.name][0], choice)], [0]
            case "linear":
                images = (
                    self.buffers.group or self.shapes[task.node.name][0] if isinstance(task.node, Convolution) else 1
                )
                return [self._operations.linear(task.node, images, choice)], [0]
            case "gate" if isinstance(task.node, QuantizedGate):
                return [self._operations.byte_gate(task.node, task.reads[0], task.writes)], [0]
            case "gate":
                return [self._operations.gate(task.reads[0], task.writes)], [0]
            case "reshape":
                return [], []
        source = task.reads[0] if task.reads else None
        if task.kind in ("quantize", "dequantize"):
            copies = self._operations.coders(task.value, source, task.writes, task.node.grid)
        else:
            copy = self._operations.byte_copies if task.value in self.codes else self._operations.copies
            copies = copy(task.value, source, task.writes, task.skipped)
        operations, begins = zip(*copies, strict=True)
        return list(operations), list(begins)


def _group(names: set[str], shapes: dict[str, tuple[int, ...]]) -> int | None:
    """Return how many images run through the layers together; None: all.

    This is the largest divisor of the batch whose values stay in the caches. With a whole batch, each layer would read
    its input from memory.
    """
    batches = {shapes[name][0] for name in names}
    if len(batches) != 1:
        return None
    (batch,) = batches
    largest = max(FLOAT * math.prod(shapes[name][1:]) for name in names)
    group = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * largest <= GROUP_BYTES))
    return group if group < batch else None


def _split(tasks: list[Task], shapes: dict[str, tuple[int, ...]], group: int | None) -> list["Segment | Node"]:
    """Put successive tasks of the kernels into one segment, if they run for the same number of groups of images."""
    segments: list[Segment | Node] = []
    for task in tasks:
        last = segments[-1] if segments else None
        if task.kind == "reshape" and isinstance(last, Segment) and last.makes(task.tensors[0]):
            last.tasks.append(task)
            continue
        if task.kind in ("torch", "reshape"):
            segments.append(task.node)
            continue
        groups = 1
        is_row = task.kind == "linear" and isinstance(task.node, Linear)
        is_row |= task.kind in ("quantize", "dequantize") and not task.images()
        if group and not is_row and not any(key.turned for key in task.images()):
            groups = shapes[(task.writes or task.reads[0]).value if task.images() else task.node.name][0] // group
        if not isinstance(last, Segment) or last.groups != groups:
            segments.append(Segment(groups))
        segments[-1].tasks.append(task)
    return segments


def _crossing(segments: list["Segment | Node"]) -> set[Key]:
    """Return the images that are written in one segment and read in another: the whole batch must be in memory."""
    first: dict[Key, int] = {}
    crossing = set()
    for index, segment in enumerate(segments):
        for task in segment.tasks if isinstance(segment, Segment) else ():
            crossing |= {key for key in task.images() if first.setdefault(key, index) != index}
    return crossing


def _last_reads(segments: list["Segment | Node"], kept: set[str]) -> list[list[str]]:
    """Return, for each segment, the values that are not read after it."""
    seen: set[str] = set()
    dropped: list[list[str]] = []
    for segment in reversed(segments):
        names = set()
        if isinstance(segment, Segment):
            for task in segment.tasks:
                names |= {*task.tensors, task.makes} - {""}
        else:
            names = {segment.name, *segment.inputs}
        dropped.append(sorted(names - seen - kept))
        seen |= names
    return dropped[::-1]
