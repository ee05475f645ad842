"""The time of soft_threshold on the CPU, forward and backward, compared with the formula under autograd and a copy.

    python -m benchmarks.speed.soft_threshold [--rounds 21] [--threads 2]

The functions take turns in one process, a few calls each. The first calls of a turn are not timed, because they find
the caches and the heap of another function. `share_of_copy` compares an op with the memory bandwidth: the least bytes
that it must move, per second, divided by those of a copy of the same tensor in the same run. On a GPU: benchmarks/gpu.
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from benchmarks.timing import alternating, median_ratio, write
from str_triton import soft_threshold

SHAPES = ((512, 512, 3, 3), (2048, 1024, 1, 1))
CALLS = {"calls": 5, "settle": 3}
# The least number of passes over a tensor: forward reads x and writes S. Backward reads S and the gradient, and writes
# the gradient of x, except for straight-through, where both gradients are the same.
PASSES = {"forward": 2, "masked backward": 3, "straight_through backward": 2}
COPY_PASSES = 2


def literal(x: Tensor, raw: Tensor) -> Tensor:
    return torch.sign(x) * torch.relu(torch.abs(x) - torch.sigmoid(raw))


def literal_straight_through(x: Tensor, raw: Tensor) -> Tensor:
    return x + (literal(x.detach(), raw) - x.detach())


def one_tensor(shape: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Measure forward and backward together: medians in milliseconds, and their ratios."""
    x = (0.05 * torch.randn(shape)).requires_grad_()
    raw = torch.full((1, 1), -3.0, requires_grad=True)
    grad, copy = torch.randn(shape), torch.empty(shape)

    def forward_and_backward(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            function(x, raw).backward(grad)
            x.grad = raw.grad = None

        return run

    seconds = alternating(
        {
            "literal": forward_and_backward(literal),
            "masked": forward_and_backward(soft_threshold),
            "literal_straight_through": forward_and_backward(literal_straight_through),
            "straight_through": forward_and_backward(
                lambda x, raw: soft_threshold(x, raw, gradient="straight_through")
            ),
            "copy": lambda: copy.copy_(x.detach()),
        },
        rounds,
        **CALLS,
    )
    result = {f"{name}_ms": 1e3 * median(times) for name, times in seconds.items()}
    for name, base in (("masked", "literal"), ("straight_through", "literal_straight_through")):
        passes = PASSES["forward"] + PASSES[f"{name} backward"]
        result[f"{name}_speedup"] = median_ratio(seconds, base, name)
        result[f"{name}_share_of_copy"] = passes / COPY_PASSES * median_ratio(seconds, "copy", name)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cases = {str(shape): one_tensor(shape, args.rounds) for shape in SHAPES}
    for case, figures in cases.items():
        print(case, *(f"  {name} {value:.3f}" for name, value in figures.items()), sep="\n")
    write("soft_threshold_cpu", {"soft_threshold": cases})


if __name__ == "__main__":
    main()
