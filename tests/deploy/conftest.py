"""The kernels in C, compiled once per run of the tests and not into the user's cache."""

import ctypes
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from str_triton.deploy.sparse import compile, stopwatch
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.nodes import Graph
from str_triton.native import build


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Build the library that `compile_sparse` then finds and uses."""
    if not any(map(shutil.which, build.COMPILERS)):
        pytest.skip("no C compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        build.library.cache_clear()
        library = build.library()
    assert library is not None
    return library


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time little: what is chosen is left to chance."""
    monkeypatch.setattr(stopwatch, "ROUNDS", 1)
    monkeypatch.setattr(stopwatch, "EVICTED", 1024)


@pytest.fixture
def chosen(kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Callable[[Choice], None]:
    """Return a function that makes compile_sparse choose one execution for every layer that it fits, without timing."""

    def force(choice: Choice) -> None:
        def choose_it(graph: Graph, *_: Any, **__: Any) -> tuple[dict[str, Choice], bool]:
            return {node.name: choice for node in graph.layers()}, True

        monkeypatch.setattr(compile, "choose", choose_it)

    return force


@pytest.fixture
def by_kernels(chosen: Callable[[Choice], None]) -> None:
    """Leave every layer to the kernels that they can run."""
    chosen(Choice("sparse", 3, 2, 2))
