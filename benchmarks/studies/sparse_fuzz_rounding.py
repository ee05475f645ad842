"""A bound for the rounding of a network in float32: its results in float64 with noise in every operation.

An evaluation in float32 of a sum of n products, in any order, with or without fused operations, gives the exact sum of
the products times 1 + d, where |d| <= n * 2**-24 (to first order) is a number of each product. So every operation of
the model runs in float64 on arguments that random numbers of this size change, and on results that MOST times 2**-24
changes. Rounding itself is smaller: its signs are as random, and its sizes add up to the root of n, not to n.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDING = 2.0**-24
MOST = 4  # units in the last place: the stated error of activations, and more than one operation of arithmetic
SAMPLES = 4
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
# Parts of the names of operations that sum over an image or a part of it.
SUMS = ("norm", "softmax", "attention", "transformer", "sum", "mean", "var", "std", "pool", "prod", "dot", "mv", "rnn")


class Noise(TorchDispatchMode):
    """Changes arguments and results of operations on float64 as rounding in float32 could."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if any(argument.alias_info is not None for argument in func._schema.arguments):
            result = func(*args, **kwargs)
            if func._schema.is_mutable and isinstance(result, Tensor) and _is_double(result):
                result.copy_(self._changed(result, MOST))
            return result
        name = func._schema.name.partition("::")[2]
        count = terms(name, [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)])
        given = pytree.tree_map(lambda leaf: self._changed(leaf, count) if _is_double(leaf) else leaf, args)
        result = func(*given, **kwargs)
        return pytree.tree_map(lambda leaf: self._changed(leaf, MOST) if _is_double(leaf) else leaf, result)

    def _changed(self, x: Tensor, count: int) -> Tensor:
        noise = torch.empty(x.shape, dtype=x.dtype).uniform_(-1, 1, generator=self.generator)
        return x + x.where(x.isfinite(), 0.0) * noise * (count * ROUNDING)


def terms(name: str, tensors: Sequence[Tensor]) -> int:
    """Return how many terms the sums of an operation have at most."""
    if name == "convolution":
        weight = tensors[1]
        return max(weight.numel() // max(size, 1) for size in weight.shape[:2])
    if name in PRODUCTS:
        return max(tensors[-1].shape[-2], 1)
    if not tensors or not any(part in name for part in SUMS):
        return 1
    largest = max(tensors, key=Tensor.numel)
    return max(largest.numel() // max(len(largest), 1) if largest.dim() else 1, 1)


def _is_double(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype == torch.float64
