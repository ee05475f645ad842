"""Soft thresholds of a DTensor: each process thresholds the elements that it holds."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Return whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh")  # An import of torch.distributed.tensor takes half a second.


def threshold_shards(threshold: Callable[[Tensor, Tensor], Tensor], x: Tensor, raw: Tensor) -> Tensor:
    """Return threshold(x, raw), an elementwise op of x, as a DTensor with x's placements; differentiable.

    Args:
        threshold: the op for plain tensors.
        x: a DTensor, sharded in any dimensions.
        raw: a DTensor on the same mesh, or a plain tensor that is the same in all processes. It reaches each process as
            far as the process's elements of x need it, and its gradients are summed over the processes.

    Raises:
        ValueError: x is a plain tensor and raw a DTensor, x has pending sums (Partial), or the meshes differ.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not is_sharded(x):
        raise ValueError("raw_threshold is a DTensor and x is not: shard both, or neither")
    mesh = x.device_mesh
    if any(placement.is_partial() for placement in x.placements):
        raise ValueError(f"x has placements {x.placements}: redistribute it, since a sum of parts has no threshold yet")
    if not is_sharded(raw):
        raw = DTensor.from_local(raw, mesh, [Replicate()] * mesh.ndim, run_check=False)
    elif raw.device_mesh != mesh:
        raise ValueError(f"raw_threshold is on {raw.device_mesh}, x on {mesh}: shard them alike")
    needed = [
        placement if raw.numel() > 1 and (raw.shape == x.shape or placement.is_shard(0)) else Replicate()
        for placement in x.placements
    ]
    gradients = [
        Partial() if need.is_replicate() and not placement.is_replicate() else need
        for need, placement in zip(needed, x.placements, strict=True)
    ]
    local = threshold(x.to_local(), raw.redistribute(mesh, needed).to_local(grad_placements=gradients))
    return DTensor.from_local(local, mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())
