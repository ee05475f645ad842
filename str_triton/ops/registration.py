"""Registration of ops with PyTorch: the dispatcher, autograd, torch.export and `torch.func.vmap`."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

_LIBRARY = torch.library.Library("str_triton", "FRAGMENT")


def op(schema: str, cpu: Callable[..., Any], cuda: Callable[..., Any]) -> Callable[[Callable[..., Any]], None]:
    """Register an op; decorates its fake implementation, which gives shapes, dtypes and strides alone.

    The dispatcher selects an implementation. `torch.func.vmap` loops over the batch of an op that ends in "_backward".
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    if name.endswith("_backward"):
        rule = loop(getattr(torch.ops.str_triton, name), contiguous=False)
        torch.library.register_vmap(f"str_triton::{name}", rule, lib=_LIBRARY)

    def register(fake: Callable[..., Any]) -> None:
        torch.library.register_fake(f"str_triton::{name}", fake, lib=_LIBRARY)

    return register


def function(cls: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Decorate an op's autograd Function: `torch.func.vmap` loops over the batch, and calls cost less.

    `torch.autograd.Function.apply` would work out the signature of `forward` at every call.
    """
    vars(cls.forward)["__signature__"] = inspect.signature(cls.forward)
    cls.vmap = staticmethod(loop(cls.apply))  # type: ignore[method-assign]  # what a subclass would define
    return cls


def is_strict_export() -> bool:
    """Check for `torch.export(strict=True)`, which keeps the forward of a Function without its gradient.

    A public function then calls the forward itself, whose op has a gradient (`differentiable`).
    """
    return torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting()


def differentiable(name: str, apply: Callable[..., Any]) -> None:
    """Let `apply`, called with the op's arguments, stand for str_triton::`name` where a gradient is needed.

    The public functions bring their own Functions, and call the ops inside of them. torch.export keeps the ops alone:
    without a rule of their own autograd would look into their implementations, which write into buffers.
    """
    registered = getattr(torch.ops.str_triton, name).default

    def call(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.arg_tree_leaves(*arguments)
        ):
            return apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return registered(*arguments)

    _LIBRARY.impl(name, call, "Autograd")


def loop(function: Callable[..., Any], contiguous: bool = True) -> Callable[..., Any]:
    """Return the batching rule of `function`, as `torch.autograd.Function.vmap` and `torch.library.register_vmap` ask.

    With `contiguous` the function gets contiguous tensors; without, each sample keeps its strides.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        leaves, structure = pytree.tree_flatten(arguments)
        dims = pytree._broadcast_to_and_flatten(in_dims, structure) or []

        def sample(i: int) -> Any:
            parts = [leaf if dim is None else leaf.select(dim, i) for leaf, dim in zip(leaves, dims, strict=True)]
            if contiguous:
                parts = [part.contiguous() if isinstance(part, Tensor) else part for part in parts]
            return function(*pytree.tree_unflatten(parts, structure))

        samples = [sample(i) for i in range(info.batch_size)]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        return tuple(torch.stack(results) for results in zip(*samples, strict=True)), (0,) * len(samples[0])

    return rule
