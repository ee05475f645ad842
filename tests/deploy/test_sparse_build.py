"""The kernels are compiled once, with whatever compiler there is; without one, torch runs all."""

import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.utils.prune

from str_triton import deploy
from str_triton.cnn.models import build as build_network
from str_triton.native import build
from tests.deploy.sparse_networks import prune, same
from tests.messages import holding

pytestmark = [pytest.mark.usefixtures("kernels", "quick"), pytest.mark.filterwarnings("ignore:Sparse CSR")]


@pytest.fixture
def no_library():
    build.library.cache_clear()
    yield
    build.library.cache_clear()


def test_without_a_compiler_torch_runs_all_and_says_so_once(no_library, tmp_path, monkeypatch, by_kernels):
    model, x = prune(build_network("resnet-digits", num_classes=10, in_channels=1)), torch.randn(1, 1, 8, 8)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.warns(UserWarning, match=holding("$CC .. cc .. gcc .. clang")):
        compiled = deploy.compile_sparse(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(model, compiled, x)
        same(model, deploy.compile_sparse(model, x), x)


def test_without_a_compiler_layers_are_timed(no_library, tmp_path, monkeypatch):
    model, x = prune(build_network("resnet-digits", num_classes=10, in_channels=1)), torch.randn(1, 1, 8, 8)
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="the C compiler 'false' does not run"):
        compiled = deploy.compile_sparse(model, x)
    same(model, compiled, x)
    assert {choice.execution for choice in compiled.choices.values()} <= {"dense", "channels_last", "csr"}


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_compiler_that_fails_leaves_nothing_and_is_quoted(tmp_path, monkeypatch):
    failing = script(tmp_path / "cc", '[ "$1" = --version ] && exit 0\necho "kernels.c:1: no such luck" >&2\nexit 1\n')
    monkeypatch.setenv("CC", failing)
    with pytest.raises(build.BuildError, match=holding("kernels.c:1: no such luck")):
        build.build(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_library_is_compiled_once_per_compiler_and_flags(tmp_path, monkeypatch):
    flags = (("-O0", "-std=gnu11", "-fPIC", "-shared"),)
    path = build.build(tmp_path, flags)
    before = path.stat().st_mtime_ns
    assert build.build(tmp_path, flags) == path
    assert path.stat().st_mtime_ns == before
    assert build.build(tmp_path, ((*flags[0], "-DOTHER"),)) != path
    assert len(list(tmp_path.iterdir())) == 2
    refused = build.build(tmp_path / "b", (("--no-such-flag",), *flags))
    assert build.load(refused).str_triton_lanes() in (4, 8, 16)


@pytest.fixture
def quick_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.build, "__defaults__", ((("-O0", "-std=gnu11", "-fPIC", "-shared"),),))


def test_a_cache_folder_that_cannot_be_written(no_library, quick_flags, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.library().str_triton_lanes() in (4, 8, 16)


def test_no_home(no_library, quick_flags, monkeypatch):
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert build.library().str_triton_lanes() in (4, 8, 16)


@pytest.mark.parametrize("others", [0o020, 0o002])
def test_what_others_can_write_is_not_loaded(no_library, quick_flags, tmp_path, monkeypatch, others):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "str_triton").mkdir()
    (tmp_path / "str_triton").chmod(0o755 | others)
    assert build.library().str_triton_lanes() in (4, 8, 16)  # compiled for this process alone
    assert list((tmp_path / "str_triton").iterdir()) == []
    (tmp_path / "str_triton").chmod(0o755)
    path = build.build(tmp_path / "str_triton")
    path.chmod(0o755 | others)
    with pytest.raises(OSError, match="others can write it"):
        build.build(tmp_path / "str_triton")


def test_a_forked_child_does_not_wait_for_its_parents_threads(tmp_path):
    """Neither for those of OpenMP, nor for one that was inside a call."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, timeout=240)
    assert (run.returncode, run.stdout) == (0, "0\n"), run.stderr


FORK = """
import os, threading, torch
from str_triton import deploy

torch.set_num_threads(2)
model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3)).eval()
x = torch.randn(1, 4, 32, 32)
compiled = deploy.compile_sparse(model, x, tune=False)
many, more = torch.cat([x] * 8), torch.cat([x] * 9)
wanted = compiled(many)[:1]  # in which torch, too, uses both threads
compiled._lock.acquire()  # as a thread inside a call has it
child = os.fork()
if child == 0:
    again = deploy.compile_sparse(model, x, tune=False)
    same = all(torch.allclose(net(more)[:1], wanted, atol=1e-5) for net in (compiled, again))
    os._exit(0 if same and torch.get_num_threads() == 2 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("size", [0, 1000, 9000])
def test_a_damaged_library_is_compiled_again(quick_flags, tmp_path, size):
    path = build.build(tmp_path / "a path")
    whole = path.read_bytes()
    path.unlink()  # or the process, which has loaded it, would end in a bus error
    path.write_bytes(whole[:size])
    again = build.build(tmp_path / "a path")
    assert len(again.read_bytes()) == len(whole)
    assert build.load(again).str_triton_lanes() in (4, 8, 16)
