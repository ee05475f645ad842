"""compute-sanitizer, where it exists, on two tests: reads and writes out of bounds, and races in shared memory."""

import os
import shutil
import subprocess

from benchmarks.gpu.gpu_tests import pytest
from benchmarks.gpu.part import Session

TESTS = {  # a file, and which of its tests
    "memcheck": ("tests/ops/test_soft_threshold_gpu.py", "layouts"),
    "racecheck": ("tests/ops/test_low_rank_gpu.py", "precisions and ieee and gru"),
}
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")
FOUND = 9  # compute-sanitizer's exit status where it has found something
STUB = '#!/bin/sh\nshift 4\nexec "$@"\n'


def run(session: Session) -> None:
    executable = find(session)
    session.report(executable=executable)
    # Each tensor in memory of its own: PyTorch's cache would hide what lies out of bounds.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool, (file, names) in TESTS.items() if executable else ():
        command, folder = pytest(session)
        command += session.pick([file, "-k", names], ["test_rehearsal.py", "-k", "1"])
        options = ["--tool", tool, "--error-exitcode", str(FOUND)]
        try:
            result = subprocess.run(
                [executable, *options, *command],
                cwd=folder, env=environment, capture_output=True, text=True, timeout=session.seconds_left() / 2,
            )  # fmt: skip
            figures = {"status": result.returncode, "end": (result.stdout + result.stderr).splitlines()[-20:]}
        except subprocess.TimeoutExpired:
            figures = {"status": None, "end": ["took too long"]}
        session.report(**{tool: {"file": file, "names": names, **figures}})


def find(session: Session) -> str | None:
    """Return compute-sanitizer's path, in a rehearsal that of a stub; None where there is none."""
    if session.device == "cuda":
        found = (shutil.which("compute-sanitizer", path=path) for path in (None, *PLACES))
        return next((path for path in found if path), None)
    stub = session.folder / "compute-sanitizer"
    stub.write_text(STUB)
    stub.chmod(0o755)
    return str(stub)
