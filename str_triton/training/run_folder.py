"""The directory of a run: created atomically, and locked by one process at a time."""

import errno
import fcntl
import os
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO

from str_triton.files import beside, sync_folder, write_atomically
from str_triton.training.errors import UserError, one_line

LOCK = "lock"
CONFIG = "config.json"


class RunFolder:
    """A run's directory, locked. Use `create` for a new run and `reopen` to resume one.

    The lock is a POSIX record lock. The kernel releases it when the process ends, however it ends. Worker processes,
    which may outlive a killed parent for some seconds, do not inherit it.
    """

    def __init__(self, path: Path, lock: IO[str]) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, path: str | Path, files: Mapping[str, str]) -> "RunFolder":
        """Create ``path`` with these text files in it, atomically.

        Raises `UserError` if ``path`` is not empty, is in use, or cannot be made. Nothing is left behind then.
        """
        path = Path(path)
        _refuse_occupied(path)
        draft = beside(path)
        lock = None
        try:
            draft.mkdir(parents=True)
            lock = _lock(draft)
            for name, text in files.items():
                write_atomically(draft / name, text)
            os.rename(draft, path)
            sync_folder(path.parent)
        except OSError as error:
            if lock is not None:
                lock.close()
            shutil.rmtree(draft, ignore_errors=True)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another run has created it meanwhile
                _refuse_occupied(path)
            raise UserError(f"the run directory {path} cannot be made: {error.strerror or error}") from error
        return cls(path, lock)

    @classmethod
    def reopen(cls, path: str | Path) -> "RunFolder":
        """Open and lock the directory of a run that has ended or was killed.

        Raises `UserError` if another process holds the lock, or if the directory cannot be written.
        """
        path = Path(path)
        try:
            return cls(path, _lock(path))
        except OSError as error:
            raise UserError(f"the run directory {path} cannot be written: {one_line(error)}") from error

    @staticmethod
    def check(path: str | Path, *, resume: bool) -> None:
        """Raise `UserError` if `create` (with ``resume``, `reopen`) would. Call it before the data are read."""
        path = Path(path)
        if resume:
            RunFolder.reopen(path).close()
            return
        _refuse_occupied(path)
        parent = next(parent for parent in path.absolute().parents if parent.exists())
        usable = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
        if not usable:
            reason = os.strerror(errno.EACCES if parent.is_dir() else errno.ENOTDIR)
            raise UserError(f"the run directory {path} cannot be made: {reason}: {parent}")

    def write(self, name: str, content: bytes | str) -> None:
        """Write one file of the folder atomically."""
        write_atomically(self.path / name, content)

    def read(self, name: str) -> str:
        """Return the text of one file of the folder."""
        return (self.path / name).read_text()

    def close(self) -> None:
        """Release the lock. The folder is kept."""
        self._lock.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def default_run_dir(recipe: str) -> Path:
    """Return a path below runs/ that does not exist yet, named by recipe and time."""
    first = Path("runs") / f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    path, number = first, 2
    while path.exists():
        path, number = first.with_name(f"{first.name}-{number}"), number + 1
    return path


def _refuse_occupied(path: Path) -> None:
    try:
        if path.is_dir():
            occupied = any(path.iterdir())
        elif path.exists() or path.is_symlink():
            raise UserError(f"the run directory {path} cannot be made: a file of that name exists")
        else:
            return
        if occupied and (path / LOCK).exists():
            _lock(path).close()
    except OSError as error:
        raise UserError(f"the run directory {path} cannot be used: {one_line(error)}") from error
    if occupied and (path / CONFIG).exists():
        raise UserError(f"{path} already holds a run: resume it with --resume, or name another --run-dir")
    if occupied:
        raise UserError(f"the run directory {path} is not empty: name another --run-dir")


def _lock(directory: Path) -> IO[str]:
    """Lock the directory and return the lock's file. Raise `UserError` if another process holds the lock."""
    file = open(directory / LOCK, "a+", errors="replace")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise UserError(
            f"the run directory {directory} is in use by another run (process {owner or 'unknown'})"
        ) from error
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
