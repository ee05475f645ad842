"""The low-rank time loops on a GPU: how each kernel is laid out there, and the launchers.

The launchers take and return what the CPU implementations beside the ops' registrations do.
"""

import torch
from torch import Tensor

from str_triton.ops.singular_value_threshold import _dot_precision, _no_autocast
from str_triton.ops.time_loop import CELLS, Plan, check_lengths, compute_dtype, grad_v, shared_memory_limit

# ---- the plan -----------------------------------------------------------------------------------------------------

BLOCK_BATCH = 16  # Sequences per program: few, for a step takes as long whatever their number, and programs are many.
TILE_BYTES = 8 * 1024  # Of one factor, where factors are streamed.
LARGEST_RANK = 512


def plan_gpu(
    cell: str, hidden: int, rank: int, batch: int, dtype: torch.dtype, shared_memory: int, training: bool
) -> Plan:
    """`low_rank_plan` for a GPU: how the kernels run (the backward's, if training), or that they had better not.

    The rules for "dense" come from counting bytes and operations, not from measurements on a GPU. A program that
    streams its factors reads all of them from the L2 cache in every step, at about 64 bytes a clock: 512 KiB take 5 us,
    as long as the two dependent kernels of a dense step. Above a quarter of full rank the two products save less than
    two thirds of the dense one's operations, which cuDNN spreads over the whole GPU. The batch changes neither.
    FastGRNN has no dense kernel to leave it to.
    """
    plan = layout(cell, hidden, min(rank, LARGEST_RANK), dtype, shared_memory, training)
    factors = (CELLS[cell] + 1) * hidden * rank * dtype.itemsize
    too_large = hidden > 1024 or rank > 128 or (plan.kind == "streamed" and factors > 512 * 1024)
    return Plan("dense") if cell != "fastgrnn" and (too_large or 4 * rank > hidden) else plan


def layout(cell: str, hidden: int, rank: int, dtype: torch.dtype, shared_memory: int, backward: bool) -> Plan:
    """How a cell's forward or backward kernel runs, for any size that it can."""
    if rank > LARGEST_RANK:
        raise ValueError(f"rank {rank} is more than the GPU kernels take ({LARGEST_RANK}): use fewer, or a dense layer")
    gates, itemsize, block_rank = CELLS[cell], dtype.itemsize, _power_of_two(rank)
    block_hidden = _power_of_two(hidden)
    factors = (gates + 1) * block_hidden * block_rank * itemsize
    # Of more hidden units, and of larger factors, what the compiler keeps in registers would spill; to read the factors
    # again costs less (by count: benchmarks/results/kernel_resources.json).
    largest = 512 if backward and (itemsize > 2 or cell == "fastgrnn") else 1024
    if block_hidden * itemsize <= largest and factors <= 0.6 * shared_memory:
        warps = min(16, max(4, block_hidden * itemsize // 64))
        # Fetched a step ahead, the backward's many 16-bit tiles of so many hidden units would spill.
        for stages in (1,) if backward and itemsize == 2 and block_hidden == 512 else (2, 1):
            if _resident_bytes(gates, block_hidden, block_rank, itemsize, warps, stages, backward) <= shared_memory:
                return Plan("resident", BLOCK_BATCH, block_hidden, block_rank, warps, stages)
    block_hidden = min(block_hidden, 256 // itemsize, max(16, TILE_BYTES // (block_rank * itemsize)))
    tiles = (gates + 1) * block_hidden * block_rank * itemsize
    return Plan("streamed", BLOCK_BATCH, block_hidden, block_rank, 8, 2 if 2 * tiles < shared_memory / 2 else 1)


def _resident_bytes(
    gates: int, block_hidden: int, block_rank: int, itemsize: int, warps: int, stages: int, backward: bool
) -> int:
    """No less shared memory than a resident kernel takes: the factors, a tile or two that change their layout, the sum
    over the warps, and the tiles of the step ahead. tests/ops/test_kernel_resources.py holds it to the compiler's."""
    tile = block_hidden * BLOCK_BATCH * itemsize
    ahead = (gates + 5 * backward) * (stages - 1)
    return (gates + 1) * block_hidden * block_rank * itemsize + max(2, 1 + ahead) * tile + warps * block_rank * 64


def _power_of_two(size: int) -> int:
    """The block that holds `size`: at least 16, which a matrix product needs."""
    return max(16, 1 << (size - 1).bit_length())


# ---- what the launchers share -------------------------------------------------------------------------------------


def _options(cell: str, v: Tensor, lengths: Tensor | None, reverse: bool, backward: bool) -> dict[str, object]:
    """The constants and the launch options of a kernel."""
    import triton.language as tl

    plan = layout(cell, *v.shape, v.dtype, shared_memory_limit(v.device), backward)
    return {
        "HAS_LENGTHS": lengths is not None,
        "REVERSE": reverse,
        "RESIDENT": plan.kind == "resident",
        "PRECISION": _dot_precision(v.dtype),
        "COMPUTE": tl.float64 if v.dtype == torch.float64 else tl.float32,
        "SPLIT": min(plan.warps, plan.block_hidden // 16),
        "BLOCK_B": plan.block_batch,
        "BLOCK_H": plan.block_hidden,
        "BLOCK_R": plan.block_rank,
        "num_warps": plan.warps,
        "num_stages": plan.stages,
    }


def _lengths(lengths: Tensor | None, x: Tensor) -> Tensor | None:
    """On x's device. Those that come on a GPU are not checked, which would wait for it, but kept within the tensors."""
    if lengths is None:
        return None
    if lengths.device.type == "cpu":
        check_lengths(lengths, len(x))
        return lengths.to(x.device)
    return lengths.clamp(1, len(x))


def _buffers(like: Tensor, lengths: Tensor | None, *widths: int) -> list[Tensor]:
    """[steps, batch, width] each, for a kernel that writes where sequences run; zero elsewhere."""
    new = like.new_empty if lengths is None else like.new_zeros
    return [new((*like.shape[:2], width)) for width in widths]


def _nothing(like: Tensor, count: int) -> list[Tensor]:
    return [like.new_empty(0) for _ in range(count)]


def _scratch(state: Tensor, options: dict[str, object]) -> Tensor:
    """Where a kernel keeps the state if it does not hold that of all hidden units."""
    return state.new_empty(0 if options["RESIDENT"] else state.shape, dtype=compute_dtype(state))


def _grid(batch: int) -> tuple[int]:
    return (-(-batch // BLOCK_BATCH),)


def _last(outputs: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """The state after each sequence's last processed step."""
    if reverse or lengths is None:
        return outputs[0 if reverse else -1].clone()
    return outputs[lengths - 1, torch.arange(outputs.shape[1], device=outputs.device)]


# ---- GRU ----------------------------------------------------------------------------------------------------------


def gru_forward(
    gates_x: Tensor, w: Tensor, v: Tensor, bias: Tensor, h0: Tensor, lengths: Tensor | None, reverse: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """outputs, h, p, gates (r | z | hidden_n), n."""
    from str_triton.kernels.low_rank_gru import low_rank_gru_forward_kernel as kernel

    (steps, batch, _), (hidden, rank) = gates_x.shape, v.shape
    lengths = _lengths(lengths, gates_x)
    (outputs,) = _buffers(gates_x, lengths, hidden)
    p, gates, n = _buffers(gates_x, lengths, rank, 3 * hidden, hidden) if save else _nothing(gates_x, 3)
    if h0.numel():
        options = _options("gru", v, lengths, reverse, backward=False)
        with torch.cuda.device_of(gates_x):
            kernel[_grid(batch)](
                gates_x, w, v, bias, h0, lengths, outputs, p, gates, n, _scratch(h0, options),
                steps, batch, hidden, rank, SAVE=save, **options,
            )  # fmt: skip
    return outputs, _last(outputs, lengths, reverse), p, gates, n


def gru_backward(
    grad_outputs: Tensor, grad_h: Tensor, outputs: Tensor, p: Tensor, gates: Tensor, n: Tensor, w: Tensor, v: Tensor,
    h0: Tensor, lengths: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of gates_x, w, v, bias, h0."""
    from str_triton.kernels.low_rank_gru import low_rank_gru_backward_kernel as kernel

    (steps, batch, hidden), rank = outputs.shape, v.shape[1]
    lengths = _lengths(lengths, outputs)
    grad_x, grad_a, grad_p = _buffers(outputs, lengths, 3 * hidden, hidden, rank)
    grad_h0 = torch.empty_like(h0)
    if h0.numel():
        options = _options("gru", v, lengths, reverse, backward=True)
        with torch.cuda.device_of(outputs):
            kernel[_grid(batch)](
                grad_outputs, grad_h, outputs, gates, n, w, v, h0, lengths, grad_x, grad_a, grad_p, grad_h0,
                _scratch(h0, options), steps, batch, hidden, rank, **options,
            )  # fmt: skip
    # Of R h + bias; n's part of it is behind the reset gate.
    grad_rz, grad_a, p = grad_x.flatten(0, 1)[:, : 2 * hidden], grad_a.flatten(0, 1), p.flatten(0, 1)
    with _no_autocast(outputs):
        grad_w = torch.cat((grad_rz.t() @ p, grad_a.t() @ p))
        grad_bias = torch.cat((grad_rz.sum(0), grad_a.sum(0)))
        return grad_x, grad_w, grad_v(outputs, h0, grad_p, lengths, reverse), grad_bias, grad_h0


# ---- LSTM ---------------------------------------------------------------------------------------------------------


def lstm_forward(
    gates_x: Tensor, w: Tensor, v: Tensor, bias: Tensor, h0: Tensor, c0: Tensor, lengths: Tensor | None,
    reverse: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """outputs, h, c, p, gates (i | f | g | o), cells."""
    from str_triton.kernels.low_rank_lstm import low_rank_lstm_forward_kernel as kernel

    (steps, batch, _), (hidden, rank) = gates_x.shape, v.shape
    lengths = _lengths(lengths, gates_x)
    (outputs,) = _buffers(gates_x, lengths, hidden)
    p, gates, cells = _buffers(gates_x, lengths, rank, 4 * hidden, hidden) if save else _nothing(gates_x, 3)
    c = torch.empty_like(c0)
    if h0.numel():
        options = _options("lstm", v, lengths, reverse, backward=False)
        with torch.cuda.device_of(gates_x):
            kernel[_grid(batch)](
                gates_x, w, v, bias, h0, c0, lengths, outputs, c, p, gates, cells, _scratch(c0, options),
                steps, batch, hidden, rank, SAVE=save, **options,
            )  # fmt: skip
    return outputs, _last(outputs, lengths, reverse), c, p, gates, cells


def lstm_backward(
    grad_outputs: Tensor, grad_h: Tensor, grad_c: Tensor, outputs: Tensor, p: Tensor, gates: Tensor, cells: Tensor,
    w: Tensor, v: Tensor, h0: Tensor, c0: Tensor, lengths: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of gates_x, w, v, bias, h0, c0."""
    from str_triton.kernels.low_rank_lstm import low_rank_lstm_backward_kernel as kernel

    (steps, batch, hidden), rank = outputs.shape, v.shape[1]
    lengths = _lengths(lengths, outputs)
    grad_x, grad_p = _buffers(outputs, lengths, 4 * hidden, rank)
    grad_h0, grad_c0 = torch.empty_like(h0), torch.empty_like(c0)
    if h0.numel():
        options = _options("lstm", v, lengths, reverse, backward=True)
        with torch.cuda.device_of(outputs):
            kernel[_grid(batch)](
                grad_outputs, grad_h, grad_c, cells, gates, w, v, c0, lengths, grad_x, grad_p, grad_h0, grad_c0,
                _scratch(c0, options), steps, batch, hidden, rank, **options,
            )  # fmt: skip
    flat = grad_x.flatten(0, 1)
    with _no_autocast(outputs):
        grad_w = flat.t() @ p.flatten(0, 1)
        return grad_x, grad_w, grad_v(outputs, h0, grad_p, lengths, reverse), flat.sum(0), grad_h0, grad_c0


# ---- FastGRNN -----------------------------------------------------------------------------------------------------


def fastgrnn_forward(
    gates_x: Tensor, w: Tensor, v: Tensor, bias: Tensor, scale: Tensor, h0: Tensor, lengths: Tensor | None,
    reverse: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """outputs, h, p, gates (z | c)."""
    from str_triton.kernels.low_rank_fastgrnn import low_rank_fastgrnn_forward_kernel as kernel

    (steps, batch, _), (hidden, rank) = gates_x.shape, v.shape
    lengths = _lengths(lengths, gates_x)
    (outputs,) = _buffers(gates_x, lengths, hidden)
    p, gates = _buffers(gates_x, lengths, rank, 2 * hidden) if save else _nothing(gates_x, 2)
    if h0.numel():
        options = _options("fastgrnn", v, lengths, reverse, backward=False)
        with torch.cuda.device_of(gates_x):
            kernel[_grid(batch)](
                gates_x, w, v, bias, scale, h0, lengths, outputs, p, gates, _scratch(h0, options),
                steps, batch, hidden, rank, SAVE=save, **options,
            )  # fmt: skip
    return outputs, _last(outputs, lengths, reverse), p, gates


def fastgrnn_backward(
    grad_outputs: Tensor, grad_h: Tensor, outputs: Tensor, p: Tensor, gates: Tensor, w: Tensor, v: Tensor,
    scale: Tensor, h0: Tensor, lengths: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of gates_x, w, v, bias, scale, h0."""
    from str_triton.kernels.low_rank_fastgrnn import low_rank_fastgrnn_backward_kernel as kernel

    (steps, batch, hidden), rank = outputs.shape, v.shape[1]
    lengths = _lengths(lengths, outputs)
    grad_x, grad_gates, grad_p = _buffers(outputs, lengths, hidden, 2 * hidden, rank)
    grad_h0, grad_scale = torch.empty_like(h0), scale.new_zeros((*_grid(batch), 2))
    if h0.numel():
        options = _options("fastgrnn", v, lengths, reverse, backward=True)
        with torch.cuda.device_of(outputs):
            kernel[_grid(batch)](
                grad_outputs, grad_h, outputs, gates, w, v, scale, h0, lengths,
                grad_x, grad_gates, grad_p, grad_scale, grad_h0, _scratch(h0, options),
                steps, batch, hidden, rank, **options,
            )  # fmt: skip
    with _no_autocast(outputs):
        grad_w = grad_x.flatten(0, 1).t() @ p.flatten(0, 1)
        grad_v_ = grad_v(outputs, h0, grad_p, lengths, reverse)
    return grad_x, grad_w, grad_v_, grad_gates.flatten(0, 1).sum(0), grad_scale.sum(0), grad_h0
