"""ResNet-50's training step at batch 256 in bfloat16 and channels_last: dense, sparsified, and to an exact budget.

A turn is as many steps as lie between two solves of the controller, one solve among them. The networks take turns, so a
ratio is free of what the card's clock does meanwhile. Compiled networks are compiled one after the other.
"""

import time
from statistics import median

import torch
from torch import nn

from benchmarks.gpu.part import Session
from benchmarks.gpu.solve import tiny
from benchmarks.speed.training_step import Step
from benchmarks.timing import alternating, median_ratio, synchronize
from str_triton import sparsify
from str_triton.cnn.resnet import resnet50

CALLS = 20  # as many steps as a controller's interval


class ControlledStep(Step):
    """A training step after which the controller takes its own."""

    def __call__(self) -> None:
        super().__call__()
        self.controller.step(0.5)


def run(session: Session, compiled: bool) -> None:
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    batch_size, image_size = session.pick((256, 224), (2, 8))
    backend = session.pick("inductor", "eager") if compiled else None
    options = {"device": session.device, "autocast": True, "backend": backend}
    steps: dict[str, Step] = {}
    session.report(batch_size=batch_size, image_size=image_size, warm_up_seconds={})
    for name, sparse, exact in (("dense", False, False), ("str", True, False), ("exact", True, True)):
        model: nn.Module = session.pick(resnet50, tiny)()
        model = sparsify(model) if sparse else model
        step = (ControlledStep if exact else Step)(model, batch_size, image_size, controlled=exact, **options)
        begin = time.perf_counter()
        for _ in range(session.pick(5, 1)):
            step()
        synchronize()
        warm_up = session.result["warm_up_seconds"] | {name: time.perf_counter() - begin}
        steps[name] = step
        # What stands in the file if time runs out before all three are compiled.
        session.report(warm_up_seconds=warm_up, **figures(steps, rounds=1, calls=session.pick(5, 1)))
    session.report(**figures(steps, rounds=session.pick(5, 1), calls=session.pick(CALLS, 1)))
    if session.device == "cuda":
        session.report(peak_memory=torch.cuda.max_memory_allocated())


def figures(steps: dict[str, Step], rounds: int, calls: int) -> dict[str, object]:
    """Return each network's milliseconds a step, and its ratio to the dense one's."""
    seconds = alternating(dict(steps), rounds, warmup=0, calls=calls)
    return {
        "rounds": rounds,
        "steps_per_turn": calls,
        "ms": {name: 1e3 * median(found) for name, found in seconds.items()},
        "ratio_to_dense": {name: median_ratio(seconds, name, "dense") for name in steps},
    }
