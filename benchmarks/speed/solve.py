"""The cost of a controller's solves on the CPU: time for each weight, and memory beside the weights.

    python -m benchmarks.speed.solve [--millions 10 25 100] [--rounds 5] [--threads 2]

`solve()` finds the thresholds for a sparsity, `exact()` also breaks ties and puts everything back on leaving. The model
is layers of 1024 x 1024 normally distributed weights. Each size runs in a process of its own. Extra memory is the
growth of the process's peak resident memory during the call.
"""

import argparse
import multiprocessing
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.timing import write
from str_triton import SparsityController, Target, sparsify

SIDE = 1024


def measured(call: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Return the median seconds of a call, and its largest extra memory in bytes."""
    seconds, extra = [], []
    for _ in range(rounds):
        Path("/proc/self/clear_refs").write_text("5")  # The peak becomes the present resident memory.
        before, begin = resident("VmRSS"), time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
        extra.append(resident("VmHWM") - before)
    return {"seconds": median(seconds), "extra_bytes": max(extra)}


def resident(key: str) -> int:
    """Return a size of this process's memory in bytes."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def size(millions: int, rounds: int, threads: int) -> dict[str, Any]:
    """Return the figures for a model of so many million weights."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layers = round(millions * 1e6 / SIDE**2)
    model = sparsify(nn.Sequential(*[nn.Linear(SIDE, SIDE, bias=False) for _ in range(layers)]))
    for layer in model:
        nn.init.normal_(layer.weight, std=0.02)
    controller = SparsityController(model, Target(sparsity=0.9), schedule="constant")

    def exact() -> None:
        with controller.exact():
            pass

    controller.solve()
    exact()
    weights = layers * SIDE**2
    figures = {"solve": measured(controller.solve, rounds), "exact": measured(exact, rounds)}
    for figure in figures.values():
        figure["nanoseconds_per_weight"] = 1e9 * figure["seconds"] / weights
        figure["extra_bytes_per_weight"] = figure["extra_bytes"] / weights
    return {"weights": weights, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", default=[10, 25, 100])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)  # of the machine's description
    results = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for millions in options.millions:
            results.append(pool.apply(size, (millions, options.rounds, options.threads)))
            for name in ("solve", "exact"):
                figure = results[-1][name]
                each = (
                    f"{figure['nanoseconds_per_weight']:.1f} ns, {figure['extra_bytes_per_weight']:.2f} bytes a weight"
                )
                print(f"{results[-1]['weights']:>12,} weights  {name}  {1e3 * figure['seconds']:8.1f} ms  {each}")
    write("solve_cpu", {"rounds": options.rounds, "sizes": results})


if __name__ == "__main__":
    main()
