"""The way to run a low-rank recurrent layer, computed from its sizes. tests/ops/test_kernel_resources.py compares the
plans with the memory that the compiled kernels take."""

from dataclasses import dataclass

import torch

from str_triton.ops.low_rank_cell import CELLS, Cell
from str_triton.ops.low_rank_checks import check_precision, rnn_precision
from str_triton.ops.tensors import DTYPES

TILE_BYTES = 8 * 1024  # Of one factor, where factors are streamed.
LARGEST_RANK = 512
# Hidden sizes that cuDNN's persistent kernels serve, by whether a backward follows, if the input is not packed.
PERSISTENT_CUDNN = {False: 192, True: 128}
# Elements of the factors from which a float32 step without tensor cores takes half as long as cuDNN's, by count.
FFMA_LIMIT = 24 * 1024


@dataclass(frozen=True)
class Plan:
    """A way to run a layer. kind: "loop" or "dense" on the CPU; "resident", "streamed" or "dense" on a GPU.

    "dense" means: form the recurrent matrix once and run torch's own layer. The other fields are for GPUs: a program's
    tile of sequences, hidden units and rank, its warps, and whether it loads the inputs of a step one step ahead.
    """

    kind: str
    block_batch: int = 0
    block_hidden: int = 0
    block_rank: int = 0
    warps: int = 0
    ahead: bool = False


def low_rank_plan(
    cell: str,
    hidden_size: int,
    rank: int,
    batch_size: int,
    dtype: torch.dtype,
    *,
    shared_memory: int | None = None,
    training: bool = True,
    packed: bool = False,
    precision: str | None = None,
    chip: str = "nvidia",
) -> Plan:
    """Return the fastest way to run a low-rank recurrent layer of this size. It is computed; nothing is run.

    Args:
        cell: "gru", "lstm", "fastgrnn" or "mgu".
        hidden_size, rank, batch_size: of one layer and direction.
        dtype: float16, bfloat16, float32 or float64.
        shared_memory: bytes that one GPU program may use (`shared_memory_limit(device)`); None for the CPU.
        training: whether a backward follows.
        packed: whether the input is packed, of unequal lengths.
        precision: of float32 products on a GPU, "ieee", "tf32" or "tf32x3"; None: as the ops take it.
        chip: the GPU's kind, "nvidia", "cdna" (AMD Instinct) or "rdna" (AMD Radeon).

    Raises:
        ValueError: unknown cell or precision, or a size below 1.
        TypeError: another dtype.
    """
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(map(repr, CELLS))}, got {cell!r}")
    for name, size in (("hidden_size", hidden_size), ("rank", rank), ("batch_size", batch_size)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    check_precision(precision)
    if shared_memory is None:
        return Plan(_plan_cpu(CELLS[cell], hidden_size, rank, batch_size, training))
    of, precision = CELLS[cell], precision or rnn_precision()
    plan = layout(of, hidden_size, min(rank, LARGEST_RANK), dtype, shared_memory, training, chip)
    dense = _prefers_dense(of, hidden_size, rank, dtype, plan, training, packed, precision)
    return Plan("dense") if dense else plan


def _prefers_dense(
    cell: Cell, hidden: int, rank: int, dtype: torch.dtype, plan: Plan, training: bool, packed: bool, precision: str
) -> bool:
    """Return whether to run torch's own layer on a GPU, by counts of bytes and operations: nothing is measured yet.

    Loops that stream their factors read all of them in every step. Such loops have not been measured, so cuDNN runs
    instead. Above a quarter of full rank the two products save less than two thirds of the dense product's operations,
    which cuDNN spreads over the whole GPU. Its persistent kernels keep small matrices on the chip, as the loop does.
    """
    if not cell.has_dense:
        return False
    persistent = not packed and hidden <= PERSISTENT_CUDNN[training]
    without_tensor_cores = dtype == torch.float32 and precision == "ieee"
    slow = without_tensor_cores and (cell.gates + 1) * hidden * rank >= FFMA_LIMIT
    return persistent or slow or plan.kind == "streamed" or rank > 128 or 4 * rank > hidden


def _plan_cpu(cell: Cell, hidden_size: int, rank: int, batch_size: int, training: bool) -> str:
    """Return "dense" where torch's own layer, with the product formed once, is faster than the loop.

    Measured in float32 on one thread of an AVX-512 server processor, with hidden sizes 32 to 1024, ranks of 1/16 to all
    of them, and batches of 1 to 64; the comment at each rule gives the time of "dense" over the time of "loop" on both
    sides of it.
    """
    if not cell.has_dense:
        return "loop"
    if cell.name == "gru":
        if training and batch_size < 32:
            return "loop"  # 1.1 to 1.8 at full rank and batch 16 or 4
        if not training and batch_size < 8 and hidden_size <= 64:
            return "dense"  # 0.8 to 1.0; from 128 hidden units 1.0 to 1.2
        # 0.6 to 1.0 at full rank, 1.0 to 2.1 at half of it; on an AMD server processor 0.9 at three quarters of full
        # rank, 0.9 to 1.0 at six tenths and 0.95 to 1.1 at half.
        return "dense" if 2 * rank > hidden_size else "loop"
    if hidden_size < 256:
        return "dense"  # oneDNN's fused loop: 0.2 to 0.7, but 0.9 to 1.2 at 128 hidden units and batch 64; above, 1.1
    full = hidden_size // 4 if hidden_size < 512 else hidden_size // 2
    # 256: 0.9 to 1.2 at a quarter, 0.7 to 1.0 at half; 512: 0.9 to 1.6 at half
    return "dense" if rank > full else "loop"


def padded(hidden: int) -> int:
    """Return the hidden size that the GPU kernels get, a multiple of 16: others would spill."""
    return -(-hidden // 16) * 16


def saved_shape(cell: Cell, steps: int, batch: int, hidden: int) -> tuple[int, int, int]:
    """Return the shape of what a GPU's forward saves: whole tiles, which hold 8 or 16 sequences."""
    return steps, padded(batch), cell.saved * padded(hidden)


def layout(
    cell: Cell, hidden: int, rank: int, dtype: torch.dtype, shared_memory: int, backward: bool, chip: str = "nvidia"
) -> Plan:
    """Return how a cell's forward or backward kernel runs, for any size that it can."""
    if rank > LARGEST_RANK:
        raise ValueError(f"rank {rank} is more than the GPU kernels take ({LARGEST_RANK}): use fewer, or a dense layer")
    itemsize, block_rank, block_hidden = dtype.itemsize, _power_of_two(rank), _power_of_two(hidden)
    # Few sequences per program: a step takes as long for any number of them, and a GPU runs many programs at once.
    # NVIDIA's matrix instructions take 8, AMD's 16.
    block_batch = 8 if chip == "nvidia" else 16
    factors = (cell.gates + 1) * block_hidden * block_rank * itemsize
    # With more hidden units or larger factors, registers would spill. Reading the factors again costs less (by count:
    # benchmarks/results/kernel_resources.json).
    if block_hidden * itemsize <= 1024 and factors <= 0.6 * shared_memory:
        warps = min(16, max(4, block_hidden * itemsize // 64)) * (2 if chip == "rdna" else 1)  # whose have 32 threads
        if resident_bytes(cell, block_hidden, block_rank, block_batch, itemsize, warps) <= shared_memory:
            # A step ahead, the backward's many tiles of so many hidden units would spill.
            ahead = not (backward and (block_hidden * itemsize >= 1024 or chip == "rdna"))
            return Plan("resident", block_batch, block_hidden, block_rank, warps, ahead)
    block_hidden = min(block_hidden, 256 // itemsize, max(16, TILE_BYTES // (block_rank * itemsize)))
    # Each warp has rows of its own: none computes what another one does.
    return Plan("streamed", block_batch, block_hidden, block_rank, warps=block_hidden // 16)


def resident_bytes(cell: Cell, block_hidden: int, block_rank: int, block_batch: int, itemsize: int, warps: int) -> int:
    """Return no less shared memory than a resident kernel takes: factors, tiles that change layout, sums of warps."""
    tile, pieces = block_hidden * block_batch * max(4, itemsize), min(warps, block_hidden // 16)
    return (cell.gates + 1) * block_hidden * block_rank * itemsize + tile + pieces * block_rank * block_batch * 4


def _power_of_two(size: int) -> int:
    """Return the block that holds `size`: at least 16, which a matrix product needs."""
    return max(16, 1 << (size - 1).bit_length())
