"""Parameters that `torch.distributed.fsdp.fully_shard` has spread over processes, as one of the processes sees them.

Each process holds some consecutive rows (dimension 0) of a sharded parameter, in the order of the processes. Tensors
that are not sharded pass through every function here as they are.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from str_triton.ops.shards import is_sharded


def shard_dimension(tensor: Tensor) -> int | None:
    """Return the dimension of its device mesh over which a tensor's rows are spread; None if each process has all.

    Raises:
        ValueError: a DTensor that is spread in another way than fully_shard's own.
    """
    if not is_sharded(tensor):
        return None
    spread = [place for place, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if not spread:
        return None
    placement = tensor.placements[spread[0]]
    if len(spread) > 1 or not placement.is_shard(0) or type(placement).__name__ != "Shard":
        raise ValueError(
            f"a parameter of shape {list(tensor.shape)} has placements {tensor.placements}: budgets and controllers "
            "know parameters that fully_shard spreads by their dimension 0, not tensor-parallel or other ones"
        )
    return spread[0]


def rows_here(tensor: Tensor) -> slice:
    """Return which rows of a tensor this process holds."""
    if not is_sharded(tensor) or (dimension := shard_dimension(tensor)) is None:
        return slice(None)
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    share = -(-rows // mesh.size(dimension))  # As torch.chunk: the last processes may hold fewer rows, or none.
    start = min(share * mesh.get_local_rank(dimension), rows)
    return slice(start, min(start + share, rows))


def flat_range(tensor: Tensor) -> tuple[int, int]:
    """Return where this process's elements begin and end among the flattened tensor's."""
    start, stop, _ = rows_here(tensor).indices(tensor.shape[0])
    row = tensor.shape[1:].numel()
    return start * row, stop * row


def local(tensor: Tensor) -> Tensor:
    """Return this process's rows of a tensor, detached, in the same memory."""
    if not is_sharded(tensor):
        return tensor.detach()
    shard_dimension(tensor)
    with torch.no_grad():  # here alone: a controller asks for hundreds of plain tensors at each step
        return tensor.to_local().detach()


def full(tensor: Tensor) -> Tensor:
    """Return all of a tensor, gathered from the processes, each of which must call this; differentiable."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_raw(raw: Tensor, weight: Tensor) -> Tensor:
    """Return the part of a raw threshold that belongs to this process's rows of a weight, detached.

    One element for a raw threshold of one, which all processes must ask for at the same time.
    """
    if raw.numel() == 1 or (is_sharded(raw) and not is_sharded(weight)):
        with torch.no_grad():
            return full(raw).detach()
    return local(raw) if is_sharded(raw) else raw.detach()[rows_here(weight)]


@torch.no_grad()
def store(parameter: Tensor, value: Tensor) -> None:
    """Write a full value into a parameter, in place; process 0's into all shards, so that they are of one value."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.contiguous(), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


@torch.no_grad()
def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a value, which every process has whole or which is spread over them, spread as the parameter is."""
    if not is_sharded(parameter):
        return value
    if not is_sharded(value):
        from torch.distributed.tensor import DTensor, Replicate

        value = DTensor.from_local(
            value.to(parameter.device),
            parameter.device_mesh,
            [Replicate()] * parameter.device_mesh.ndim,
            run_check=False,
        )
    return value.redistribute(parameter.device_mesh, parameter.placements)


def reshard(model: nn.Module) -> None:
    """Let the modules that `fully_shard` manages hold their shards.

    After a forward without a backward, some modules (by default the outermost one) hold gathered copies instead, which
    the optimizer does not see.
    """
    for module in _managed(model):
        module.reshard()


@torch.no_grad()
def gather(model: nn.Module) -> None:
    """Let every process hold all parameters of a model, and end what `fully_shard` does with it; in place."""
    managed = _managed(model)
    reshard(model)
    for module in managed:
        state = module._get_fsdp_state()  # torch has no public way back.
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        module.__class__ = type(module).__mro__[2]  # Behind the class that fully_shard has made, and FSDPModule.
    whole: dict[int, nn.Parameter] = {}
    for module in model.modules() if managed else ():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_sharded(parameter):
                if id(parameter) not in whole:
                    whole[id(parameter)] = nn.Parameter(full(parameter.detach()), parameter.requires_grad)
                module._parameters[name] = whole[id(parameter)]


def _managed(model: nn.Module) -> list[Any]:
    """Return the modules that `fully_shard` was called with.

    Raises:
        ValueError: a module is wrapped by FullyShardedDataParallel, which hides the parameters.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    modules = list(model.modules())
    if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in modules):
        raise ValueError(
            "FullyShardedDataParallel flattens the parameters: use torch.distributed.fsdp.fully_shard instead"
        )
    return [module for module in modules if isinstance(module, fsdp.FSDPModule)]
