"""The memory that a training process frees is kept for its next step."""

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

# glibc itself learns to keep blocks of up to 32 MiB; these have 40.
BLOCKS, ELEMENTS = 6, 10 * 2**20
# Page faults in each round of a process. In one of its own: the heap of a process that has run other tests may be
# fragmented, and its end blocked, so that a block lies elsewhere.
CODE = f"""
import resource
import torch
from str_triton.training.memory import keep_freed_memory
keep_freed_memory()
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.ones({ELEMENTS}) for _ in range({BLOCKS})]
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is one of glibc")
def test_freed_memory_is_used_again():
    command = [sys.executable, "-c", CODE]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=True)
    faults = [int(line) for line in result.stdout.split()]
    pages = 4 * ELEMENTS // resource.getpagesize()
    assert len(faults) == 6
    assert faults[-1] < BLOCKS * pages // 10
