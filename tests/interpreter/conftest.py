"""These tests run kernels in Triton's interpreter; tests/test_interpreter.py starts them as they need to be started."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("run these as TRITON_INTERPRET=1 pytest tests/interpreter")
