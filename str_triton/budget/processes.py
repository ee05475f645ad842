"""Communication of the processes that share a model's parameters: sums of whole numbers, minima and maxima."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from str_triton.nn.shards import is_sharded, local, shard_dimension


@dataclass(frozen=True)
class Processes:
    """The processes over which parameters are spread; by default this process alone, which holds everything.

    All processes must call every method, in the same order. It returns the same value in each, on the CPU.

    Attributes:
        group: the process group; None for one process.
        device: device of the tensors that the group's backend takes.
    """

    group: "distributed.ProcessGroup | None" = None
    device: str = "cpu"

    @classmethod
    def of(cls, parameters: Iterable[Tensor]) -> "Processes":
        """Return the processes over which these parameters are spread.

        Raises:
            ValueError: parameters that are spread over different processes, or in a way that budgets do not know.
        """
        found: dict[int, Processes] = {}
        for parameter in parameters:
            if is_sharded(parameter) and (dimension := shard_dimension(parameter)) is not None:
                mesh = parameter.device_mesh
                group = mesh.get_group(dimension)
                found[id(group)] = cls(group, mesh.device_type)
        if len(found) > 1:
            raise ValueError("the model's weights are spread over different groups of processes: use one device mesh")
        return next(iter(found.values()), ALONE)

    @property
    def rank(self) -> int:
        """The number of this process in the group."""
        return 0 if self.group is None else distributed.get_rank(self.group)

    def sum(self, numbers: Tensor) -> Tensor:
        """Return the sums over the processes. Whole numbers have the same sum in any order."""
        return self._reduced(numbers, "SUM")

    def sum_once(self, numbers: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
        """Return the sums [n] of what each process has found in its rows of n parameters, in one message.

        If every process has the whole parameter, the number of process 0 counts.
        """
        own = [
            number if self.rank == 0 or shard_dimension(parameter) is not None else torch.zeros_like(number)
            for number, parameter in zip(numbers, parameters, strict=True)
        ]
        return self.sum(torch.stack(own) if own else torch.zeros(0, dtype=torch.int64))

    def least(self, numbers: Tensor) -> Tensor:
        """Return the smallest numbers of all processes."""
        return self._reduced(numbers, "MIN")

    def most(self, numbers: Tensor) -> Tensor:
        """Return the largest numbers of all processes."""
        return self._reduced(numbers, "MAX")

    def by_rank(self, number: int) -> list[int]:
        """Return every process's number, in the order of the processes."""
        if self.group is None:
            return [number]
        numbers = torch.zeros(distributed.get_world_size(self.group), dtype=torch.int64)
        numbers[self.rank] = number
        return self.sum(numbers).tolist()

    def joined(self, values: Tensor) -> Tensor:
        """Return the concatenated values of all processes, in the order of the processes; n may differ between them."""
        if self.group is None:
            return values
        counts = self.by_rank(len(values))
        start = sum(counts[: self.rank])
        dtype = torch.float64 if values.is_floating_point() else values.dtype  # Not every backend adds 16-bit numbers.
        together = torch.zeros(sum(counts), dtype=dtype)
        together[start : start + len(values)] = values.cpu()
        return self.sum(together).to(values.dtype)

    def _reduced(self, numbers: Tensor, operation: str) -> Tensor:
        if self.group is None:
            return numbers
        reduced = numbers.to(self.device, copy=True)
        distributed.all_reduce(reduced, getattr(distributed.ReduceOp, operation), self.group)
        return reduced.cpu()


ALONE = Processes()


def nonzeros(tensors: Sequence[Tensor]) -> Tensor:
    """Return how many elements of each tensor are not zero, in all processes; int64 [tensors]."""
    return Processes.of(tensors).sum_once([local(tensor).count_nonzero() for tensor in tensors], tensors)
