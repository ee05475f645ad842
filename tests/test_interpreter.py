"""Oracle 3: the kernels in Triton's interpreter, in a pytest process of their own.

TRITON_INTERPRET must be set before triton is imported, and it disables compilation, which other tests need.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (it is for Linux)")
def test_kernels_in_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/interpreter", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert re.search(r"\b[1-9]\d* passed\b", output), f"no test passed:\n{output}"
