"""This machine's processor, and the user's cache folder for what was found or made for it.

This module needs only the standard library, and every package but `kernels` may import it.
"""

import os
import platform
import stat
from pathlib import Path


def processor() -> str:
    """Return the name of the processor: the model's name on Linux, elsewhere what the system says."""
    name = next((line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def processor_features() -> str:
    """Return the names and instruction sets of all processors: different machines may share a cache folder."""
    kept = {line for line in _cpuinfo() if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(kept)])


def _cpuinfo() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.exists() else []


def cache_folder() -> Path:
    """Return the folder for compiled kernels and measurements: $XDG_CACHE_HOME/str_triton, else ~/.cache/str_triton.

    Raises OSError where the user's home folder is unknown.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else _home() / ".cache") / "str_triton"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:  # No $HOME, and the user is unknown.
        raise OSError(str(error)) from error


def own_folder(folder: Path) -> Path:
    """Make a folder of the user's own if there is none, and return it.

    Raises OSError if it cannot be written, or if it belongs to another user or others may write it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_own(folder)
    return folder


def require_own(path: Path) -> None:
    """Raise OSError for a file or a folder that belongs to another user, or that others may change."""
    status = path.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise PermissionError(f"{path} belongs to another user, or others can write it")
