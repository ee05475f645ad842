"""What the kernels of compiled networks reach of the processor's limits, layer by layer, on one thread.

    python -m benchmarks.speed.kernel_limits [NETWORK...] [--passes 40] [--quick]

NETWORK is one of those of sparse_inference.py (random masks at published budgets, 224x224, batch 1); by default three
of them. Each is compiled as it is and after `deploy.quantize`. A layer's time is compared with four bounds:

- "peak": its multiply-adds at the rate of multiply-adds between registers.
- "near": the time of the same layer when every tap reads the same channel. All inputs then come from the nearest cache,
  and what is left is the instructions: loads, multiply-adds, clamp, stores.
- "L1", "L2": the bytes that its taps read, at the rate at which this core reads from its first or second cache.

Multiply-adds and bytes include the pixels of the padding, which the kernels compute as well. Everything is the minimum
over passes through the whole network. Results go to benchmarks/results/kernel_limits_PROCESSOR.json; --quick writes
none.
"""

import argparse
import ctypes
import math
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.speed.sparse_inference import NETWORKS, random_network
from benchmarks.timing import in_file_names, machine, write
from str_triton import deploy
from str_triton.deploy.sparse.graph.nodes import Convolution, Linear, Node
from str_triton.deploy.sparse.profile import Step, label, step_times
from str_triton.deploy.sparse.runtime.plan import Plan
from str_triton.deploy.sparse.runtime.segment import Segment
from str_triton.deploy.sparse.runtime.structs import CONVOLUTION, CONVOLUTION_BYTES, QUAD, TAP, Operation
from str_triton.native import build

RATES = """
#include "dot.h"
void multiply(int64_t count, float *out) {
    vec sum[10], a = splat(0.5f);
    for (int j = 0; j < 10; j++) sum[j] = splat(j);
    for (int64_t i = 0; i < count; i++)
        for (int j = 0; j < 10; j++) sum[j] = sum[j] * a + a;
    for (int j = 0; j < 10; j++) out[j] = sum[j][0];
}
void multiply_bytes(int64_t count, float *out) {
    ints sum[8] = {{0}};
    bytes x = {1, 2, 3, 4}, weights = {1, 1, 1, 1};
    for (int64_t i = 0; i < count; i++)
        for (int j = 0; j < 8; j++) {
            __asm__ volatile("" : "+x"(x)); /* or the products would be computed once */
            sum[j] = dot4(sum[j], x, (ints)weights);
        }
    for (int j = 0; j < 8; j++) out[j] = sum[j][0];
}
void read(const char *from, int64_t size, int64_t count, float *out) {
    ints sum[4] = {{0}};
    for (int64_t i = 0; i < count; i++) {
        __asm__ volatile("" : : : "memory");
        for (int64_t at = 0; at < size; at += 4 * WIDE)
            for (int j = 0; j < 4; j++) sum[j] ^= *(const ints *)(from + at + j * WIDE);
    }
    for (int j = 0; j < 4; j++) out[j] = sum[j][0];
}
int64_t lanes(void) { return LANES; }
int64_t wide(void) { return WIDE; }
"""
DEFAULT = ("mobilenetv1-89.01", "resnet50-90.23", "resnet50-95.03")
L1, L2 = 2**14, 2**17  # bytes that are read again and again: in the first cache, and in the second


def seconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """Return the shortest of several calls."""
    best = math.inf
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best


def rates() -> dict[str, float]:
    """Measure multiply-adds per second in float32 and on bytes, and bytes per second from both caches, of one core."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "rates.c", Path(folder) / "rates.so"
        source.write_text(RATES)
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-shared", "-fPIC", "-w"]
        subprocess.run(
            [*build._compiler(), *flags, f"-I{Path(build.__file__).parent}", source, "-o", binary], check=True
        )
        library = ctypes.CDLL(str(binary))
    out, count = (ctypes.c_float * 16)(), 100_000
    memory = torch.zeros(2 * L2, dtype=torch.uint8)
    begin = memory.data_ptr() + -memory.data_ptr() % 64

    def reading(size: int) -> float:
        again = 2**24 // size
        numbers = ctypes.c_void_p(begin), ctypes.c_int64(size), ctypes.c_int64(again)
        return size * again / seconds(lambda: library.read(*numbers, out))

    number = ctypes.c_int64(count)
    return {
        "float32": 10 * library.lanes() * count / seconds(lambda: library.multiply(number, out)),
        "int8": 8 * library.wide() * count / seconds(lambda: library.multiply_bytes(number, out)),
        "L1": reading(L1),
        "L2": reading(L2),
    }


def taps_of(op: Operation) -> np.ndarray:
    """Return the taps of a convolution, or the quads of one on bytes: the kernel's own array."""
    first = np.ctypeslib.as_array(
        ctypes.cast(op.first, ctypes.POINTER(ctypes.c_int32)), (op.tables * (op.channels + 1),)
    )
    kind = QUAD if op.kind == CONVOLUTION_BYTES else TAP
    memory = (ctypes.c_char * (int(first.max()) * kind.itemsize)).from_address(op.taps)
    return np.frombuffer(memory, kind)


@contextmanager
def near(operations: list[Operation]) -> Iterator[None]:
    """Make every tap read its strip's pixels of the first channel."""
    arrays = [taps_of(op) for op in operations]
    offsets = [array["offset"].copy() for array in arrays]
    try:
        for array in arrays:
            array["offset"] = 0
        yield
    finally:
        for array, offset in zip(arrays, offsets, strict=True):
            array["offset"] = offset


def window_of(node: Node) -> str:
    """Return the kind of layer: its window's size, and whether it is depthwise."""
    if not isinstance(node, Convolution):
        return "pool" if not isinstance(node, Linear) else "linear"
    rows, columns = node.weight.shape[2:]
    return ("depthwise " if node.is_depthwise else "") + f"{rows}x{columns}"


def convolution_of(plan: Plan, step: Step) -> Operation | None:
    """Return the operation of a step, if the kernels run a convolution there."""
    index, number = step.place
    segment = plan.segments[index]
    operation = segment.operations[number][0] if isinstance(segment, Segment) else None
    return operation if operation is not None and operation.kind in (CONVOLUTION, CONVOLUTION_BYTES) else None


def layers(network: nn.Module, x: Tensor, rate: dict[str, float], passes: int) -> list[dict[str, Any]]:
    """Return the time and the bounds of each convolution that the kernels run, and the time of the other stages."""
    with torch.inference_mode():
        network(x)
        plan = network._plan([x])
        timed = step_times(plan, [x], passes)
        convolutions = {step.place: op for step, _ in timed if (op := convolution_of(plan, step)) is not None}
        with near(list(convolutions.values())):
            near_times = {step.place: min(times) for step, times in step_times(plan, [x], passes)}
    rows = []
    for step, times in timed:
        row: dict[str, Any] = {"layer": label(step.node), "task": step.task, "seconds": min(times)}
        if op := convolutions.get(step.place):
            kind = "int8" if op.kind == CONVOLUTION_BYTES else "float32"
            taps = len(taps_of(op)) * (op.planes if op.tables == 1 else 1) * op.images
            products = taps * op.length * (4 if kind == "int8" else 1)
            read = products * (1 if kind == "int8" else 4)
            bounds = {"peak": products / rate[kind], "L1": read / rate["L1"], "L2": read / rate["L2"]}
            row |= {"window": window_of(step.node)}
            row |= {"multiply_adds": products, "read": read, "near": near_times[step.place], **bounds}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", default=DEFAULT, help=", ".join(NETWORKS))
    parser.add_argument("--passes", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="write no results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rate = rates()
    print({name: f"{value / 1e9:.1f} G/s" for name, value in rate.items()}, flush=True)
    found = []
    for name in options.networks:
        x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        model = random_network(*NETWORKS[name], x)
        for kind, network in (("float32", model), ("int8", deploy.quantize(model, [x]))):
            rows = layers(deploy.compile_sparse(network, x), x, rate, options.passes)
            found.append({"network": name, "kind": kind, "rows": rows})
            done = [row for row in rows if "near" in row]
            total = {key: 1e3 * sum(row[key] for row in done) for key in ("seconds", "near", "peak", "L1", "L2")}
            everything = 1e3 * sum(row["seconds"] for row in rows)
            print(name, kind, f"all {everything:.2f} ms", *(f"{key} {value:.2f}" for key, value in total.items()))
    if not options.quick:
        write(f"kernel_limits_{in_file_names(machine()['processor'])}", {"rates": rate, "networks": found})


if __name__ == "__main__":
    main()
