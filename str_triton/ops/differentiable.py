"""Autograd for registered ops that are called by themselves, as an exported program calls them.

The public functions bring their own `torch.autograd.Function`, and call the ops inside of it. torch.export keeps the
ops alone: without a rule of their own autograd would look into their implementations, which write into buffers.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor


def register(library: torch.library.Library, name: str, apply: Callable[..., Any]) -> None:
    """Let `apply`, called with the op's arguments, stand for str_triton::`name` where a gradient is needed."""
    op = getattr(torch.ops.str_triton, name).default

    def call(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.arg_tree_leaves(*arguments)
        ):
            return apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    library.impl(name, call, "Autograd")
