"""The checks of every op's tensors, of their dtypes and devices, and the dtype of the arithmetic."""

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if one of the tensors is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def check_tensors(tensors: dict[str, Tensor]) -> None:
    """Check that these are tensors of DTYPES on one device; an error gives the name of the wrong one."""
    first = next(iter(tensors))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a tensor of float16, bfloat16, float32 or float64, got {kind}")
        if tensor.device != tensors[first].device:
            device = tensors[first].device
            raise ValueError(f"{name} is on {tensor.device}, {first} on {device}: move them to one device")
