"""Successive tasks of a plan that run in one call of the kernels: their operations, and the tensors that they use."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from str_triton.deploy.sparse.runtime.buffers import Buffers
from str_triton.deploy.sparse.runtime.structs import Operation, Stage, View
from str_triton.deploy.sparse.runtime.tasks import Task


class Mismatch(Exception):
    """The error for a tensor that the plan was not made for: torch must run this call."""


class Segment:
    """Stages of operations that run in one call of the library for each group of images."""

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self.tasks: list[Task] = []
        self.operations: list[ctypes.Array] = []

    def makes(self, name: str) -> bool:
        """Check whether a task of this segment makes the tensor of a value."""
        return any(task.makes == name for task in self.tasks)

    def close(
        self,
        made: list[tuple[list[Operation], list[int]]],
        shapes: dict[str, tuple[int, ...]],
        buffers: Buffers,
    ) -> None:
        """Put the stages of all tasks into one array, and note which pointers depend on a tensor or on the group."""
        self.operations = [(Operation * len(operations))(*operations) for operations, _ in made]
        self.stages = (Stage * len(self.tasks))(
            *(Stage(ctypes.addressof(array), len(array)) for array in self.operations)
        )
        self._pointers: list[tuple[View, str, int]] = []  # with the name of the tensor, and the bytes from its begin
        self._moving: list[tuple[View, int, int]] = []  # with the address and the bytes of a group
        self._reads: dict[str, tuple[int, ...]] = {}
        self._writes: dict[str, tuple[int, ...]] = {}
        self._reshaped: dict[str, tuple[str, tuple[int, ...]]] = {}  # the value that is written there, and the shape
        for task, array, (_, begins) in zip(self.tasks, self.operations, made, strict=True):
            if task.kind == "reshape":
                source = task.tensors[0]
                self._reshaped[task.makes] = self._reshaped.get(source, (source,))[0], shapes[task.makes]
                continue
            for name in task.tensors:
                if name not in self._writes and name not in self._reshaped:
                    self._reads[name] = shapes[name]
                place = "residual" if task.kind == "gate" else "x"
                self._pointers += [(getattr(op, place), name, begin) for op, begin in zip(array, begins, strict=True)]
            if task.makes:
                self._writes[task.makes] = shapes[task.makes]
                self._pointers += [(op.y, task.makes, begin) for op, begin in zip(array, begins, strict=True)]
            for op in array:
                views = [*zip((op.x, op.residual), task.reads, strict=False), (op.y, task.writes)]
                for view, key in views:
                    if key in buffers.whole:
                        self._moving.append((view, view.data, buffers.size(key.value) * op.images * view.image))
        self._scratch: dict[str, Tensor] = {}
        self._begin = ctypes.addressof(self.stages)
        every = self._reads | self._writes | {name: shape for name, (_, shape) in self._reshaped.items()}
        self._dtypes = {name: torch.uint8 if buffers.size(name) == 1 else torch.float32 for name in every}
        self._strides = {name: buffers.size(name) * math.prod(shape) // self.groups for name, shape in every.items()}

    def keep_scratch(self, dropped: Sequence[str]) -> None:
        """Allocate once the values that only this segment uses; `dropped` are those that are not read after it."""
        self._reshaped_outside = {name: made for name, made in self._reshaped.items() if name not in dropped}
        outside = {source for source, _ in self._reshaped_outside.values()}
        for name in self._writes.keys() & set(dropped) - outside:
            self._scratch[name] = torch.empty(self._writes.pop(name), dtype=self._dtypes[name], device="cpu")
        self._scratch_addresses = {name: value.data_ptr() for name, value in self._scratch.items()}

    def bind(self, values: dict[str, Any]) -> list[Tensor]:
        """Make the tensors that this segment writes, and point the operations to the first group.

        Returns the tensors that must stay alive while the operations run.

        Raises:
            Mismatch: a tensor is not what the operations were made for.
        """
        held = {}
        for name, shape in self._reads.items():
            value = values[name]
            if value.shape != shape or value.dtype is not self._dtypes[name] or value.layout is not torch.strided:
                raise Mismatch(name)
            if value.device.type != "cpu" or value.is_neg():
                value = value.resolve_neg().to("cpu")
            held[name] = value.contiguous()
        for name, shape in self._writes.items():
            held[name] = values[name] = torch.empty(shape, dtype=self._dtypes[name], device="cpu")
        for name, (source, shape) in self._reshaped_outside.items():
            values[name] = held[source].view(shape)
        self._addresses = {name: value.data_ptr() for name, value in held.items()} | self._scratch_addresses
        for name, (source, _) in self._reshaped.items():
            self._addresses[name] = self._addresses[source]
        self._point(0)
        return list(held.values())

    def _point(self, group: int) -> None:
        for view, name, begin in self._pointers:
            view.data = self._addresses[name] + begin + group * self._strides[name]
        for view, address, stride in self._moving:
            view.data = address + group * stride

    def run(self, values: dict[str, Any], library: ctypes.CDLL, threads: int) -> None:
        """Run the stages on tensors in `values`, and add the results to `values`."""
        held = self.bind(values)
        for group in range(self.groups):
            if group:
                self._point(group)
            library.str_triton_run(self._begin, len(self.tasks), threads)
        del held
