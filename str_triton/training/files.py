"""Writing a file so that it is either the old one or the new one, whole, whenever the process is killed."""

import errno
import os
import secrets
from pathlib import Path


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write ``content`` beside ``path``, force it to the disk, and rename it into place.

    Raises ``OSError`` when it cannot be written (a full disk, a missing directory, a ``path`` that is a directory or a
    device); ``path`` is then as it was.
    """
    if path.exists() and not path.is_file():  # a folder, or a device, which renaming would take the place of
        raise OSError(errno.EEXIST, "exists and is no regular file", os.fspath(path))
    data = content.encode() if isinstance(content, str) else content
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(draft, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Force a directory's entries to the disk, so that a rename in it survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
