"""The kernels in C, compiled once per run of the tests and not into the user's cache."""

import ctypes
import shutil

import pytest

from str_triton.deploy.sparse import build


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
