"""These tests run kernels in Triton's interpreter; tests/test_interpreter.py starts them as they need to be started."""

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("run these as TRITON_INTERPRET=1 pytest tests/interpreter")

import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True, scope="session")
def _language_is_replaced_once() -> Iterator[None]:
    """Save time: the interpreter does it at every launch, and again at every call of a function in a kernel."""
    if not hasattr(interpreter, "_LangPatchScope"):  # another version of Triton
        yield
        return
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda kernel: interpreter._LangPatchScope())
        yield
    scope.restore()
