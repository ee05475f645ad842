"""The arguments of the low-rank recurrent ops: one line that names what is wrong."""

import torch
from torch import Tensor

from str_triton.ops.tensors import check_tensors

PRECISIONS = ("ieee", "tf32", "tf32x3")


def check(
    gates_x: Tensor, factors: dict[str, Tensor], biases: dict[str, Tensor | None], states: dict[str, Tensor],
    scalars: dict[str, Tensor], lengths: Tensor | None, gates: int,
) -> None:  # fmt: skip
    """Check everything but the values of lengths. The op checks these, since a traced graph has no values yet.

    factors: u, m, v. biases: None, or as many elements as `u` has rows over their number. scalars: of one element.
    """
    u = factors["u"]
    tensors = {name: tensor for name, tensor in (factors | biases | states).items() if tensor is not None}
    check_tensors({"gates_x": gates_x, **tensors, **scalars})
    for name, state in states.items():
        if state.dtype != gates_x.dtype:
            raise TypeError(f"{name} is {state.dtype}, gates_x {gates_x.dtype}: give both in one dtype")
    if gates_x.dim() != 3 or gates_x.shape[2] % gates:
        columns = f"{gates} H" if gates > 1 else "H"
        raise ValueError(f"gates_x must have shape [T, B, {columns}], got {tuple(gates_x.shape)}")
    steps, batch, width = gates_x.shape
    if steps == 0:
        raise ValueError(f"gates_x of shape {tuple(gates_x.shape)} has no time step: give at least one")
    if u.dim() != 2:
        raise ValueError(f"u must be a matrix [{width}, r], got shape {tuple(u.shape)}")
    hidden, rank = width // gates, u.shape[1]
    expected: dict[str, tuple[int, ...]] = {"u": (width, rank), "m": (rank,), "v": (hidden, rank)}
    expected |= dict.fromkeys(states, (batch, hidden))
    expected |= dict.fromkeys(biases, (width if len(biases) == 1 else hidden,))
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{name} must have shape {expected[name]} to fit gates_x of shape {tuple(gates_x.shape)} "
                f"and u of shape {tuple(u.shape)}, got {tuple(tensor.shape)}"
            )
    for name, scalar in scalars.items():
        if scalar.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {tuple(scalar.shape)}")
    if lengths is not None:
        if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64:
            kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
            raise TypeError(f"lengths must be a tensor of int64, got {kind}")
        if lengths.shape != (batch,):
            raise ValueError(f"lengths must have shape {(batch,)}, one for each sequence, got {tuple(lengths.shape)}")
        if lengths.device.type != "cpu" and lengths.device != gates_x.device:
            device = gates_x.device
            raise ValueError(f"lengths is on {lengths.device}, gates_x on {device}: move it there or to the CPU")


def check_lengths(lengths: Tensor, steps: int) -> None:
    """Check the values of `lengths`. Synchronizes with a GPU that they lie on."""
    if lengths.numel():
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest < 1 or longest > steps:
            wrong = shortest if shortest < 1 else longest
            raise ValueError(f"lengths must be from 1 to {steps}, the steps of gates_x, got {wrong}")


def check_precision(precision: str | None) -> None:
    """Check the name of a precision."""
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))} or None, got {precision!r}")


def rnn_precision() -> str:
    """Return the precision in which torch's own recurrent layers multiply float32 on a GPU: "tf32" or "ieee"."""
    # torch puts an object with this attribute in the place of the module torch.backends.cudnn.rnn.
    precision = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if precision == "tf32" else "ieee"
