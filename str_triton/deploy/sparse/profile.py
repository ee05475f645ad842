"""The time of a plan, step by step."""

import ctypes
import functools
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from str_triton.deploy.sparse.graph.nodes import Convolution, Input, Linear, Node
from str_triton.deploy.sparse.graph.pointwise import Pointwise
from str_triton.deploy.sparse.graph.pools import AvgPool, MaxPool, Mean
from str_triton.deploy.sparse.graph.recurrent import Recurrent
from str_triton.deploy.sparse.runtime.plan import Plan
from str_triton.deploy.sparse.runtime.segment import Segment

PASSES = 30


class Step(NamedTuple):
    """A step of a plan: its node, the kind of its task, and its place: the segment, and the number in it."""

    node: Node
    task: str
    place: tuple[int, int]


def profile(plan: Plan, inputs: Sequence[Tensor], passes: int = PASSES) -> list[tuple[str, str, float]]:
    """Return layer, kind and milliseconds of every step of a plan: medians over several passes through the network."""
    return [
        (label(step.node), _kind(step.node, step.task), 1e3 * median(seconds) * len(seconds) / passes)
        for step, seconds in step_times(plan, inputs, passes)
    ]


def step_times(plan: Plan, inputs: Sequence[Tensor], passes: int) -> list[tuple[Step, list[float]]]:
    """Return the seconds of every call of each step: one in a pass, or one for each group of images."""
    steps: dict[tuple[int, int], Step] = {}
    seconds: dict[tuple[int, int], list[float]] = {}
    threads = torch.get_num_threads()

    def timed(step: tuple[int, int], node: Node, task: str, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = call()
        seconds.setdefault(step, []).append(time.perf_counter() - begin)
        steps[step] = Step(node, task, step)
        return result

    for _ in range(passes):
        values: dict[str, Any] = dict(plan.fixed)
        given = iter(inputs)
        for index, segment in enumerate(plan.segments):
            if isinstance(segment, Input):
                values[segment.name] = next(given)
            elif not isinstance(segment, Segment):
                call = functools.partial(plan.value, segment, values)
                values[segment.name] = timed((index, 0), segment, "torch", call)
            else:
                held = segment.bind(values)
                for number, (task, stage) in enumerate(zip(segment.tasks, segment.stages, strict=True)):
                    if task.kind == "reshape":  # It takes no time.
                        continue
                    call = functools.partial(plan.library.str_triton_run, ctypes.addressof(stage), 1, threads)
                    for _ in range(segment.groups):
                        timed((index, number), task.node, task.kind, call)
                del held
    return [(steps[step], times) for step, times in seconds.items()]


def label(node: Node) -> str:
    """Return the name of the module that a node belongs to, or else its own."""
    return getattr(node, "label", "") or node.name


def _kind(node: Node, task: str) -> str:
    match node:
        case _ if task in ("copy", "quantize", "dequantize"):
            return "copy"
        case Pointwise():
            return "pointwise"
        case _ if task == "gate":
            return "pointwise"
        case Convolution():
            return "depthwise" if node.is_depthwise else "convolution"
        case Linear():
            return "linear"
        case MaxPool() | AvgPool() | Mean():
            return "pool"
        case Recurrent():
            return "recurrent"
    return "torch"
