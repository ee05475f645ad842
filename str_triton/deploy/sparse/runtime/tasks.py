"""The tasks of a plan, and the places of the images that they read and write."""

from dataclasses import dataclass, field

from str_triton.deploy.sparse.graph.nodes import Node
from str_triton.deploy.sparse.runtime.buffers import Buffers, Key
from str_triton.deploy.sparse.runtime.layout import Window


@dataclass
class Task:
    """One task of a plan: the node that it computes, and the images that it reads and writes.

    Attributes:
        kind: "window", "gate", "mean" or "linear" (by the kernels), "copy" (an image to or from a tensor, to other
            phases, or some channels of it), "quantize" and "dequantize" (a tensor to codes and back), "reshape" (a
            tensor's memory in another shape), "torch".
        tensors: names of the values whose tensors it reads; makes: the one that it makes, "" if none.
    """

    kind: str
    node: Node
    reads: list[Key] = field(default_factory=list)
    writes: Key | None = None
    tensors: list[str] = field(default_factory=list)
    makes: str = ""
    window: Window | None = None
    value: str = ""  # of a copy: the value of this shape is copied
    skipped: tuple[int, int] = (0, 0)  # of a copy: the channels before it in what it reads and in what it writes

    def images(self) -> set[Key]:
        """Return the images that the task reads or writes."""
        return {key for key in (*self.reads, self.writes) if key is not None}


def place(tasks: list[Task], buffers: Buffers) -> None:
    """Connect images that need one frame, and give each a place for as long as it is read."""
    windows = [(task.window, task.reads, task.writes) for task in tasks if task.window and task.writes]
    for window, reads, writes in windows:
        buffers.connect(window, reads[0], writes, reads[1] if len(reads) > 1 else None)
    for task in tasks:
        for key in task.images():
            buffers.fit(key)
    for window, reads, writes in windows:
        buffers.widen(window, reads[0], writes)
    last = {key: index for index, task in enumerate(tasks) for key in task.images()}
    for index, task in enumerate(tasks):
        if task.writes:
            buffers.take(task.writes)
        for key in task.images():
            if last[key] == index:
                buffers.release(key)
    buffers.allocate()
