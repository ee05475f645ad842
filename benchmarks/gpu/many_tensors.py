"""`soft_threshold_many` over the weights of ResNet-50 beside a copy of as many elements, on the device alone.

Bytes per second are taken from CUDA graphs of many calls: no launch costs there. `share_of_copy`: the bytes that an op
cannot but move, a second, over those of the copy in the same run.
"""

from collections.abc import Callable
from statistics import median

import torch

from benchmarks.gpu.part import Session
from benchmarks.speed.soft_threshold import CALLS, COPY_PASSES, PASSES
from benchmarks.timing import alternating, median_ratio
from str_triton import soft_threshold, soft_threshold_many
from str_triton.cnn.resnet import resnet50

CALLS_PER_GRAPH = 50


def run(session: Session) -> None:
    device, rounds = session.device, session.pick(21, 1)
    xs = [0.05 * torch.randn(shape, device=device) for shape in session.pick(resnet50_shapes, tiny_shapes)()]
    raws = [torch.full((1, 1), -3.0, device=device) for _ in xs]
    alpha, thresholds = torch.full((len(xs),), 0.05, device=device), [1] * len(xs)
    grads = [torch.randn_like(x) for x in xs]
    ops = torch.ops.str_triton
    flat = ops.soft_threshold_many(xs, alpha, thresholds)
    source, copy = torch.randn_like(flat), torch.empty_like(flat)
    calls = {
        "copy": lambda: copy.copy_(source),
        "forward": lambda: ops.soft_threshold_many(xs, alpha, thresholds),
    }
    for gradient in ("masked", "straight_through"):
        arguments = grads, flat, alpha, thresholds, gradient == "masked"
        calls[f"{gradient} backward"] = lambda a=arguments: ops.soft_threshold_many_backward(*a)
    repeated = {name: repeat(call, device) for name, call in calls.items()}
    seconds = alternating(repeated, rounds, warmup=session.pick(2, 0))
    times = {f"{name}_us": 1e6 * median(found) / CALLS_PER_GRAPH for name, found in seconds.items()}
    session.report(elements=flat.numel(), tensors=len(xs), **times)
    session.report(copy_gb_per_s=COPY_PASSES * flat.nbytes / (1e3 * times["copy_us"]))
    shares = {name: passes / COPY_PASSES * median_ratio(seconds, "copy", name) for name, passes in PASSES.items()}
    session.report(share_of_copy=shares)

    leaves = [tensor.requires_grad_() for tensor in xs + raws]

    def loop() -> None:
        outs = [soft_threshold(*pair) for pair in zip(xs, raws, strict=True)]
        torch.autograd.grad(outs, leaves, grads)

    def many() -> None:
        torch.autograd.grad(soft_threshold_many(xs, raws), leaves, grads)

    seconds = alternating({"loop": loop, "many": many}, rounds, **session.pick(CALLS, {"warmup": 0}))
    session.report(**{f"eager_{name}_ms": 1e3 * median(found) for name, found in seconds.items()})


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Return the shapes of the 53 convolutions and of the classifier."""
    with torch.device("meta"):
        return [tuple(weight.shape) for weight in resnet50().parameters() if weight.dim() > 1]


def tiny_shapes() -> list[tuple[int, ...]]:
    return [(8, 3, 3, 3), (10, 8)]


def repeat(call: Callable[[], object], device: str) -> Callable[[], object]:
    """Return CALLS_PER_GRAPH calls as one: a CUDA graph, made after a first call that compiles and fills caches."""
    if device == "cpu":
        return lambda: [call() for _ in range(CALLS_PER_GRAPH)]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS_PER_GRAPH):
            call()
    return graph.replay
