"""What a plan will do, in order: which form every value takes, and where a copy must change it."""

import math
from collections import defaultdict
from dataclasses import dataclass, field

from str_triton.deploy.sparse.executions import EXECUTIONS
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.nodes import Convolution, Graph, Layer, Linear, MaxPool, Mean, Node
from str_triton.deploy.sparse.runtime.buffers import Buffers, Key
from str_triton.deploy.sparse.runtime.layout import Window
from str_triton.deploy.sparse.runtime.trial import Trial

PLAIN = (1, 1)
MOST_PHASES = 1024  # of what a strided window reads: each is a plane of its own


@dataclass
class Task:
    """One thing to do, in order: the node that it serves, and the images that it reads and writes.

    Attributes:
        kind: "window", "mean" or "linear" (by the kernels), "copy" (an image to or from a tensor, or to other phases),
            "torch".
        tensors: names of the values whose tensors it reads; makes: the one that it makes, "" if none.
    """

    kind: str
    node: Node
    reads: list[Key] = field(default_factory=list)
    writes: Key | None = None
    tensors: list[str] = field(default_factory=list)
    makes: str = ""
    window: Window | None = None

    def images(self) -> set[Key]:
        """Return the images that it touches."""
        return {*self.reads, self.writes} - {None}


class Draft:
    """Decides which form every value takes, and lists the tasks."""

    def __init__(self, graph: Graph, trial: Trial, choices: dict[str, Choice], kernels: bool) -> None:
        self.shapes, self.choices, self.kernels = trial.shapes, choices, kernels
        self.nodes = {node.name: node for node in graph.nodes}
        self.images: set[str] = set()  # Values that lie in padded buffers as images of a batch.
        self._written: set[str] = set()  # Values that a kernel makes in padded buffers.
        for node in graph.nodes:
            if self._by_window(node):
                self._written.add(node.name)
        self.windows = self._windows(graph)
        self.tasks: list[Task] = []
        self._made: set[Key | str] = set()
        for node in graph.nodes:
            if node.name not in trial.fixed:
                self._add(node)
        for name in graph.kept():
            self._tensor(name)

    def _by_kernels(self, node: Layer) -> bool:
        execution = EXECUTIONS[self.choices[node.name].execution]
        return self.kernels and execution.by_kernels and execution.fits(node, self.shapes)

    def _by_window(self, node: Node) -> bool:
        """Check whether a kernel computes this node from an image to an image."""
        if isinstance(node, Convolution | MaxPool) and math.prod(node.stride) > MOST_PHASES:
            return False
        if isinstance(node, Convolution):
            return self._by_kernels(node)
        if isinstance(node, Linear):
            return self._by_kernels(node) and math.prod(self.shapes[node.name][:-1]) > 1
        if isinstance(node, MaxPool) and self._is_image(node.inputs[0]):
            producer = self.nodes[node.inputs[0]]
            # Zeros around the image are as good as minus infinity where nothing is negative.
            return node.padding == (0, 0) or (isinstance(producer, Layer) and producer.clamp[0] >= 0)
        return False

    def _is_image(self, name: str) -> bool:
        """Check whether a kernel makes this value, and not in turned form."""
        return name in self._written and not isinstance(self.nodes[name], Linear)

    def _windows(self, graph: Graph) -> dict[str, Window]:
        """Return the window of each convolution and pool, found from the end: readers decide on a value's phases."""
        wanted: dict[str, set[tuple[int, int]]] = defaultdict(set)
        windows = {}
        for node in reversed(graph.nodes):
            if isinstance(node, Linear):
                windows[node.name] = Window(PLAIN, PLAIN, (0, 0), PLAIN, PLAIN)
            elif node.name in self._written:
                free = isinstance(node, Convolution) and node.is_pointwise and len(node.inputs) == 1
                phases = next(iter(wanted[node.name])) if free and len(wanted[node.name]) == 1 else PLAIN
                window = Window(node.kernel, node.stride, node.padding, node.dilation, phases)
                windows[node.name] = window
                wanted[node.inputs[0]].add(window.reads)
                for residual in node.inputs[1:]:
                    wanted[residual].add(phases)
            elif isinstance(node, Mean):
                wanted[node.inputs[0]].add(PLAIN)
        return windows

    def _add(self, node: Node) -> None:
        if node.name in self._written:
            window, writes = self.windows[node.name], self._own(node.name)
            reads = [self._image(Key(node.inputs[0], window.reads, writes.turned))]
            reads += [self._image(Key(name, window.phases)) for name in node.inputs[1:]]
            self._note(writes)
            self.tasks.append(Task("window", node, reads, writes, window=window))
            self._made.add(writes)
        elif isinstance(node, Mean) and self._is_image(node.inputs[0]):
            self.tasks.append(Task("mean", node, [self._image(Key(node.inputs[0], PLAIN))], makes=node.name))
        elif isinstance(node, Linear) and self._by_kernels(node):
            self._tensor(node.inputs[0])
            self.tasks.append(Task("linear", node, tensors=node.inputs[:1], makes=node.name))
        else:
            for name in node.inputs:
                self._tensor(name)
            self.tasks.append(Task("torch", node, tensors=list(node.inputs), makes=node.name))

    def _own(self, name: str) -> Key:
        """Return the form in which a kernel makes a value."""
        return Key(name, self.windows[name].phases, isinstance(self.nodes[name], Linear))

    def _note(self, key: Key) -> None:
        if not key.turned:
            self.images.add(key.value)

    def _image(self, key: Key) -> Key:
        """Have a value in this form, by a copy if need be."""
        self._note(key)
        if key in self._made:
            return key
        name = key.value
        made = self._own(name) if name in self._written else None
        if made is None or made.turned != key.turned:
            self._tensor(name)
            self.tasks.append(Task("copy", self.nodes[name], [], key, [name]))
        else:
            if PLAIN not in (made.phases, key.phases):
                made = self._image(Key(name, PLAIN))
            self.tasks.append(Task("copy", self.nodes[name], [made], key))
        self._made.add(key)
        return key

    def _tensor(self, name: str) -> None:
        """Return a value as torch's tensor."""
        if name in self._written and name not in self._made:
            source = self._own(name)
            self.tasks.append(Task("copy", self.nodes[name], [source], makes=name))
            self._made.add(name)


def place(tasks: list[Task], buffers: Buffers) -> None:
    """Connect images that need one frame, and give each a place for as long as it is read."""
    windows = [task for task in tasks if task.window]
    for task in windows:
        buffers.connect(task.window, task.reads[0], task.writes, task.reads[1] if len(task.reads) > 1 else None)
    for task in windows:
        buffers.widen(task.window, task.reads[0], task.writes)
    last = {key: index for index, task in enumerate(tasks) for key in task.images()}
    for index, task in enumerate(tasks):
        if task.writes:
            buffers.take(task.writes)
        for key in task.images():
            if last[key] == index:
                buffers.release(key)
    buffers.allocate()
