"""The kernels in C, compiled once per run of the tests and not into the user's cache."""

import ctypes
import shutil

import pytest

from str_triton.deploy.sparse import build, model
from str_triton.deploy.sparse.choice import Choice


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library as `compile_sparse` uses it, which then finds it in place of building one."""
    if not any(map(shutil.which, build.COMPILERS)):
        pytest.skip("no C compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        build.library.cache_clear()
        library = build.library()
    assert library is not None
    return library


@pytest.fixture
def by_kernels(kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer that the kernels can run is theirs, and nothing is timed."""
    monkeypatch.setattr(model, "choose", lambda graph, *_: {n.name: Choice("sparse", 3, 2, 2) for n in graph.layers()})
