"""The time of a plan, step by step."""

import ctypes
import functools
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from str_triton.deploy.sparse.graph.nodes import Convolution, Input, Linear, Node
from str_triton.deploy.sparse.graph.pointwise import Pointwise
from str_triton.deploy.sparse.graph.pools import AvgPool, MaxPool, Mean
from str_triton.deploy.sparse.graph.recurrent import Recurrent
from str_triton.deploy.sparse.runtime.plan import Plan, Segment

PASSES = 30


def profile(plan: Plan, inputs: Sequence[Tensor], passes: int = PASSES) -> list[tuple[str, str, float]]:
    """Return layer, kind and milliseconds of every step of a plan: medians over several passes through the network."""
    rows: dict[tuple[int, int], tuple[str, str]] = {}
    seconds: dict[tuple[int, int], list[float]] = {}
    threads = torch.get_num_threads()

    def timed(step: tuple[int, int], node: Node, task: str, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = call()
        seconds.setdefault(step, []).append(time.perf_counter() - begin)
        rows[step] = (getattr(node, "label", "") or node.name, _kind(node, task))
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
                    call = functools.partial(plan.library.str_triton_run, ctypes.addressof(stage), 1, threads)
                    for _ in range(segment.groups):
                        timed((index, number), task.node, task.kind, call)
                del held
    groups = {index: segment.groups for index, segment in enumerate(plan.segments) if isinstance(segment, Segment)}
    return [(*rows[step], 1e3 * median(seconds[step]) * groups.get(step[0], 1)) for step in rows]


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
