"""What the low-rank recurrent ops share on every device: the checks of their arguments, and the plan.

The registered ops see one dtype and contiguous tensors: w = u m, so that R h = w (v^T h), and v, both in gates_x's
dtype.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from str_triton.ops.soft_threshold import DTYPES

CELLS = {"gru": 3, "lstm": 4, "fastgrnn": 1}  # and how many rows of the recurrent matrix belong to a hidden unit


# ---- what CPU and GPU share ----------------------------------------------------------------------------------------


def grad_v(outputs: Tensor, h0: Tensor, grad_p: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """dL/dv [hidden, r]: the sum over the steps of h_prev^T grad_p, without a copy of the previous states.

    grad_p [steps, batch, r] is 0 at padding; lengths as the op got them.
    """
    earlier, later = (outputs[1:], grad_p[:-1]) if reverse else (outputs[:-1], grad_p[1:])
    begin = grad_p[-1] if reverse else grad_p[0]
    if reverse and lengths is not None:
        begin = grad_p[lengths.to(grad_p.device) - 1, torch.arange(grad_p.shape[1], device=grad_p.device)]
    total = h0.t() @ begin
    return total.addmm_(earlier.flatten(0, 1).t(), later.flatten(0, 1))


def kept(gates_x: Tensor) -> Tensor:
    """gates_x for the backward: of a GPU, which saves the gates themselves, it need not live on."""
    return gates_x if gates_x.device.type == "cpu" else gates_x.new_empty(0)


def saved_shape(gates_x: Tensor, width: int, save: bool) -> tuple[int, ...]:
    """Of what the forward saves on a GPU, and the CPU does not."""
    return (*gates_x.shape[:2], width) if save and gates_x.device.type != "cpu" else (0,)


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


# ---- the plan -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How to run a layer. kind: "loop" or "dense" on the CPU; "resident", "streamed" or "dense" on a GPU.

    "dense" means: form the recurrent matrix once and let torch's own layer run. The rest concerns GPUs alone: a
    program's tile of sequences, hidden units and rank, its warps, and the stages of its loads.
    """

    kind: str
    block_batch: int = 0
    block_hidden: int = 0
    block_rank: int = 0
    warps: int = 0
    stages: int = 0


@torch.compiler.assume_constant_result
def shared_memory_limit(device: torch.device) -> int | None:
    """Bytes that one program may use on this GPU, for `low_rank_plan`; None for the CPU."""
    if device.type == "cpu":
        return None
    properties = torch.cuda.get_device_properties(device)
    # What a program has to ask for; ROCm knows no such thing.
    return getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block


def low_rank_plan(
    cell: str,
    hidden_size: int,
    rank: int,
    batch_size: int,
    dtype: torch.dtype,
    *,
    shared_memory: int | None = None,
    training: bool = True,
) -> Plan:
    """The fastest way to run a low-rank recurrent layer of this size; a pure function of its arguments.

    Args:
        cell: "gru", "lstm" or "fastgrnn".
        hidden_size, rank, batch_size: of one layer and direction.
        dtype: float16, bfloat16, float32 or float64.
        shared_memory: bytes that one GPU program may use (`shared_memory_limit(device)`); None for the CPU.
        training: whether a backward follows.

    Raises:
        ValueError: unknown cell, or a size below 1.
        TypeError: another dtype.
    """
    if cell not in CELLS:
        raise ValueError(f"cell must be 'gru', 'lstm' or 'fastgrnn', got {cell!r}")
    for name, size in (("hidden_size", hidden_size), ("rank", rank), ("batch_size", batch_size)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    if shared_memory is not None:
        from str_triton.ops.low_rank_triton import plan_gpu

        return plan_gpu(cell, hidden_size, rank, batch_size, dtype, shared_memory, training)
    return Plan(_plan_cpu(cell, hidden_size, rank, batch_size, training))


def _plan_cpu(cell: str, hidden_size: int, rank: int, batch_size: int, training: bool) -> str:
    """Where torch's own layer, the product formed once, has the edge over the loop.

    Measured in float32 on one thread of an AVX-512 server processor, with hidden sizes 32 to 1024, ranks of 1/16 to all
    of them, and batches of 1 to 64; beside each rule the time of "dense" over that of "loop" on both sides of it.
    """
    if cell == "fastgrnn":  # torch has none
        return "loop"
    if cell == "gru":
        if training and batch_size < 32:
            return "loop"  # 1.1 to 1.8 at full rank and batch 16 or 4
        if not training and batch_size < 8 and hidden_size <= 64:
            return "dense"  # 0.8 to 1.0; from 128 hidden units 1.0 to 1.2
        return "dense" if 4 * rank > 3 * hidden_size else "loop"  # 0.6 to 1.0 at full rank, 1.0 to 2.1 at half of it
    if hidden_size < 256:
        return "dense"  # oneDNN's fused loop: 0.2 to 0.7, but 0.9 to 1.2 at 128 hidden units and batch 64; above, 1.1
    full = hidden_size // 4 if hidden_size < 512 else hidden_size // 2
    return (
        "dense" if rank > full else "loop"
    )  # 256: 0.9 to 1.2 at a quarter, 0.7 to 1.0 at half; 512: 0.9 to 1.6 at half


# ---- arguments ----------------------------------------------------------------------------------------------------


def check(
    gates_x: Tensor,
    factors: dict[str, Tensor],
    biases: dict[str, Tensor | None],
    states: dict[str, Tensor],
    lengths: Tensor | None,
    gates: int,
) -> None:
    """Everything but the values of lengths, which the op itself reads: a graph that is traced has none yet.

    factors: u, m, v (and scalars of one element, by any other name). biases: of gates H elements each, or None.
    """
    others = {**factors, **{name: bias for name, bias in biases.items() if bias is not None}, **states}
    for name, tensor in {"gates_x": gates_x, **others}.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a tensor of float16, bfloat16, float32 or float64, got {kind}")
        if tensor.device != gates_x.device:
            raise ValueError(f"{name} is on {tensor.device}, gates_x on {gates_x.device}: move them to one device")
    for name, state in states.items():
        if state.dtype != gates_x.dtype:
            raise TypeError(f"{name} is {state.dtype}, gates_x {gates_x.dtype}: give both in one dtype")
    if gates_x.dim() != 3 or gates_x.shape[2] % gates:
        width = f"{gates} H" if gates > 1 else "H"
        raise ValueError(f"gates_x must have shape [T, B, {width}], got {tuple(gates_x.shape)}")
    steps, batch, width = gates_x.shape
    if steps == 0:
        raise ValueError(f"gates_x of shape {tuple(gates_x.shape)} has no time step: give at least one")
    _check_shapes(gates_x, factors, others, width // gates, gates)
    if lengths is not None:
        if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64:
            kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
            raise TypeError(f"lengths must be a tensor of int64, got {kind}")
        if lengths.shape != (batch,):
            raise ValueError(f"lengths must have shape {(batch,)}, one for each sequence, got {tuple(lengths.shape)}")
        if lengths.device.type != "cpu" and lengths.device != gates_x.device:
            raise ValueError(
                f"lengths is on {lengths.device}, gates_x on {gates_x.device}: move it there or to the CPU"
            )


def _check_shapes(
    gates_x: Tensor, factors: dict[str, Tensor], others: dict[str, Tensor], hidden: int, gates: int
) -> None:
    u, batch = factors["u"], gates_x.shape[1]
    if u.dim() != 2:
        raise ValueError(f"u must be a matrix [{gates * hidden}, r], got shape {tuple(u.shape)}")
    rank = u.shape[1]
    expected = {"u": (gates * hidden, rank), "m": (rank,), "v": (hidden, rank), "h0": (batch, hidden)}
    expected |= {"c0": (batch, hidden), "bias": (gates * hidden,), "bias_gate": (hidden,), "bias_update": (hidden,)}
    for name, tensor in others.items():
        if name not in expected:
            if tensor.numel() != 1:
                raise ValueError(f"{name} must have one element, got shape {tuple(tensor.shape)}")
        elif tensor.shape != expected[name]:
            raise ValueError(
                f"{name} must have shape {expected[name]} to fit gates_x of shape {tuple(gates_x.shape)} "
                f"and u of shape {tuple(u.shape)}, got {tuple(tensor.shape)}"
            )


def check_lengths(lengths: Tensor, steps: int) -> None:
    """Their values. On a GPU that waits for it."""
    if lengths.numel():
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest < 1 or longest > steps:
            wrong = shortest if shortest < 1 else longest
            raise ValueError(f"lengths must be from 1 to {steps}, the steps of gates_x, got {wrong}")


def prepare(gates_x: Tensor, u: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gates_x, w = u m and v as the registered ops expect them."""
    w = (u * m).to(gates_x.dtype)
    return gates_x.contiguous(), w.contiguous(), v.to(gates_x.dtype).contiguous()
