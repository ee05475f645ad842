"""What runs for inputs of one shape: buffers, and steps over them.

Values live in two forms: as torch's tensors, which torch's layers read and write, and as images in padded buffers,
which kernels.c reads and writes. A copy stands wherever the form changes.
"""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from str_triton.deploy.sparse.buffers import Buffers
from str_triton.deploy.sparse.by_torch import run_torch
from str_triton.deploy.sparse.choice import Choice
from str_triton.deploy.sparse.draft import Draft, Task, place
from str_triton.deploy.sparse.graph import Graph, Input, Node, references, substitute
from str_triton.deploy.sparse.operations import Operations
from str_triton.deploy.sparse.structs import Operation, Stage, View


class Plan:
    """A network for inputs of one shape.

    Args:
        graph: the network.
        shapes: of every value that is a tensor.
        choices: the execution of every layer.
        library: the kernels; None: no choice may be "sparse".
    """

    def __init__(
        self,
        graph: Graph,
        shapes: dict[str, tuple[int, ...]],
        choices: dict[str, Choice],
        library: ctypes.CDLL | None,
    ) -> None:
        self.graph, self.shapes, self.choices, self.library = graph, shapes, choices, library
        self.tasks = Draft(graph, shapes, choices, library is not None).tasks
        buffers = Buffers(shapes)
        place(self.tasks, buffers)
        self._operations = Operations(buffers)
        self.segments = self._segments()
        self._last_reads = _last_reads(self.segments, graph)

    def run(self, x: Tensor) -> Any:
        values: dict[str, Any] = {}
        threads = torch.get_num_threads()
        for index, segment in enumerate(self.segments):
            if isinstance(segment, Segment):
                kept = segment.bind(values)
                self.library.str_triton_run(segment.stages, len(segment.tasks), threads)
                del kept
            else:
                values[segment.name] = self.value(segment, values, x)
            for name in self._last_reads[index]:
                values.pop(name, None)
        return substitute(self.graph.output, values)

    def value(self, node: Node, values: dict[str, Any], x: Tensor) -> Any:
        """What torch computes for a node."""
        return x if isinstance(node, Input) else run_torch(node, values, self.choices.get(node.name))

    def operation(self, name: str) -> tuple["Segment", int]:
        """Where the operation of a layer that runs by the kernels stands: its segment and the number of its stage."""
        for segment in self.segments:
            if isinstance(segment, Segment):
                for number, task in enumerate(segment.tasks):
                    if task.node.name == name and task.kind in ("window", "linear"):
                        return segment, number
        raise KeyError(name)

    def cut(self, name: str, choice: Choice) -> None:
        """Cut the work of a layer anew."""
        segment, number = self.operation(name)
        self._operations.cut(segment.operations[number][0], choice)

    def _segments(self) -> list["Segment | Node"]:
        segments: list[Segment | Node] = []
        for task in self.tasks:
            if task.kind == "torch":
                segments.append(task.node)
                continue
            if not segments or not isinstance(segments[-1], Segment):
                segments.append(Segment())
            segments[-1].add(task, *self._make(task))
        for segment in segments:
            if isinstance(segment, Segment):
                segment.close(self.shapes)
        return segments

    def _make(self, task: Task) -> tuple[list[Operation], list[int]]:
        """The operations of a task, and for copies the places in the tensor where they begin."""
        choice = self.choices.get(task.node.name, Choice("sparse", tiles=64))
        match task.kind:
            case "window":
                residual = task.reads[1] if len(task.reads) > 1 else None
                made = self._operations.window(task.node, task.window, task.reads[0], task.writes, residual, choice)
                return [made], [0]
            case "mean":
                return [self._operations.mean(task.reads[0])], [0]
            case "linear":
                shape = self.shapes[task.tensors[0]]
                return [self._operations.linear(task.node, math.prod(shape[:-1]), choice)], [0]
        source = task.reads[0] if task.reads else None
        value = (source or task.writes).value
        operations, begins = zip(*self._operations.copies(value, source, task.writes), strict=True)
        return list(operations), list(begins)


class Segment:
    """Stages of operations that run in one call of the library."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.operations: list[ctypes.Array] = []
        self._begins: list[list[int]] = []

    def add(self, task: Task, operations: list[Operation], begins: list[int]) -> None:
        self.tasks.append(task)
        self.operations.append((Operation * len(operations))(*operations))
        self._begins.append(begins)

    def close(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Put the stages side by side, and note which pointers wait for a tensor."""
        self.stages = (Stage * len(self.tasks))(
            *(Stage(ctypes.addressof(array), len(array)) for array in self.operations)
        )
        self.inputs: list[tuple[View, str, int]] = []
        self.outputs: list[tuple[str, tuple[int, ...], list[tuple[View, int]]]] = []
        for task, array, begins in zip(self.tasks, self.operations, self._begins, strict=True):
            for name in task.tensors:
                self.inputs += [(op.x, name, begin) for op, begin in zip(array, begins, strict=True)]
            if task.makes:
                views = [(op.y, begin) for op, begin in zip(array, begins, strict=True)]
                self.outputs.append((task.makes, shapes[task.makes], views))

    def bind(self, values: dict[str, Any]) -> list[Tensor]:
        """Make the tensors that this segment writes and point the operations to all; what must live while they run."""
        for name, shape, views in self.outputs:
            values[name] = torch.empty(shape)
            address = values[name].data_ptr()
            for view, begin in views:
                view.data = address + begin
        kept = []
        for view, name, begin in self.inputs:
            kept.append(values[name].contiguous())
            view.data = kept[-1].data_ptr() + begin
        return kept


def _last_reads(segments: list[Segment | Node], graph: Graph) -> list[list[str]]:
    """For each segment, the values that nobody reads after it."""
    kept, seen = set(references(graph.output)), set()
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
