"""The training speed of ResNet20 on 32x32 images: what each option of a CPU run is worth.

    python -m benchmarks.speed.cifar_speed [--rounds 3] [--steps 4] [--variants ...]

Each variant has a process of its own with one thread, because some settings hold for a whole process. The variants take
turns. The result is the best step in images per second of CPU time, which other programs on the machine disturb less
than wall-clock time, and its multiply-adds beside those of a large matrix product. A step is forward, backward and SGD
with momentum; `str-exact` also thresholds the weights and steps the controller.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.timing import write
from str_triton import SparsityController, Target, count, parameter_groups, sparsify
from str_triton.cnn.models import build
from str_triton.training.memory import keep_freed_memory

VARIANTS: dict[str, dict[str, Any]] = {
    "contiguous": {"channels_last": False, "keep": False},
    "channels_last": {"keep": False},
    "channels_last, memory kept": {},
    "the same, torch.compile": {"compile": True},
    "the same, bfloat16": {"bf16": True},
    "the same, fused SGD": {"fused": True},
    "the same, str-exact": {"sparse": True},
    "the same, batch 32": {"batch": 32},
    "the same, batch 64": {"batch": 64},
    "the same, batch 256": {"batch": 256},
}


def measure(
    steps: int,
    *,
    channels_last: bool = True,
    keep: bool = True,
    compile: bool = False,
    bf16: bool = False,
    fused: bool = False,
    sparse: bool = False,
    batch: int = 128,
) -> dict[str, float]:
    """Return the images per CPU second of the best step, and the multiply-adds of an image's forward pass."""
    torch.set_num_threads(1)
    if keep:
        keep_freed_memory()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model, example = build("resnet20", num_classes=10).to(memory_format=layout), torch.zeros(1, 3, 32, 32)
    flops, controller = count(model, example).dense_flops, None
    if sparse:
        sparsify(model, gradient="straight_through")
        controller = SparsityController(model, Target(sparsity=0.9))
    optimizer = torch.optim.SGD(parameter_groups(model, 5e-4), lr=0.01, momentum=0.9, fused=fused or None)
    network = torch.compile(model) if compile else model
    images, labels = torch.randn(batch, 3, 32, 32).contiguous(memory_format=layout), torch.randint(10, (batch,))
    seconds = []
    for step in range(3 + steps):
        begin = time.process_time()
        with torch.autocast("cpu", enabled=bf16):
            loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if controller is not None:
            controller.step((step + 1) / 1000)
        seconds.append(time.process_time() - begin)
    return {"images_per_second": batch / min(seconds[3:]), "flops": flops}


def product_speed(size: int = 1024, rounds: int = 20) -> float:
    """Return the multiply-adds per CPU second of a matrix product with one thread."""
    torch.set_num_threads(1)
    a, b, seconds = torch.randn(size, size), torch.randn(size, size), []
    for _ in range(rounds):
        begin = time.process_time()
        a @ b
        seconds.append(time.process_time() - begin)
    return size**3 / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--one", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.steps, **VARIANTS[options.one])))
        return
    best: dict[str, dict[str, float]] = {}
    peak = 0.0
    for _ in range(options.rounds):
        peak = max(peak, product_speed())
        for name in options.variants:
            command = [sys.executable, "-m", "benchmarks.speed.cifar_speed", "--steps", str(options.steps)]
            command += ["--one", name]
            found = json.loads(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            )
            if name not in best or found["images_per_second"] > best[name]["images_per_second"]:
                best[name] = found
    for result in best.values():  # the backward pass takes twice the multiply-adds of the forward pass
        result["share_of_product"] = 3 * result["flops"] * result["images_per_second"] / peak
    write("cifar_speed", {"product_flops_per_second": peak, "variants": best})


if __name__ == "__main__":
    main()
