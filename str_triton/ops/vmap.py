"""`torch.func.vmap` for the ops: a loop over the batch, whose results are stacked."""

from collections.abc import Callable

import torch
from torch import Tensor


def loop(function: Callable, contiguous: bool = True) -> Callable:
    """Return the batching rule of `function`, as `torch.autograd.Function.vmap` and `torch.library.register_vmap` ask.

    With `contiguous` the function gets contiguous tensors; without, each sample keeps its strides.
    """

    def sample(argument: object, dim: object, i: int) -> object:
        if isinstance(argument, list | tuple):
            return [sample(part, part_dim, i) for part, part_dim in zip(argument, dim, strict=True)]
        if not isinstance(argument, Tensor):
            return argument
        tensor = argument if dim is None else argument.select(dim, i)
        return tensor.contiguous() if contiguous else tensor

    def rule(info, in_dims, *arguments):
        in_dims = [
            [None] * len(argument) if dim is None and isinstance(argument, list | tuple) else dim
            for argument, dim in zip(arguments, in_dims, strict=True)
        ]
        samples = [
            function(*(sample(argument, dim, i) for argument, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        return tuple(torch.stack(results) for results in zip(*samples, strict=True)), (0,) * len(samples[0])

    return rule


def register(op: str) -> None:
    """Give a registered op, "str_triton::NAME", the rule."""
    namespace, name = op.split("::")
    torch.library.register_vmap(op, loop(getattr(getattr(torch.ops, namespace), name), contiguous=False))
