"""Compiles kernels.c once per machine with the system's compiler; the user's cache folder keeps the library."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.c")
HEADERS = tuple(sorted(SOURCE.parent.glob("*.h")))
COMPILERS = ("cc", "gcc", "clang")
_BASE = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-ffp-contract=fast")
# Tried in this order until a set compiles and its library loads. OpenMP first: without it there is one thread.
FLAGS = (
    (*_BASE, "-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    (*_BASE, "-march=native", "-fopenmp"),
    (*_BASE, "-mcpu=native", "-fopenmp"),
    (*_BASE, "-fopenmp"),
    (*_BASE, "-march=native"),
    (*_BASE,),
)


class BuildError(RuntimeError):
    """The error where there is no compiler, or none that compiles kernels.c."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; None, with one warning, where they cannot be compiled."""
    try:
        with tempfile.TemporaryDirectory() as scratch:  # For this process alone, where there is no cache.
            try:
                return load(build(cache_folder()))
            except OSError:
                return load(build(Path(scratch)))
    except (BuildError, OSError) as error:
        warnings.warn(f"sparse layers run by torch alone, without the kernels in C: {error}", stacklevel=2)
        return None


def cache_folder() -> Path:
    """Return where compiled kernels are kept: $XDG_CACHE_HOME/str_triton, else ~/.cache/str_triton.

    Raises OSError where the user's home folder is unknown.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else _home() / ".cache") / "str_triton"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:  # No $HOME, and the user is unknown.
        raise OSError(str(error)) from error


def build(folder: Path, flag_sets: tuple[tuple[str, ...], ...] = FLAGS) -> Path:
    """Return the path of a library in `folder`, compiled now if there is none for this source, compiler and processor.

    Several processes may build at once: each compiles in a folder of its own, and the last rename wins.

    Raises:
        BuildError: no compiler is found ($CC, cc, gcc, clang), or it fails with every set of flags.
        OSError: the folder cannot be written, or other users can write it: their libraries would run here.
    """
    compiler = _compiler()
    key = hashlib.sha256()
    for part in (
        *(path.read_bytes() for path in (SOURCE, *HEADERS)),
        _version(compiler),
        repr((compiler, flag_sets)),
        _processor(),
    ):
        key.update(part if isinstance(part, bytes) else part.encode())
    stem = f"kernels-{key.hexdigest()[:20]}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_own(folder)
    for path in folder.glob(f"{stem}-*.so"):
        if path.stem == _name(stem, path):  # A damaged library is not loaded: it could end the process.
            _require_own(path)
            return path
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = _compile(compiler, flag_sets, Path(scratch))
        path = folder / f"{_name(stem, made)}.so"
        os.replace(made, path)
    return path


def _require_own(path: Path) -> None:
    """Raise OSError for a file or a folder that belongs to another user, or that others may change."""
    status = path.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise PermissionError(f"{path} belongs to another user, or others can write it")


def _name(stem: str, library: Path) -> str:
    """Return the file name, without its suffix, of a library with these contents."""
    return f"{stem}-{hashlib.sha256(library.read_bytes()).hexdigest()[:20]}"


def load(path: Path) -> ctypes.CDLL:
    """Return the library with its functions' types declared."""
    lib = ctypes.CDLL(str(path))
    lib.str_triton_run.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    lib.str_triton_run.restype = None
    lib.str_triton_recurrent.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    lib.str_triton_recurrent.restype = None
    lib.str_triton_recurrent_scratch.argtypes = (ctypes.c_void_p,)
    lib.str_triton_recurrent_scratch.restype = ctypes.c_int64
    lib.str_triton_lanes.argtypes = ()
    lib.str_triton_lanes.restype = ctypes.c_int64
    return lib


def _compiler() -> list[str]:
    if chosen := os.environ.get("CC"):
        return shlex.split(chosen)
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise BuildError(f"no C compiler was found ($CC, {', '.join(COMPILERS)})")


def _version(compiler: list[str]) -> str:
    try:
        return subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C compiler {shlex.join(compiler)!r} does not run: {error}") from error


def _processor() -> str:
    """Return what -march=native depends on, since different machines may share a cache folder."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(kept)])


def _compile(compiler: list[str], flag_sets: tuple[tuple[str, ...], ...], folder: Path) -> Path:
    said = ""
    for number, flags in enumerate(flag_sets):
        path = folder / f"{number}.so"
        command = [*compiler, *flags, str(SOURCE), "-o", str(path), "-lm"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=300)
            said = said or result.stderr.strip()
            if result.returncode == 0:
                load(path)
                return path
        except (OSError, AttributeError, subprocess.SubprocessError) as error:
            said = said or str(error)
    raise BuildError(
        f"{shlex.join(compiler)!r} fails on {SOURCE.name}: {said.splitlines()[0] if said else 'no output'}"
    )
