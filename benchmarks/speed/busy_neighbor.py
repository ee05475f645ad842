"""The time of a compiled network's calls beside a busy neighbour of equal priority, and alone.

    python -m benchmarks.speed.busy_neighbor [NETWORK...] [--threads 2] [--rounds 6] [--seconds 3] [--quick]

NETWORK: as for benchmarks.speed.sparse_inference; by default mobilenetv1-89.01 and resnet50-90.23. The neighbour is a
process of one thread that never waits. Blocks of calls alone and beside the neighbour take turns. The results are
medians and 95th percentiles in milliseconds, in benchmarks/results/busy_neighbor_PROCESSOR.json, one entry per network;
--quick takes small networks of three layers and writes none. Needs a quiet machine.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.sparse_inference import NETWORKS, random_network
from benchmarks.timing import RESULTS, in_file_names, machine, write
from str_triton import deploy

DEFAULT = ["mobilenetv1-89.01", "resnet50-90.23"]


@contextmanager
def busy_neighbor() -> Iterator[None]:
    """Run another process of one thread that never waits."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


def block(function: Callable[[Tensor], Any], image: Tensor, seconds: float) -> list[float]:
    """Return the milliseconds of each call in so many seconds; there are two calls at least."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end or len(times) < 2:
        function(image)
        times.append(1000 * (time.perf_counter() - begin))
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Return the median and the 95th percentile."""
    percentiles = quantiles(times, n=100, method="inclusive")
    return {"median_ms": percentiles[49], "p95_ms": percentiles[94], "calls": len(times)}


def measure(network: nn.Module, image: Tensor, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Return the summaries of calls alone and beside a neighbour."""
    alone: list[float] = []
    beside: list[float] = []
    with torch.inference_mode():
        block(network, image, min(0.5, seconds))
        for _ in range(rounds):
            alone += block(network, image, seconds)
            with busy_neighbor():
                beside += block(network, image, seconds)
    return {"alone": summary(alone), "beside": summary(beside)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=DEFAULT, metavar="NETWORK")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a block")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if unknown := [name for name in options.networks if name not in NETWORKS]:
        parser.error(f"no network {unknown[0]!r}; there are {', '.join(NETWORKS)}")
    torch.set_num_threads(options.threads)
    if options.quick:
        image = torch.randn(1, 3, 64, 64)
        layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU(), nn.Conv2d(64, 64, 3)]
        network = deploy.compile_sparse(nn.Sequential(*layers).eval(), image, tune=False)
        print("three layers", measure(network, image, 2, min(options.seconds, 0.3)))
        return
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    name = f"busy_neighbor_{in_file_names(machine()['processor'])}"
    path = RESULTS / f"{name}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    networks = content.get("networks", {})
    for key in options.networks:
        network = deploy.compile_sparse(random_network(*NETWORKS[key], image), image)
        networks[key] = {"threads": options.threads, **measure(network, image, options.rounds, options.seconds)}
        print(key, networks[key], flush=True)
        write(name, {"networks": networks})


if __name__ == "__main__":
    main()
