"""Timing of functions that take turns in one process: medians, ratios, and a description of the machine."""

import json
import platform
import re
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def alternating(
    functions: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2, calls: int = 1, settle: int = 0
) -> dict[str, list[float]]:
    """Measure the seconds per call of each function in each of `rounds` rounds. All functions take a turn in a round.

    A turn has `settle` calls that are not timed, and then `calls` timed ones. Short functions need the former, because
    the function before may have left memory that the heap gives back at the next free.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(warmup + rounds):
        for name, function in functions.items():
            for _ in range(settle):
                function()
            synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            synchronize()
            if index >= warmup:
                seconds[name].append((time.perf_counter() - begin) / calls)
    return seconds


def median_ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """Return the median over the rounds of the ratio of two functions' times in the same round."""
    return median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """Return versions and hardware, for a result file."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": processor or platform.processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "str-triton")},
    }


def version(name: str) -> str | None:
    """Return the version of a distribution; None if it is not installed, or if triton has another name."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def in_file_names(processor: str) -> str:
    """Return a processor's name as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", processor.lower()).strip("_")


def write(name: str, result: dict[str, Any]) -> None:
    """Write benchmarks/results/NAME.json, with the machine and the results."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")
    print(f"wrote {path}")
