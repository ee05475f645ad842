"""The sizes of packed checkpoints with the published budgets, layer by layer, and random weights and masks.

    python -m benchmarks.studies.packed_sizes

Every network is packed with float32 and with float16 values, read back, and compared, bit for bit in float32. Times are
medians of three runs on one thread, including the disk.
"""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.timing import write
from str_triton import deploy
from str_triton.cnn.models import build
from str_triton.cnn.published import POINTS, layer_sparsities

ROUNDS = 3
GOALS = {"float32": 12.8e6, "float16": 8e6}  # bytes, ResNet50 at 90.23 %
MOBILENET = 89.01  # the only sparsity of MobileNetV1 for which layers were published


def masked(name: str, sparsity: float) -> nn.Module:
    """Return the network with random zeros, with the published number in each layer."""
    torch.manual_seed(0)
    model = build(name)
    with torch.no_grad():
        for layer, percent in layer_sparsities(name, sparsity).items():
            weight = model.get_submodule(layer).weight
            zeros = torch.randperm(weight.numel())[: round(weight.numel() * percent / 100)]
            weight.view(-1)[zeros] = 0
    return model


def measure(model: nn.Module, values: str, path: Path) -> dict[str, Any]:
    """Measure bytes and seconds."""
    seconds: dict[str, list[float]] = {"pack": [], "unpack": []}
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        summary = deploy.pack(model, path, values)
        middle = time.perf_counter()
        state = deploy.unpack(path)
        seconds["pack"].append(middle - begin)
        seconds["unpack"].append(time.perf_counter() - middle)
    expected = model.state_dict()
    for name, tensor in expected.items():
        stored = tensor.half().float() if values == "float16" and tensor.dim() > 1 else tensor
        assert torch.equal(state[name], stored), name
    return {
        "bytes": path.stat().st_size,
        "dense_bytes": summary.dense_nbytes,
        "nonzeros": sum(tensor.nonzeros for tensor in summary.tensors),
        "elements": sum(tensor.elements for tensor in summary.tensors),
        "pack_seconds": round(median(seconds["pack"]), 3),
        "unpack_seconds": round(median(seconds["unpack"]), 3),
    }


def main() -> None:
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    cases = [(point.model, point.sparsity) for point in POINTS if point.model == "resnet50"]
    with tempfile.TemporaryDirectory() as folder:
        for name, sparsity in [*cases, ("mobilenetv1", MOBILENET)]:
            model = masked(name, sparsity)
            own = {values: measure(model, values, Path(folder) / "x") for values in GOALS}
            result[f"{name} {sparsity:.2f}"] = own
            print(name, sparsity, *(f"{values} {figures['bytes'] / 1e6:.2f} MB" for values, figures in own.items()))
    for values, goal in GOALS.items():
        reached = result["resnet50 90.23"][values]["bytes"]
        print(f"resnet50 90.23 {values}: {reached / 1e6:.2f} MB, goal {goal / 1e6:g} MB: {reached <= goal}")
    write("packed_sizes", {"sizes": result})


if __name__ == "__main__":
    main()
