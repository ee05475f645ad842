"""The card and what drives it."""

import os
import shutil
import subprocess
from typing import Any

import torch

from benchmarks import timing


def machine(device: str) -> dict[str, Any]:
    """Return the card, its driver and the versions. ValueError where there is no GPU and none is rehearsed."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU: torch.cuda.is_available() is False; --device cpu rehearses")
    found = timing.machine() | {"device": device, "driver": driver(), "cores": os.cpu_count()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "capability": list(torch.cuda.get_device_capability()),
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def driver() -> str | None:
    """Return the version of the NVIDIA driver; None where its tool is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.splitlines()[0].strip() if result.returncode == 0 and result.stdout.strip() else None
