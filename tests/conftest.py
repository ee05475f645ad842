"""Fixtures of every test: the gpu marker, and random numbers that are the same in every run and in every order."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

# No result may depend on this machine's speed. Programs that tests start inherit it.
os.environ["STR_TRITON_MEASURE"] = "0"

# Tests of kernels in Triton's interpreter need a process of their own: tests/test_interpreter.py starts it.
collect_ignore = ["interpreter"]


# Files of few tests that take long. Started last, they would keep one process busy while the others have nothing to do.
LONG = ("test_interpreter.py", "test_train_processes.py", "test_kernel_resources.py", "test_fully_shard.py",
        "test_examples.py", "test_packaging.py")  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the processes of `-n auto`: one more than the cores, since many tests wait for processes of their own."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):  # `item.keywords` holds the names of folders as well.
            item.add_marker(skip)


@pytest.fixture
def file_size_limit() -> Callable[[int], AbstractContextManager[None]]:
    """Limit, inside a with block, the bytes that a file may grow to: what a full disk looks like to a program.

    Only there, since the limit holds for the file that pytest's own output may go to as well.
    """

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32, "the test leaves another default dtype"
    assert not torch.overrides.has_torch_function((torch.empty(0),)), "the test leaves a default device or a mode"
