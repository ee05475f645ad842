"""The limits of memory: of a network, whose file may hold any sizes, and of a tensor, whose storage may be freed."""

import torch
from torch import Tensor

# The largest size of one value, and of all padded images: a constant, plus a multiple of what is given.
FREE_NBYTES, NBYTES_PER_BYTE = 2**30, 64


class TooLarge(ValueError):
    """The error for an image whose offsets do not fit into 32 bits, or for memory beyond reason."""


def check_memory(what: str, nbytes: int, given: int) -> None:
    """Raise TooLarge where `what` takes too much memory for so many bytes of weights and arguments, or of values."""
    if nbytes > FREE_NBYTES + NBYTES_PER_BYTE * given:
        raise TooLarge(f"{what} would take {nbytes:,} bytes, too many for the {given:,} bytes that it is made from")


def require_memory(tensor: Tensor, name: str = "a tensor") -> None:
    """Raise ValueError where a tensor on the CPU has values that are not in memory, so that operations read elsewhere.

    A storage may be freed or shrunk. Fake tensors, wrappers, and zeros that torch does not store have none. Tensors on
    other devices or in other layouts are not looked at.
    """
    if not tensor.is_cpu or tensor.layout is not torch.strided or not tensor.numel():
        return
    count = tensor.numel()
    if not tensor.is_contiguous():
        count = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    held = tensor.untyped_storage().nbytes() if tensor.data_ptr() else 0
    if held < (tensor.storage_offset() + count) * tensor.element_size():
        raise ValueError(
            f"the values of {name} {list(tensor.shape)} are not in memory: its storage is freed, too small or none"
        )
