"""What soft_threshold costs, forward and backward, beside the literal formula under autograd and beside memory's speed.

    python -m benchmarks.soft_threshold [--rounds 21] [--threads 2]

The functions take turns in one process, a few calls each, of which the first are not timed: they meet the caches and
the heap that another function left behind. `share_of_copy` says how near memory's limit an op is: the bytes that it
cannot but move, a second, over those of a copy of the same tensor in the same run. On a GPU also soft_threshold_many
over the weights of ResNet-50, whose bytes per second are taken on the device, from CUDA graphs: no launch costs there.
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from benchmarks.timing import alternating, median_ratio, write
from str_triton import soft_threshold, soft_threshold_many

SHAPES = ((512, 512, 3, 3), (2048, 1024, 1, 1))
CALLS = {"calls": 5, "settle": 3}
CALLS_PER_GRAPH = 50
# Passes over a tensor that the op cannot do without: forward reads x and writes S; backward reads S and the gradient
# and writes that of x, except straight-through, where the two are one.
PASSES = {"forward": 2, "masked backward": 3, "straight_through backward": 2}
COPY_PASSES = 2


def literal(x: Tensor, raw: Tensor) -> Tensor:
    return torch.sign(x) * torch.relu(torch.abs(x) - torch.sigmoid(raw))


def literal_straight_through(x: Tensor, raw: Tensor) -> Tensor:
    return x + (literal(x.detach(), raw) - x.detach())


def resnet50_shapes() -> list[tuple[int, ...]]:
    """The 53 convolutions and the classifier, the latter as a convolution too."""
    shapes, channels = [(64, 3, 7, 7)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, channels, 1, 1))
            channels = 4 * width
    return [*shapes, (1000, channels, 1, 1)]


def one_tensor(shape: tuple[int, ...], device: str, rounds: int) -> dict[str, float]:
    """Medians in milliseconds of forward and backward together, and how they compare."""
    x = (0.05 * torch.randn(shape, device=device)).requires_grad_()
    raw = torch.full((1, 1), -3.0, device=device, requires_grad=True)
    grad, copy = torch.randn(shape, device=device), torch.empty(shape, device=device)

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


def many_tensors(rounds: int) -> dict[str, float]:
    """ResNet-50's weights on a GPU: each op's share of the bytes per second of a copy of as many elements."""
    xs = [0.05 * torch.randn(shape, device="cuda") for shape in resnet50_shapes()]
    raws = [torch.full((1, 1), -3.0, device="cuda") for _ in xs]
    alpha, thresholds = torch.full((len(xs),), 0.05, device="cuda"), [1] * len(xs)
    grads = [torch.randn_like(x) for x in xs]
    ops = torch.ops.str_triton
    flat = ops.soft_threshold_many(xs, alpha, thresholds)
    source, copy = torch.randn_like(flat), torch.empty_like(flat)
    graphs = {
        "copy": captured(lambda: copy.copy_(source)),
        "forward": captured(lambda: ops.soft_threshold_many(xs, alpha, thresholds)),
    }
    for gradient in ("masked", "straight_through"):
        arguments = grads, flat, alpha, thresholds, gradient == "masked"
        graphs[f"{gradient} backward"] = captured(lambda a=arguments: ops.soft_threshold_many_backward(*a))
    seconds = alternating({name: graph.replay for name, graph in graphs.items()}, rounds)
    result = {"elements": flat.numel(), "tensors": len(xs)}
    result |= {f"{name}_us": 1e6 * median(times) / CALLS_PER_GRAPH for name, times in seconds.items()}
    result["copy_gb_per_s"] = COPY_PASSES * flat.nbytes / (1e3 * result["copy_us"])
    for name, passes in PASSES.items():
        result[f"{name}_share_of_copy"] = passes / COPY_PASSES * median_ratio(seconds, "copy", name)
    leaves = [tensor.requires_grad_() for tensor in xs + raws]
    eager = alternating(
        {
            "loop": lambda: torch.autograd.grad(
                [soft_threshold(*pair) for pair in zip(xs, raws, strict=True)], leaves, grads
            ),
            "many": lambda: torch.autograd.grad(soft_threshold_many(xs, raws), leaves, grads),
        },
        rounds,
        **CALLS,
    )
    return result | {f"eager_{name}_ms": 1e3 * median(times) for name, times in eager.items()}


def captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of CALLS_PER_GRAPH calls, after a first call on the same stream that compiles and fills caches."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS_PER_GRAPH):
            function()
    return graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {"soft_threshold": {str(shape): one_tensor(shape, device, args.rounds) for shape in SHAPES}}
    if device == "cuda":
        result["soft_threshold_many"] = {"ResNet-50": many_tensors(args.rounds)}
    for op, cases in result.items():
        for case, figures in cases.items():
            print(op, case, *(f"  {name} {value:.3f}" for name, value in figures.items()), sep="\n")
    where = torch.cuda.get_device_name().lower().replace(" ", "-") if device == "cuda" else "cpu"
    write(f"soft_threshold_{where}", result)


if __name__ == "__main__":
    main()
