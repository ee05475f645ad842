"""Random networks on 8-bit integers: the kernels' integers against the plain reference, bit for bit, on several paths.

    python -m benchmarks.studies.int8_fuzz [--first 0] [--count 500] [--paths native vnni-emulated ...]

Each seed is a graph of convolutions of every option (strides, dilation, groups, depthwise, residuals, tables), max
pools, concatenations, slices, zeros around images, gates by channel, means and a linear layer on codes with random zero
points. Every layer's work is cut at random.
A path is the same source for another instruction: "vnni-emulated" replaces the one instruction by a C function of its
meaning, "portable" has no instruction at all, "plain" is compiled for the oldest processor of its kind, and "256 bits"
has no AVX-512: it is AVX-VNNI where the processor has that. Results go to benchmarks/results/int8_fuzz_PROCESSOR.json.
Under AddressSanitizer and UBSan: the environment of sparse_fuzz.py.
"""

import argparse
import ctypes
import math
import platform
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.sparse_fuzz import sanitizers
from benchmarks.timing import in_file_names, machine, write
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.nodes import Call, Graph, Input, Node
from str_triton.deploy.sparse.graph.pools import MaxPool
from str_triton.deploy.sparse.graph.quantized import (
    Dequantize,
    Grid,
    Quantize,
    QuantizedConvolution,
    QuantizedGate,
    QuantizedLinear,
    QuantizedMean,
)
from str_triton.deploy.sparse.graph.refs import Ref
from str_triton.deploy.sparse.runtime import plan
from str_triton.deploy.sparse.runtime.images import PAD
from str_triton.deploy.sparse.runtime.trial import try_out
from str_triton.native import build

BASE = ("-std=gnu11", "-fPIC", "-shared", "-ffp-contract=fast", "-fopenmp")
PATHS = {
    "native": ("-march=native",),
    "vnni-emulated": ("-march=native", "-DSTR_TRITON_EMULATE_VNNI"),
    "16-bit products": ("-march=native", "-DSTR_TRITON_WIDE_DOT"),
    "portable": ("-march=native", "-DSTR_TRITON_PORTABLE_DOT"),
    "plain": (),
    **({"256 bits": ("-march=native", "-mno-avx512f")} if platform.machine() == "x86_64" else {}),
}


class Case:
    """A random graph and an input for it."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.grids: dict[str, Grid] = {}
        shape = self.draw.choice([1, 1, 2, 5]), self.draw.choice([1, 3, 8, 12]), *self._sizes()
        self.x = torch.randn(shape, generator=self.generator)
        self.values: dict[str, tuple[int, ...]] = {}
        self.nodes: list[Node] = [Input("x", [])]
        self._put(Quantize("q", ["x"], self._grid()), self.nodes[-1:], shape)
        for number in range(self.draw.randint(1, 5)):
            makers = [*[self._convolve] * 4, self._pool, self._move, self._pad, self._gate]
            self.draw.choice(makers)(f"n{number}")
        self._finish()
        # Zeros around images are made only where a call reads them, and not by convolutions.
        outputs = [node for node in self.nodes[1:] if not isinstance(node, Call) or node.target is not PAD]
        self.graph = Graph(self.nodes, [Ref(node.name) for node in outputs])

    def _sizes(self) -> tuple[int, int]:
        return self.draw.randint(1, 40), self.draw.choice([1, 2, 7, 16, 33, 64, 65])

    def _grid(self) -> Grid:
        scale = float(torch.tensor(2.0 ** self.draw.uniform(-7, -2), dtype=torch.float32))
        return Grid(scale, self.draw.choice([0, 0, 128, 255, self.draw.randint(0, 255)]))

    def _put(self, node: Node, sources: Any, shape: tuple[int, ...]) -> None:
        self.nodes.append(node)
        self.values[node.name] = shape
        self.grids[node.name] = node.grid if isinstance(node, Quantize) else node.grids[1]

    def _weights(self, outputs: int, *rest: int) -> dict[str, Tensor]:
        weight = torch.randint(-127, 128, (outputs, *rest), generator=self.generator, dtype=torch.int8)
        weight[torch.rand(weight.shape, generator=self.generator) < self.draw.choice([0, 0.5, 0.9, 1])] = 0
        # Of one sign, and extreme: pairs whose products would leave 16 bits.
        weight = self.draw.choice([weight, weight.abs(), weight.sign() * 127])
        bias = torch.randint(-(10**5), 10**5, (outputs,), generator=self.generator, dtype=torch.int32)
        scale = torch.rand(outputs, generator=self.generator) * 2.0 ** self.draw.randint(-12, -5) + 1e-6
        return {"weight": weight, "bias": bias, "scale": scale}

    def _convolve(self, name: str) -> None:
        draw, source = self.draw, self.draw.choice(list(self.values))
        _, channels, *sizes = shape = self.values[source]
        groups = draw.choice([1, channels, math.gcd(channels, 4)])
        outputs = groups * draw.randint(1, 4)
        kernel = tuple(draw.choice([1, 1, 2, 3]) for _ in range(2))
        geometry = {
            "stride": tuple(draw.choice([1, 1, 2, 3]) for _ in range(2)),
            "padding": tuple(draw.choice([0, k // 2, 1]) for k in kernel),
            "dilation": tuple(draw.choice([1, 1, 2]) for _ in range(2)),
            "groups": groups,
        }
        if draw.random() < 0.3:  # the shape of its input, which a residual sum needs
            outputs, kernel = channels, tuple(draw.choice([1, 3]) for _ in range(2))
            padding = tuple(k // 2 * d for k, d in zip(kernel, geometry["dilation"], strict=True))
            geometry |= {"stride": (1, 1), "padding": padding}
        if any(
            n + 2 * p < (k - 1) * d + 1
            for n, p, k, d in zip(sizes, geometry["padding"], kernel, geometry["dilation"], strict=True)
        ):
            return
        weights = self._weights(outputs, channels // groups, *kernel)
        grids = [self.grids[source], self._grid()]
        clamp = draw.choice([(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (-1.5, 1.0)])
        node = QuantizedConvolution(name, [source], clamp=clamp, label=name, **weights, **geometry, grids=tuple(grids))
        own = node.output_shape(shape)
        alike = [other for other, found in self.values.items() if found == own]
        if alike and draw.random() < 0.5:
            node.inputs.append(draw.choice(alike))
            node.grids = (*grids, self.grids[node.inputs[1]])
        if draw.random() < 0.3:
            node.before = self._grid()
            node.table = torch.randint(256, (256,), generator=self.generator, dtype=torch.uint8)
        self._put(node, [source], own)

    def _pool(self, name: str) -> None:
        source = self.draw.choice(list(self.values))
        kernel = self.draw.choice([(2, 2), (3, 3), (3, 1)])
        node = MaxPool(
            name, [source], kernel, self.draw.choice([(1, 1), (2, 2)]), (kernel[0] // 2, kernel[1] // 2), (1, 1)
        )
        node.ceil = self.draw.random() < 0.3
        values = {source: torch.zeros(self.values[source], dtype=torch.uint8)}
        self.values[name], self.grids[name] = tuple(node.run(values).shape), self.grids[source]
        self.nodes.append(node)

    def _move(self, name: str) -> None:
        """Concatenate two images, or take some channels of one. Grids may differ, as they may in a hostile file."""
        source = self.draw.choice(list(self.values))
        images, channels, *sizes = self.values[source]
        others = [other for other, (_, _, *found) in self.values.items() if found == sizes]
        if self.draw.random() < 0.5:
            other = self.draw.choice(others)
            args: tuple = ([Ref(source), Ref(other)], 1)
            node, count = (
                Call(name, [source, other], torch.ops.aten.cat.default, args),
                channels + self.values[other][1],
            )
        else:
            begin = self.draw.randrange(channels)
            node = Call(name, [source], torch.ops.aten.slice.Tensor, (Ref(source), 1, begin, channels))
            count = channels - begin
        self.values[name], self.grids[name] = (images, count, *sizes), self.grids[source]
        self.nodes.append(node)

    def _pad(self, name: str) -> None:
        source = self.draw.choice(list(self.values))
        *rest, rows, columns = self.values[source]
        zeros = [self.draw.choice([0, 0, 1, 2]) for _ in range(4)]
        args = (Ref(source), zeros, self.grids[source].zero)
        self.nodes.append(Call(name, [source], PAD, args))
        self.values[name] = *rest, rows + zeros[2] + zeros[3], columns + zeros[0] + zeros[1]
        self.grids[name] = self.grids[source]

    def _gate(self, name: str) -> None:
        source = self.draw.choice(list(self.values))
        grids = (self.grids[source], self._grid())
        self.nodes.append(QuantizedMean(f"{name}.mean", [source], True, grid=grids[0]))
        self.nodes.append(QuantizedGate(name, [source, f"{name}.mean"], grids))
        self.values[name], self.grids[name] = self.values[source], grids[1]

    def _finish(self) -> None:
        last = list(self.values)[-1]
        self.nodes += [Dequantize(f"{name}.f32", [name], self.grids[name]) for name in (last, next(iter(self.values)))]
        self.nodes.append(QuantizedMean("mean", [last], False, grid=self.grids[last]))
        grid, channels = self._grid(), self.values[last][1]
        self.nodes.append(Quantize("mean.u8", ["mean"], grid))
        weights = self._weights(self.draw.randint(1, 9), channels)
        self.nodes.append(QuantizedLinear("y", ["mean.u8"], **weights, grids=(grid,)))


def check(seed: int, library: ctypes.CDLL) -> str | None:
    """Return which value of a seed's graph the kernels compute differently; None if all are equal."""
    case = Case(seed)
    choices = {
        node.name: Choice("int8", case.draw.randint(1, 9), case.draw.randint(1, 9), case.draw.randint(1, 4))
        for node in case.graph.layers()
    }
    trial = try_out(case.graph, [case.x])
    made = plan.Plan(case.graph, trial, choices, library)
    tasks = {task.node.name: task.kind for task in made.tasks if task.kind in ("window", "linear", "torch")}
    slow = [node.name for node in case.graph.layers() if tasks[node.name] == "torch"]
    if slow:
        return f"torch runs {slow}"
    for _ in range(2):  # The second time in buffers that the first has filled.
        values = made.run([case.x])
        wanted, _ = case.graph.run([case.x])
        for ref, want in zip(case.graph.outputs, wanted, strict=True):
            found = values[ref.name]
            if found.dtype != want.dtype or not torch.equal(found, want):
                return f"{ref.name} differs"
    return None


def compiled(path: str, folder: Path, optimize: str = "-O2") -> ctypes.CDLL:
    """Compile the kernels for a path."""
    return build.load(build.build(folder, ((optimize, *BASE, *PATHS[path]),)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    options = parser.parse_args()
    run: dict[str, Any] = {
        "sanitizers": sanitizers(),
        "seeds": [options.first, options.count],
        "paths": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for path in options.paths:
            library = compiled(path, Path(folder))
            wrong = [seed for seed in range(options.first, options.first + options.count) if check(seed, library)]
            run["paths"][path] = {"networks": options.count, "wrong": wrong}
            print(f"{path}: {options.count} networks, {len(wrong)} wrong {wrong[:5]}", flush=True)
    write(f"int8_fuzz_{in_file_names(machine()['processor'])}", run)


if __name__ == "__main__":
    main()
