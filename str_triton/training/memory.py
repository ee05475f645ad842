"""The memory of a training process on the CPU."""

import ctypes

# Options of mallopt in malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Make the C library keep memory that this process frees, for the next step.

    By default glibc returns large blocks to the system and gets them back at the next step, page by page. For ResNet20
    on 32x32 images that takes a tenth of the time of a step (benchmarks/speed/cifar_speed.py). The process then holds
    as much memory as at its peak. C libraries without mallopt stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, 2**31 - 1)  # the heap does not shrink
        mallopt(TOP_PAD, 64 * 2**20)  # and grows in large steps
        mallopt(MMAP_MAX, 0)  # blocks of any size come from the heap
