"""The first lines of a run: the data, the model, the target, the machine and the folder."""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator

from str_triton.files import printable
from str_triton.training.environment import device_name


def opening(facts: Mapping[str, str], accelerator: Accelerator, folder: Path) -> str:
    """Return a line per fact, then the device and the run's folder, with the headings in one column."""
    lines = {**facts, "device": _device(accelerator), "folder": str(folder)}
    width = max(map(len, lines))
    return "\n".join(f"{heading:{width}}  {printable(text)}" for heading, text in lines.items())


def _device(accelerator: Accelerator) -> str:
    parts = [f"{accelerator.device}, {device_name(accelerator.device)}", number(torch.get_num_threads(), "thread")]
    if accelerator.num_processes > 1:
        parts.append(f"{accelerator.num_processes} processes")
    if accelerator.mixed_precision != "no":
        parts.append(accelerator.mixed_precision)
    return ", ".join(parts)


def number(count: int, noun: str) -> str:
    """Return a count with its noun: "1 thread", "1,437 images"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
