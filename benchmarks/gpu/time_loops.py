"""Low-rank recurrent layers beside cuDNN, forward and backward, at eight sizes in bfloat16 and float32 (TF32).

The layers take turns: "layer" is the low-rank layer as a user has it, which follows the plan (and may run cuDNN on the
product); "kernels" is the same layer made to run the Triton kernels; "cudnn" is torch's. A round's ratio is cuDNN's
time over ours: above 1 ours is faster; the median is over the rounds. What bounds the kernels stands beside them: the
time per step, for steps depend on one another, and the bytes that they must move.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.gpu.part import Session
from benchmarks.timing import alternating, median_ratio
from str_triton import LowRankGRU, LowRankLSTM, Plan, low_rank_plan, shared_memory_limit

INPUT_SIZE = 32
LAYERS = {"gru": (LowRankGRU, nn.GRU), "lstm": (LowRankLSTM, nn.LSTM)}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Blocks of hidden units that the two kernels read or write at each step and sequence: gates_x, outputs and what is
# saved; then the gradient, outputs, what is saved, the gradients of gates_x and, of a GRU, of n's part of R h.
BLOCKS = {"gru": 3 + 1 + 4 + 1 + 1 + 4 + 3 + 1, "lstm": 4 + 1 + 5 + 1 + 6 + 4}


class Size(NamedTuple):
    """A layer, its input, and the dtype of both."""

    cell: str
    hidden_size: int
    rank: int
    steps: int
    batch_size: int
    dtype: str


SIZES = (
    Size("gru", 512, 32, 200, 64, "bfloat16"),
    Size("gru", 512, 32, 200, 256, "bfloat16"),
    Size("gru", 256, 16, 200, 64, "bfloat16"),
    Size("lstm", 256, 16, 200, 64, "bfloat16"),
    Size("gru", 1024, 64, 200, 64, "bfloat16"),
    Size("gru", 256, 16, 200, 64, "float32"),
    Size("lstm", 256, 16, 200, 64, "float32"),
    Size("gru", 100, 10, 200, 64, "float32"),
)
TINY = (Size("gru", 8, 2, 3, 2, "bfloat16"), Size("lstm", 8, 2, 3, 2, "float32"))


def run(session: Session) -> None:
    torch.manual_seed(0)
    torch.backends.cudnn.rnn.fp32_precision = "tf32"  # torch's default, which the low-rank ops follow
    session.report(bandwidth=bandwidth(session), rows=[])
    failed = []
    for size in session.pick(SIZES, TINY):
        try:
            row = measure(size, session)
        except Exception as error:  # A size that a card refuses must not hide the sizes after it.
            failed.append(size)
            row = size._asdict() | {"error": f"{type(error).__name__}: {error}"}
        session.report(rows=[*session.result["rows"], row])
    if failed:
        raise SystemExit(f"sizes that failed: {failed}")


def measure(size: Size, session: Session) -> dict[str, object]:
    dtype, device = DTYPES[size.dtype], session.device
    x = torch.randn(size.steps, size.batch_size, INPUT_SIZE, device=device, dtype=dtype)
    grad = torch.randn(size.steps, size.batch_size, size.hidden_size, device=device, dtype=dtype)
    ours, theirs = LAYERS[size.cell]
    low_rank = ours(INPUT_SIZE, size.hidden_size, max_rank=size.rank, factorize="recurrent").to(device, dtype)
    cudnn = theirs(INPUT_SIZE, size.hidden_size).to(device, dtype)
    seconds = alternating(
        {
            "layer": training_step(low_rank, x, grad),
            "kernels": training_step(low_rank, x, grad, kernels=True),
            "cudnn": training_step(cudnn, x, grad),
        },
        session.pick(15, 1),
        warmup=session.pick(3, 0),
        calls=session.pick(3, 1),
    )
    moved = BLOCKS[size.cell] * size.steps * size.batch_size * size.hidden_size * dtype.itemsize
    sizes, limit = (size.hidden_size, size.rank, size.batch_size), shared_memory_limit(x.device)
    return {
        **size._asdict(),
        "plan": low_rank_plan(size.cell, *sizes, dtype, shared_memory=limit).kind,
        **{f"{name}_ms": 1e3 * median(times) for name, times in seconds.items()},
        "cudnn_over_layer": median_ratio(seconds, "cudnn", "layer"),
        "cudnn_over_kernels": median_ratio(seconds, "cudnn", "kernels"),
        "microseconds_per_step": 1e6 * median(seconds["kernels"]) / size.steps,
        "share_of_bandwidth": moved / session.result["bandwidth"] / median(seconds["kernels"]),
    }


@contextmanager
def kernels_only() -> Iterator[None]:
    """Make the layers run the ops, whatever the plan says."""
    with mock.patch("str_triton.nn.recurrent.low_rank_rnn.low_rank_plan", return_value=Plan("streamed")):
        yield


def training_step(layer: nn.Module, x: Tensor, grad: Tensor, kernels: bool = False) -> Callable[[], None]:
    """Return a function that runs forward and backward, without an optimizer."""

    def step() -> None:
        for parameter in layer.parameters():
            parameter.grad = None
        with kernels_only() if kernels else nullcontext():
            layer(x)[0].backward(grad)

    return step


def bandwidth(session: Session) -> float:
    """Return the bytes per second that a copy of 1 GiB reads and writes."""
    x = torch.empty(session.pick(2**30, 2**16), dtype=torch.uint8, device=session.device)
    y = torch.empty_like(x)
    return 2 * len(x) / median(alternating({"copy": lambda: y.copy_(x)}, rounds=session.pick(20, 2))["copy"])
