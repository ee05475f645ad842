"""The start of a raw threshold: its shape, its dtype and its first value."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from str_triton.ops.thresholds import threshold_function

GRANULARITIES = ("layer", "filter", "weight", "global")
DEFAULT_THRESHOLD = 1e-4


def initial_raw(g: str, initial_threshold: float | None = None, raw_threshold_init: float | None = None) -> float:
    """Return the first value of a raw threshold; the arguments and errors are those of `new_raw_threshold`."""
    functions = threshold_function(g)
    if initial_threshold is not None and raw_threshold_init is not None:
        raise ValueError(
            f"give initial_threshold={initial_threshold} or raw_threshold_init={raw_threshold_init}, not both"
        )
    if raw_threshold_init is None:
        threshold = DEFAULT_THRESHOLD if initial_threshold is None else initial_threshold
        # On the CPU also where the default device is meta, which holds no value to read.
        raw = float(functions.inverse(torch.tensor(threshold, dtype=torch.float64, device="cpu")))
        if not math.isfinite(raw) or (raw < 0 and g == "identity"):
            raise ValueError(
                f"initial_threshold={threshold} is not a value of g={g!r}; raw_threshold_init sets s itself"
            )
    elif math.isfinite(raw_threshold_init):
        raw = raw_threshold_init
    else:
        raise ValueError(f"raw_threshold_init must be finite, got {raw_threshold_init}")
    return raw


def new_raw_threshold(
    weight: Tensor,
    *,
    granularity: str = "layer",
    g: str = "exp",
    initial_threshold: float | None = None,
    raw_threshold_init: float | None = None,
) -> nn.Parameter:
    """Return a raw threshold for a weight: one element, one per filter (dimension 0), or one per weight.

    Args:
        weight: the dense weight, [out, ...]; gives shape and device.
        granularity: "layer" or "global" (one element), "filter" ([out, 1, ...]), "weight" (weight's shape).
        g: name of the threshold function.
        initial_threshold: the threshold in units of the weights, a value that g takes; default 1e-4.
        raw_threshold_init: the raw value itself (the paper's s_init, such as -3200) instead.

    Returns:
        float32 Parameter (float64 if weight is float64).

    Raises:
        ValueError: unknown names, both initial values given, or a threshold that g never takes.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(map(repr, GRANULARITIES))}, got {granularity!r}")
    raw = initial_raw(g, initial_threshold, raw_threshold_init)
    shapes = {"filter": (weight.shape[0], *[1] * (weight.dim() - 1)), "weight": tuple(weight.shape)}
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return nn.Parameter(torch.full(shapes.get(granularity, (1,)), raw, dtype=dtype, device=weight.device))


@torch.no_grad()
def zeros_kept(weight: Tensor) -> nn.Parameter:
    """Return the raw threshold (g = "identity") that keeps a weight's zeros: inf there, else 0; it does not train."""
    raw = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    return nn.Parameter(raw.masked_fill_(weight == 0, math.inf), requires_grad=False)


def kept_apply(fn: Callable[[Tensor], Tensor], raw_threshold: nn.Parameter, first: float) -> Callable[[Tensor], Tensor]:
    """Return `fn` of a module's `_apply` (.half(), .to(dtype), .to_empty(), ...) that keeps the raw threshold usable.

    The raw threshold stays at least float32: 16 bits lose the small steps of training, and the thresholds of very
    negative raw ones. Where `fn` keeps no value, as `.to_empty()`, it becomes `first`.
    """

    def apply(tensor: Tensor) -> Tensor:
        applied = fn(tensor)
        if tensor is not raw_threshold and tensor is not raw_threshold.grad:
            return applied
        if applied.dtype.itemsize < 4:
            wide = torch.empty_like(applied, dtype=torch.float32)
            applied = wide if tensor.is_meta else wide.copy_(tensor)
        if not applied.is_meta and (tensor.is_meta or not _equal(applied, tensor.to(applied))):
            applied.fill_(first if tensor is raw_threshold else 0.0)
        return applied

    return apply


def _equal(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
