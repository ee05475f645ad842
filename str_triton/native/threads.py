"""The number of threads that the kernels use."""

import os

import torch

_is_forked = False


def _note_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def is_forked() -> bool:
    """Check whether this is a forked child, where OpenMP waits for its parent's threads, in torch's operations too."""
    return _is_forked


def thread_count() -> int:
    """Return how many threads the kernels use: one in a forked child."""
    return 1 if _is_forked else torch.get_num_threads()
