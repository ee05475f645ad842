"""The speed of the kernels on bytes beside those on float32: single layers with random zeros, one thread.

    python -m benchmarks.speed.int8_kernels [--rounds 40] [--paths native "16-bit products" ...]

Each layer is a convolution with bias and ReLU at batch 1, in the kernels' own buffers and with the fastest cut of its
work. A path is one of benchmarks/studies/int8_fuzz.py: "native" has two products in 16 bits on AVX2 (weights are paired
so that none saturates), "16-bit products" widens bytes first. Minima over alternating rounds, in microseconds, go to
benchmarks/results/int8_kernels_PROCESSOR.json.
"""

import argparse
import ctypes
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.studies.int8_fuzz import PATHS, compiled
from benchmarks.timing import in_file_names, machine, write
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.nodes import Convolution, Graph, Input, Layer, Node
from str_triton.deploy.sparse.graph.quantized import Grid, Quantize
from str_triton.deploy.sparse.graph.refs import Ref
from str_triton.deploy.sparse.quantize.convert import quantized
from str_triton.deploy.sparse.runtime.plan import Plan
from str_triton.deploy.sparse.runtime.trial import try_out

# in, out, side, kernel, stride, groups, sparsity in %
LAYERS = [
    (64, 256, 56, 1, 1, 1, 90),
    (512, 128, 28, 1, 1, 1, 90),
    (1024, 256, 14, 1, 1, 1, 80),
    (1024, 256, 14, 1, 1, 1, 90),
    (1024, 256, 14, 1, 1, 1, 95),
    (512, 2048, 7, 1, 1, 1, 90),
    (512, 512, 14, 1, 1, 1, 90),
    (64, 64, 56, 3, 1, 1, 90),
    (256, 256, 14, 3, 1, 1, 90),
    (256, 256, 28, 3, 2, 1, 90),
    (128, 128, 56, 3, 1, 128, 0),
]
WIDTHS = (1, 2, 3, 4, 6, 7, 8)


def layer(inputs: int, outputs: int, side: int, kernel: int, stride: int, groups: int, sparsity: int) -> Convolution:
    """Return a convolution in float32 with random zeros."""
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs // groups, kernel, kernel)
    weight.view(-1)[torch.randperm(weight.numel())[: weight.numel() * sparsity // 100]] = 0
    geometry = ((stride, stride), (kernel // 2, kernel // 2), (1, 1), groups)
    return Convolution("y", ["x"], weight, torch.randn(outputs), (0.0, float("inf")), "y", *geometry)


def stages(
    nodes: list[Node], x: torch.Tensor, library: ctypes.CDLL, name: str, execution: str
) -> list[Callable[[], None]]:
    """Return a call of one layer's operation alone for each way to cut its work."""
    graph, found = Graph(nodes, [Ref(nodes[-1].name)]), []
    for width in WIDTHS:
        choices = {name: Choice(execution, width)}
        plan = Plan(graph, try_out(graph, [x]), choices, library)
        plan.run([x])
        segment, number = plan.operation(name)
        stage = ctypes.addressof(segment.stages[number])

        def call(stage: int = stage, plan: Plan = plan) -> None:
            library.str_triton_run(stage, 1, 1)

        found.append(call)
    return found


def fastest(calls: dict[str, list[Callable[[], None]]], rounds: int) -> dict[str, float]:
    """Return the fewest microseconds of each group of calls; all run in turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, group in calls.items():
            for call in group:
                begin = time.perf_counter()
                call()
                best[name] = min(best[name], 1e6 * (time.perf_counter() - begin))
    return best


def measure(spec: tuple[int, ...], libraries: dict[str, ctypes.CDLL], rounds: int) -> dict[str, float]:
    """Return the microseconds of a layer in float32 and on bytes, by path."""
    node, x = layer(*spec), torch.rand(1, spec[0], spec[2], spec[2])
    y = node.run({"x": x})
    grids = {"x": Grid.over(0.0, 1.0), "y": Grid.over(0.0, float(y.max()))}
    calls = {"float32": stages([Input("x", []), node], x, libraries["native"], "y", "sparse")}
    made: Layer = quantized(node, grids, "y.u8", ["x.u8"])
    nodes = [Input("x", []), Quantize("x.u8", ["x"], grids["x"]), made]
    for path, library in libraries.items():
        calls[f"int8, {path}"] = stages(nodes, x, library, "y.u8", "int8")
    return fastest(calls, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=["native", "16-bit products"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        libraries = {path: compiled(path, Path(folder), "-O3") for path in dict.fromkeys(["native", *options.paths])}
        for spec in LAYERS:
            times = measure(spec, libraries, options.rounds)
            names = ("inputs", "outputs", "side", "kernel", "stride", "groups", "sparsity")
            rows.append({**dict(zip(names, spec, strict=True)), "microseconds": times})
            print(spec, {name: round(us, 1) for name, us in times.items()}, flush=True)
    write(f"int8_kernels_{in_file_names(machine()['processor'])}", {"layers": rows})


if __name__ == "__main__":
    main()
