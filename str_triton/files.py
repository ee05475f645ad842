"""Files: written whole or not at all, told apart by their first bytes, and texts fit to print.

The ground floor of the house: it needs the standard library alone, and every room may import it.
"""

import errno
import io
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

Block = Any  # a contiguous object with the buffer protocol; Python 3.12 names that collections.abc.Buffer

# How network file systems refuse to sync a folder, and a folder that one may write to but not list to be opened.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)


def write_atomically(path: str | os.PathLike[str], *blocks: str | Block) -> None:
    """Write the blocks, one after the other, as the file `path`: see `replacing`.

    blocks: texts, which become UTF-8, or contiguous objects with the buffer protocol.
    """
    with replacing(path) as file:
        for block in blocks:
            file.write(block.encode() if isinstance(block, str) else block)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Give a binary file to write, which takes the place of `path` once the block has ended.

    The file is a draft beside `path` until then. It is forced to the disk and renamed, and so is its folder's entry:
    after a crash or a power cut at any moment `path` holds the old content or the new one, whole. Where the block
    raises anything, or a write fails (even if the block swallows that error), the draft is removed and `path` is as it
    was.

    A symbolic link is followed: the file that it points to is replaced, as plain writing would do. An existing file
    keeps its permissions; a new one gets those that the process's umask gives.

    Raises:
        OSError: the file cannot be written (a full disk, a missing folder), or `path` is a folder, a device or a pipe,
            whose place a rename would take. The error names `path`, not the draft.
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
        if draft.failure is not None and isinstance(error, Exception):  # A library may have wrapped what the disk said.
            raise draft.failure from None
        raise


def beside(path: Path) -> Path:
    """Return a hidden name that is not taken, in the folder of `path`: for a draft that will be renamed to it."""
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}")  # A name may have 255 bytes.


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk, so that a rename in it survives a power cut, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders.
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
    """Whether a file begins as safetensors do: a length of eight bytes, then JSON. Raises OSError as `open` does."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def printable(text: str) -> str:
    r"""Return `text` with each character that would act on a terminal written as an escape (\n, \x1b, \u202e).

    Control characters move the cursor or set the window's title, and Unicode's controls of direction turn the order of
    what is read around. A name out of a file or an archive passes through here before it is printed.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Draft(io.FileIO):
    """A new file that stands for the one that was asked for, and remembers the first write that failed."""

    def __init__(self, path: Path, asked: str) -> None:
        super().__init__(path, "x")
        self.asked = asked
        self.failure: OSError | None = None

    def write(self, data: Block) -> int | None:
        try:
            with _naming(self.asked):
                return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise


def percent(share: float, digits: int = 2) -> str:
    """Return a share, 0 to 1, as text in %: "90.00 %".

    A share next to 0 or 1 has as many more digits as tell it from them: 29 weights left of 589,824 are "99.995 %".
    """
    while 0 < share < 1 and float(f"{100 * share:.{digits}f}") in (0, 100):
        digits += 1
    return f"{100 * share:.{digits}f} %"


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Let the OSErrors of a block name the file that was asked for, whatever file they are about."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


def _permissions(target: Path) -> int | None:
    """Return the permissions of the file at `target`, None where there is none; OSError for anything but a file."""
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise OSError(errno.EEXIST, "exists and is no regular file", os.fspath(target))
    return stat.S_IMODE(mode)
