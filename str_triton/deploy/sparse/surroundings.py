"""The state of torch around a call: autocast, defaults, tracers; and tensors that calls must not change."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from str_triton.native.threads import is_forked


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Compute in float32 on the CPU without gradients, whatever autocast and torch's defaults say.

    In a forked child, torch uses one thread.
    """
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if is_forked() and threads > 1:
            torch.set_num_threads(1)
            stack.callback(torch.set_num_threads, threads)
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        if dtype is not torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def context() -> contextlib.AbstractContextManager:
    """Return `plain_torch`, or less where autocast, the default dtype and the process are as usual."""
    is_usual = torch.get_default_dtype() is torch.float32 and not torch.is_autocast_enabled("cpu") and not is_forked()
    if not is_usual:
        return plain_torch()
    return torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext()


def is_watched() -> bool:
    """Check whether tensors may have no memory of their own.

    This is possible in torch.compile, torch.export, a dispatch mode (fake tensors, make_fx), torch.func and torch.jit.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
    )


def refuse_gradients(tensors: Sequence[Any]) -> None:
    """Raise ValueError within torch.func.grad and jvp, which would otherwise return a derivative of zero."""
    if any(isinstance(t, Tensor) and torch._C._functorch.is_gradtrackingtensor(t) for t in tensors):
        raise ValueError("a network made by compile_sparse has no derivative: differentiate the model it was made from")


def share_memory(tensors: Sequence[Tensor]) -> bool:
    """Check whether two tensors with elements lie in one storage."""
    places = [tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()]
    return len(set(places)) < len(places)
