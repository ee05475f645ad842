import platform
import resource

import pytest
import torch

from str_triton.training.memory import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is one of glibc")
def test_freed_memory_is_used_again():
    keep_freed_memory()
    blocks, pages, faults = 6, 12 * 2**20 // resource.getpagesize(), []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        [torch.ones(3 * 2**20) for _ in range(blocks)]
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert faults[-1] < blocks * pages // 10
