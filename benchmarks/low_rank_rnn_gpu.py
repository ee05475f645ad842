"""Low-rank GRU layers beside cuDNN on a GPU: forward and backward, 24 sizes, in bfloat16 and float32.

    python -m benchmarks.low_rank_rnn_gpu [--rounds 9]

Every kernel is compiled first, in parallel. Then the layers take turns: "layer" is LowRankGRU as a user has it, which
follows the plan (and may run cuDNN on the product); "kernels" is the same layer made to run the Triton kernels; "cudnn"
is nn.GRU. A round's ratio is cuDNN's time over ours: above 1 ours is faster; the median is over the rounds.
What bounds the kernels is written beside them: the bytes that they must move, at the bandwidth that a copy reaches
here, and the time per step (forward and backward), for the steps depend on one another.
"""

import argparse
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import product
from multiprocessing import get_context
from statistics import median
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.timing import alternating, median_ratio, write
from rnn import LowRankGRU
from str_triton import Plan, low_rank_plan, shared_memory_limit

INPUT_SIZE = 32
HIDDEN_SIZES = (128, 256, 512, 1024)
STEPS_AND_BATCHES = tuple(product((100, 1000), (16, 64, 256)))
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@contextmanager
def kernels_only() -> Iterator[None]:
    """Layers run the Triton kernels, whatever the plan says."""
    with mock.patch("rnn.low_rank_rnn.low_rank_plan", return_value=Plan("streamed")):
        yield


def training_step(layer: nn.Module, x: Tensor, grad: Tensor, kernels: bool = False) -> Callable[[], None]:
    def step() -> None:
        for parameter in layer.parameters():
            parameter.grad = None
        with kernels_only() if kernels else nullcontext():
            layer(x)[0].backward(grad)

    return step


def low_rank(hidden_size: int, dtype: torch.dtype) -> LowRankGRU:
    return LowRankGRU(INPUT_SIZE, hidden_size, max_rank=hidden_size // 16, factorize="recurrent").to("cuda", dtype)


def compile_kernels(hidden_size: int, dtype: str) -> None:
    """Leaves them in Triton's cache on disk. The number of steps and sequences changes no kernel."""
    x = torch.randn(2, 16, INPUT_SIZE, device="cuda", dtype=DTYPES[dtype])
    training_step(low_rank(hidden_size, x.dtype), x, x.new_ones(2, 16, hidden_size), kernels=True)()
    torch.cuda.synchronize()


def bytes_moved(steps: int, batch: int, hidden_size: int, dtype: torch.dtype) -> int:
    """By the two kernels, in numbers of hidden_size per step and sequence; the factors and p are small beside them.

    Forward: reads gates_x (3), writes outputs (1), saved (4). Backward: reads the gradient (1), outputs (1), saved (4),
    writes the gradients of gates_x (3) and of n's hidden part (1).
    """
    return 18 * steps * batch * hidden_size * dtype.itemsize


def bandwidth() -> float:
    """Bytes per second that a copy of 1 GiB reads and writes."""
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * 2**30 / median(alternating({"copy": lambda: y.copy_(x)}, rounds=20)["copy"])


def measure(hidden_size: int, steps: int, batch: int, name: str, rounds: int, peak: float) -> dict[str, object]:
    dtype, rank = DTYPES[name], hidden_size // 16
    x = torch.randn(steps, batch, INPUT_SIZE, device="cuda", dtype=dtype)
    grad = torch.randn(steps, batch, hidden_size, device="cuda", dtype=dtype)
    ours, cudnn = low_rank(hidden_size, dtype), nn.GRU(INPUT_SIZE, hidden_size).to("cuda", dtype)
    seconds = alternating(
        {
            "layer": training_step(ours, x, grad),
            "kernels": training_step(ours, x, grad, kernels=True),
            "cudnn": training_step(cudnn, x, grad),
        },
        rounds,
    )
    moved = bytes_moved(steps, batch, hidden_size, dtype)
    return {
        "hidden_size": hidden_size,
        "rank": rank,
        "steps": steps,
        "batch_size": batch,
        "dtype": name,
        "plan": low_rank_plan("gru", hidden_size, rank, batch, dtype, shared_memory=shared_memory_limit(x.device)).kind,
        **{f"{key}_ms": 1e3 * median(times) for key, times in seconds.items()},
        "cudnn_over_layer": median_ratio(seconds, "cudnn", "layer"),
        "cudnn_over_kernels": median_ratio(seconds, "cudnn", "kernels"),
        "bytes": moved,
        "share_of_bandwidth": moved / peak / median(seconds["kernels"]),
        "microseconds_per_step": 1e6 * median(seconds["kernels"]) / steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    if not torch.cuda.is_available():
        parser.error("there is no GPU: torch.cuda.is_available() is False")
    with ProcessPoolExecutor(8, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_kernels, *zip(*product(HIDDEN_SIZES, DTYPES), strict=True)))
    torch.manual_seed(0)
    peak, rows = bandwidth(), []
    for name, hidden_size, (steps, batch) in product(DTYPES, HIDDEN_SIZES, STEPS_AND_BATCHES):
        row = measure(hidden_size, steps, batch, name, rounds, peak)
        rows.append(row)
        print(
            f"{name:8} H {hidden_size:4} r {row['rank']:2} T {steps:4} B {batch:3}   layer {row['layer_ms']:8.2f} ms   "
            f"kernels {row['kernels_ms']:8.2f} ms   cuDNN {row['cudnn_ms']:8.2f} ms   "
            f"ratio {row['cudnn_over_layer']:.2f} ({row['plan']}), of the kernels {row['cudnn_over_kernels']:.2f}",
            flush=True,
        )
    write("low_rank_rnn_gpu", {"input_size": INPUT_SIZE, "rounds": rounds, "bandwidth": peak, "rows": rows})


if __name__ == "__main__":
    main()
