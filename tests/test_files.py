import array
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import safetensors.torch
import torch

from str_triton.files import (
    beside,
    is_safetensors,
    percent,
    printable,
    replacing,
    with_sorted_header,
    write_atomically,
)

NO_SPACE = 28


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.parametrize(
    ("blocks", "content"),
    [
        ((), b""),
        ((b"a", bytearray(b"b"), memoryview(b"c")), b"abc"),
        (("caf\u00e9\n",), b"caf\xc3\xa9\n"),
        ((np.arange(3, dtype="<u2"), "x", array.array("B", [7])), b"\0\0\1\0\2\0x\7"),
        ((np.ones((100, 100)),), np.ones((100, 100)).tobytes()),
    ],
)
def test_the_blocks_follow_one_another(tmp_path: Path, blocks: tuple, content: bytes):
    (tmp_path / "file").write_bytes(b"what was there before, and longer than most")
    for path in (tmp_path / "file", str(tmp_path / "new")):
        write_atomically(path, *blocks)
        assert Path(path).read_bytes() == content
    assert names(tmp_path) == ["file", "new"]


def test_until_the_end_the_old_file_is_there(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new" * 100_000)
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" * 100_000


@pytest.mark.parametrize(
    "error", [ValueError, KeyboardInterrupt, SystemExit, lambda: OSError(NO_SPACE, "of another file")]
)
def test_whatever_is_raised_leaves_the_old_file_alone(tmp_path: Path, error: Callable[[], BaseException]):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    raised = error()
    with pytest.raises(type(raised)) as caught, replacing(path) as file:  # noqa: PT012
        file.write(b"new")
        raise raised
    assert caught.value is raised
    assert (names(tmp_path), path.read_bytes()) == (["file"], b"old")


@pytest.mark.parametrize("failing", ["fsync", "replace", "chmod"])
def test_a_failure_at_the_end_names_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str):
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error", "the draft", None, "another")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match=f"Input/output error: {str(path)!r}$"):
        write_atomically(path, b"new")
    assert (names(tmp_path), path.read_bytes()) == (["file"], b"old")


def save(file: BinaryIO) -> None:
    torch.save({"weights": torch.zeros(20_000)}, file)  # wraps an OSError into a RuntimeError


def swallow(file: BinaryIO) -> None:
    with suppress(OSError):
        file.write(bytes(100_000))


@pytest.mark.parametrize(
    "write", [save, swallow, lambda file: file.write(bytes(40_001))], ids=["save", "swallow", "write"]
)
def test_a_write_that_fails_is_never_forgotten(
    tmp_path: Path, file_size_limit: Callable, write: Callable[[BinaryIO], object]
):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    too_large = pytest.raises(OSError, match="File too large")
    with too_large as caught, file_size_limit(40_000), replacing(path) as file:
        write(file)
    assert caught.value.filename == str(path)
    assert (names(tmp_path), path.read_bytes()) == (["file"], b"old")


def test_file_and_folder_are_forced_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def fsync(descriptor: int, real: Callable[[int], None] = os.fsync) -> None:
        status = os.fstat(descriptor)
        calls.append(
            (stat.S_ISDIR(status.st_mode), status.st_size if stat.S_ISREG(status.st_mode) else names(tmp_path))
        )
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "file", b"four")
    assert calls == [(False, 4), (True, ["file"])]  # the content before the rename, the rename after it


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_permissions_are_those_of_a_plainly_written_file(tmp_path: Path, umask: None):
    (tmp_path / "plain").write_bytes(b"")
    for mode in (None, 0o600, 0o755):
        path = tmp_path / f"{mode}"
        if mode is not None:
            path.write_bytes(b"old")
            path.chmod(mode)
        write_atomically(path, b"new")
        expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode) if mode is None else mode
        assert stat.S_IMODE(path.stat().st_mode) == expected


@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_is_followed(tmp_path: Path, exists: bool):
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "file"
    if exists:
        target.write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to(Path("folder") / "file")
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["folder", "link"]
    assert names(tmp_path / "folder") == ["file"]


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    "make", [Path.mkdir, make_pipe, lambda path: path.symlink_to("/dev/null"), lambda path: path.symlink_to(path)],
    ids=["folder", "pipe", "link to a device", "link to itself"],
)  # fmt: skip
def test_what_is_no_file_is_not_replaced(tmp_path: Path, make: Callable[[Path], None]):
    path = tmp_path / "path"
    make(path)
    before = path.lstat()
    with pytest.raises(OSError, match=r"exists and is no regular file|Too many levels") as caught:
        write_atomically(path, b"x")
    assert caught.value.filename == str(path)
    assert (names(tmp_path), path.lstat().st_ino) == (["path"], before.st_ino)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_missing_folder_is_named_by_what_was_asked_for(tmp_path: Path):
    path = tmp_path / "none" / "file"
    with pytest.raises(FileNotFoundError, match="No such file") as caught:
        write_atomically(path, b"x")
    assert caught.value.filename == str(path)


def test_the_longest_name_can_be_written(tmp_path: Path):
    for name in ("x" * 255, "\u00e9" * 127, "\U0001f600" * 63):
        write_atomically(tmp_path / name, b"x")
        assert (tmp_path / name).read_bytes() == b"x"
        assert beside(tmp_path / name) != beside(tmp_path / name)


def test_a_kill_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = f"""
import os, signal
from str_triton.files import replacing
with replacing({str(path)!r}) as file:
    file.write(b"new" * 100_000)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], timeout=120).returncode == -9
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (struct.pack("<Q", 2) + b"{}", True),
        (struct.pack("<Q", 2) + b" {}", False),
        (b"PK\x03\x04 and more", False),
        (b"", False),
        (b"{", False),
    ],
)
def test_safetensors_are_told_by_their_beginning(tmp_path: Path, content: bytes, expected: bool):
    (tmp_path / "file").write_bytes(content)
    assert is_safetensors(tmp_path / "file") is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layer.0|weight of 30 caf\u00e9s \u4e2d", "layer.0|weight of 30 caf\u00e9s \u4e2d"),
        ("\x1b[2J\x1b]0;owned\x07", r"\x1b[2J\x1b]0;owned\x07"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\x9b31m\u2028\u200b\udc80", r"\x9b31m\u2028\u200b\udc80"),
    ],
)
def test_nothing_printable_acts_on_a_terminal(text: str, expected: str):
    assert printable(text) == expected
    assert printable(expected) == expected


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0.00 %"),
        (0.9, "90.00 %"),
        (1, "100.00 %"),
        (1 - 29 / 589_824, "99.995 %"),
        (1 / 589_824, "0.0002 %"),
        (1 - 1e-15, "99.9999999999999 %"),
        (0.99994, "99.99 %"),
    ],
)
def test_a_share_is_not_rounded_to_none_or_all(share: float, text: str):
    assert percent(share) == text


def test_a_safetensors_file_with_a_sorted_header_holds_the_same(tmp_path: Path):
    tensors = {"b": torch.arange(3), "a.1": torch.randn(2, 5), "a": torch.zeros(0), "c": torch.tensor(1.5)}
    metadata = {str(number): "x" * number for number in range(20)}
    (tmp_path / "model.safetensors").write_bytes(with_sorted_header(safetensors.torch.save(tensors, metadata)))
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    header = (tmp_path / "model.safetensors").read_bytes()[8:]
    assert header.index(b'"0":""') < header.index(b'"1":"x"') < header.index(b'"10":') < header.index(b'"2":')
