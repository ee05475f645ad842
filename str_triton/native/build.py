"""Compiles kernels.c once per machine with the system's compiler; the user's cache folder keeps the library."""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from str_triton.machine import cache_folder, own_folder, processor_features, require_own

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
        warnings.warn(f"torch runs alone, without the kernels in C: {error}", stacklevel=2)
        return None


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
        processor_features(),
    ):
        key.update(part if isinstance(part, bytes) else part.encode())
    stem = f"kernels-{key.hexdigest()[:20]}"
    own_folder(folder)
    for path in folder.glob(f"{stem}-*.so"):
        if path.stem == _name(stem, path):  # A damaged library is not loaded: it could end the process.
            require_own(path)
            return path
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = _compile(compiler, flag_sets, Path(scratch))
        path = folder / f"{_name(stem, made)}.so"
        os.replace(made, path)
    return path


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
    lib.str_triton_walk.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    lib.str_triton_walk.restype = None
    lib.str_triton_walk_scratch.argtypes = (ctypes.c_void_p,)
    lib.str_triton_walk_scratch.restype = ctypes.c_int64
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
