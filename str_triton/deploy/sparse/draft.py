"""What a plan will do, in order: which form every value takes, and where a copy must change it."""

import math
from collections import defaultdict
from dataclasses import dataclass, field

from str_triton.deploy.sparse.buffers import Buffers, Key
from str_triton.deploy.sparse.choice import Choice
from str_triton.deploy.sparse.graph import Convolution, Graph, Layer, Linear, MaxPool, Mean, Node, references
from str_triton.deploy.sparse.layout import Window

PLAIN = (1, 1)


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


class Draft:
    """Decides which form every value takes, and lists the tasks."""

    def __init__(self, graph: Graph, shapes: dict, choices: dict[str, Choice], kernels: bool) -> None:
        self.shapes, self.choices, self.kernels = shapes, choices, kernels
        self.nodes = {node.name: node for node in graph.nodes}
        self.images: set[str] = set()  # Values that a kernel writes into a padded buffer.
        for node in graph.nodes:
            if self._by_window(node):
                self.images.add(node.name)
        self.windows = self._windows(graph)
        self.tasks: list[Task] = []
        self._made: set[Key | str] = set()
        for node in graph.nodes:
            self._add(node)
        for name in references(graph.output):
            self._tensor(name)

    def _by_window(self, node: Node) -> bool:
        """Whether a kernel computes this node from an image to an image."""
        if not self.kernels:
            return False
        if isinstance(node, Convolution):
            shape = self.shapes[node.name]
            if self.choices[node.name].execution != "sparse" or len(shape) != 4 or math.prod(shape) == 0:
                return False
            # A residual that is broadcast, or makes the convolution's own output so, is left to torch.
            own = node.output_shape(self.shapes[node.inputs[0]])
            return all(self.shapes.get(name) == own for name in (node.name, *node.inputs[1:]))
        if isinstance(node, MaxPool) and node.inputs[0] in self.images:
            producer = self.nodes[node.inputs[0]]
            # Zeros around the image are as good as minus infinity where nothing is negative.
            return node.padding == (0, 0) or (isinstance(producer, Layer) and producer.clamp[0] >= 0)
        return False

    def _windows(self, graph: Graph) -> dict[str, Window]:
        """The window of each convolution and pool. From the end: what reads a value decides in which phases it lies."""
        wanted: dict[str, set[tuple[int, int]]] = defaultdict(set)
        windows = {}
        for node in reversed(graph.nodes):
            if node.name in self.images:
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
        if node.name in self.images:
            window = self.windows[node.name]
            reads = [self._image(node.inputs[0], window.reads)]
            reads += [self._image(name, window.phases) for name in node.inputs[1:]]
            writes = Key(node.name, window.phases)
            self.tasks.append(Task("window", node, reads, writes, window=window))
            self._made.add(writes)
        elif self.kernels and isinstance(node, Mean) and node.inputs[0] in self.images:
            self.tasks.append(Task("mean", node, [self._image(node.inputs[0], PLAIN)], makes=node.name))
        elif self.kernels and isinstance(node, Linear) and self.choices[node.name].execution == "sparse":
            self._tensor(node.inputs[0])
            self.tasks.append(Task("linear", node, tensors=node.inputs[:1], makes=node.name))
        else:
            for name in node.inputs:
                self._tensor(name)
            self.tasks.append(Task("torch", node, tensors=list(node.inputs), makes=node.name))

    def _image(self, name: str, phases: tuple[int, int]) -> Key:
        """A value in a padded buffer, in these phases."""
        key = Key(name, phases)
        if key in self._made:
            return key
        if name not in self.images:
            self.tasks.append(Task("copy", self.nodes[name], [], key, [name]))
        else:
            made = Key(name, self.windows[name].phases)
            if PLAIN not in (made.phases, phases):
                made = self._image(name, PLAIN)
            self.tasks.append(Task("copy", self.nodes[name], [made], key))
        self._made.add(key)
        return key

    def _tensor(self, name: str) -> None:
        """A value as torch's tensor."""
        if name in self.images and name not in self._made:
            source = Key(name, self.windows[name].phases)
            self.tasks.append(Task("copy", self.nodes[name], [source], makes=name))
            self._made.add(name)


def place(tasks: list[Task], buffers: Buffers) -> None:
    """Connect images that need one frame, and give each a place for as long as it is read."""
    windows = [task for task in tasks if task.window]
    for task in windows:
        buffers.connect(task.window, task.reads[0], task.writes, task.reads[1] if len(task.reads) > 1 else None)
    for task in windows:
        buffers.widen(task.window, task.reads[0], task.writes)
    last = {key: index for index, task in enumerate(tasks) for key in [*task.reads, task.writes] if key}
    for index, task in enumerate(tasks):
        if task.writes:
            buffers.take(task.writes)
        for key in {*task.reads, task.writes} - {None}:
            if last[key] == index:
                buffers.release(key)
    buffers.allocate()
