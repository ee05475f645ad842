"""Atomic writing of files, recognition of file types, and texts that are safe to print.

This module needs only the standard library, and every package but `kernels` may import it.
"""

import errno
import io
import json
import os
import secrets
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

Block = Any  # a contiguous object with the buffer protocol; Python 3.12 names that collections.abc.Buffer

# Errors of network file systems that cannot sync a folder, and of folders that may be written but not listed.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)


def write_atomically(path: str | os.PathLike[str], *blocks: str | Block) -> None:
    """Write the blocks, one after the other, to the file `path`, atomically: see `replacing`.

    Blocks are texts, which are encoded as UTF-8, or contiguous objects with the buffer protocol.
    """
    with replacing(path) as file:
        for block in blocks:
            file.write(block.encode() if isinstance(block, str) else block)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield a binary file to write, which replaces `path` when the block ends.

    Until then it is a temporary file beside `path`. At the end it is synced to the disk and renamed, and the folder is
    synced as well, so after a crash or a power cut at any moment `path` holds either the old or the new content. If the
    block raises an exception, or a write fails (even if the block catches that error), the temporary file is removed
    and `path` is not changed.

    A symbolic link is followed: the file that it points to is replaced, as in plain writing. An existing file keeps its
    permissions. A new one gets those of the process's umask.

    Raises:
        OSError: the file cannot be written (a full disk, a missing folder), or `path` is a folder, a device or a pipe,
            which a rename would replace. The error names `path`, not the temporary file.
    """
    asked, target = os.fspath(path), Path(os.path.realpath(path))
    with _naming(asked):
        mode = _permissions(target)
        draft = _Draft(beside(target), asked)
    file = io.BufferedWriter(draft)
    try:
        yield file
        with _naming(asked):
            file.flush()
            if draft.failure is not None:
                raise draft.failure
            if mode is not None:
                os.chmod(draft.name, mode)
            os.fsync(draft.fileno())
            file.close()
            os.replace(draft.name, target)
            sync_folder(target.parent)
    except BaseException as error:
        with suppress(OSError):
            file.close()
        Path(draft.name).unlink(missing_ok=True)
        if draft.failure is not None and isinstance(error, Exception):  # A library may have wrapped the disk's error.
            raise draft.failure from None
        raise


def beside(path: Path) -> Path:
    """Return an unused hidden path in the folder of `path`, for a temporary file that will be renamed to it."""
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}")  # A name may have at most 255 bytes.


def sync_folder(folder: Path) -> None:
    """Sync a folder to the disk, so that a rename in it survives a power cut, if the system supports that."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders.
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Return whether a file begins like safetensors: a length of eight bytes, then JSON. Raise OSError as `open`."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def with_sorted_header(content: bytes) -> bytes:
    """Return a safetensors file whose header lists its entries in order: the library writes metadata in any order."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content[end:]


def printable(text: str) -> str:
    r"""Return `text` with each character that would control a terminal as an escape sequence (\n, \x1b, \u202e).

    Control characters can move the cursor or set the window's title, and Unicode's directional controls can reverse the
    order of the text. Use this for names from a file or an archive before printing them.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Draft(io.FileIO):
    """A temporary file in place of the requested one, which stores the error of the first write that failed."""

    def __init__(self, path: Path, asked: str) -> None:
        super().__init__(path, "x")
        self.asked = asked
        self.failure: OSError | None = None

    def write(self, data: Block) -> int:
        try:
            with _naming(self.asked):
                return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise


def percent(share: float, digits: int = 2) -> str:
    """Return a share, 0 to 1, as text in %: "90.00 %".

    A share close to 0 or 1 gets more digits, so that it does not read 0 or 100 %: 29 weights left of 589,824 are
    "99.995 %".
    """
    while 0 < share < 1 and float(f"{100 * share:.{digits}f}") in (0, 100):
        digits += 1
    return f"{100 * share:.{digits}f} %"


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Let all OSErrors of a block name the requested file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


def _permissions(target: Path) -> int | None:
    """Return the permissions of the file `target`; None if it does not exist. Raise OSError if it is not a file."""
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise OSError(errno.EEXIST, "exists and is no regular file", os.fspath(target))
    return stat.S_IMODE(mode)
