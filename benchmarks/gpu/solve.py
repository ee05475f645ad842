"""A solve of the controller on ResNet-50, and the selection in it beside the bytes that it has to read.

The host must not wait for the device: PyTorch raises an error where it does.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.gpu.part import Session
from benchmarks.timing import synchronize
from str_triton import SparsityController, Target, sparsify
from str_triton.budget.cuts import critical_offsets
from str_triton.budget.select import select
from str_triton.cnn.resnet import resnet50

BYTES = 5 * 4  # per element: four histograms and the least value above the cut each read a float32


def run(session: Session) -> None:
    model = sparsify(session.pick(resnet50, tiny)().to(session.device))
    controller = SparsityController(model, Target(sparsity=0.9))
    for i in range(2):  # compiles, and goes where a solve is like those of training
        controller.step(0.3 + 0.1 * i)
    host, total = timed(controller.solve, session.pick(20, 2))
    session.report(interval=controller.interval, solve_ms=total, solve_host_ms=host)
    with torch.no_grad():
        values = [critical_offsets(layer, torch.zeros(()).to(layer.raw))[0] for layer in controller._layers]
    costs, keep = [layer.cost for layer in controller._layers], torch.full((), controller._keep, device=session.device)
    host, total = timed(lambda: select(values, costs, keep), session.pick(20, 2))
    elements = sum(value.numel() for value in values)
    session.report(elements=elements, select_ms=total, select_host_ms=host)
    session.report(select_gb_per_s=BYTES * elements / total / 1e6, agrees_with_a_sort=matches(values, keep))
    session.report(waits_for_the_device=waits(controller.solve, session.device))


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000))


def timed(function: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Return the median milliseconds until the function returns, and until the device is done."""
    host, total = [], []
    for _ in range(rounds):
        synchronize()
        begin = time.perf_counter()
        function()
        host.append(1e3 * (time.perf_counter() - begin))
        synchronize()
        total.append(1e3 * (time.perf_counter() - begin))
    return median(host), median(total)


def matches(values: list[Tensor], keep: Tensor) -> bool:
    """Return whether the selection for costs of 1 is that of a sort."""
    below, above = select(values, [1] * len(values), keep)
    ordered = torch.cat([value.flatten() for value in values]).sort(descending=True).values
    want = ordered[int(keep)]
    return bool((below == want) & (above == ordered[ordered > want].amin()))


def waits(function: Callable[[], object], device: str) -> bool:
    """Return whether the function waits for the device somewhere."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return False
