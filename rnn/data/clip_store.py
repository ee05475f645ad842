"""Clips of a second from recordings of any kind, read once and kept in a file that memory is mapped to."""

import errno
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from rnn.data.audio import RATE, mono
from rnn.data.waiting import watched
from str_triton.files import replacing, write_atomically
from str_triton.training.errors import warn

DRAFT = "."  # how the names of unfinished files begin
VERSION = 1  # of what is kept: a change of it makes new files
NOISE_BOUNDS = (0.0, 0.8, 0.9, 1.0)  # each part's background noise is a stretch of its own of every recording
REMARKS = {
    "rate": f"not at {RATE} Hz, resampled",
    "channels": "in stereo, mixed to one channel",
    "length": "longer than a second, cut",
}

Item = TypeVar("Item")


def cache_root(cache_dir: str | None) -> Path:
    """The folder for what is computed once: `cache_dir`, or str-triton in the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "str-triton"


def kept_clips(
    items: Sequence[Item],
    read: Callable[[Item], tuple[np.ndarray, int]],
    *,
    name: str,
    identity: str,
    cache_dir: str | None,
) -> tuple[Tensor, str]:
    """The clips that `read` makes of `items`, int16 [N, 16000], and the SHA-256 of their bytes.

    read: item -> samples, int16 [frames, channels], and the rate in Hz. They are mixed, resampled to 16 kHz, cut to a
    second or filled up with zeros; what had to be done is said in one warning each for all of them.

    They are kept in `cache_dir` under a name made from `identity`, and come from there the next time unless that file
    is damaged. Raises ValueError where the cache cannot be written.
    """
    folder = cache_root(cache_dir) / "clips"
    key = hashlib.sha256(f"{VERSION} {identity}".encode()).hexdigest()[:24]
    samples, about = folder / f"{key}.int16", folder / f"{key}.json"
    note = _undamaged(samples, about, len(items))
    if note is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            needed, free = 2 * RATE * len(items), shutil.disk_usage(folder).free
            if needed > free:  # known now, and not after minutes of reading
                raise OSError(errno.ENOSPC, f"it takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
            _remove_leftovers(folder)
            note = _write(samples, about, items, read, name)
        except OSError as error:
            if error.filename is not None and not str(error.filename).startswith(str(folder)):
                raise
            reason = error.strerror or error
            raise ValueError(f"the cache {folder} cannot be written ({reason}): name another folder for it") from error
    for remark in note["remarks"]:
        warn(remark)
    # Copy on write: torch takes no read-only memory, and nobody writes to this.
    clips = np.memmap(samples, np.int16, mode="c", shape=(len(items), RATE))
    return torch.from_numpy(clips), note["sha256"]


def _remove_leftovers(folder: Path) -> None:
    """Remove what runs that were killed while they read have left; a file of the last day may be another run's."""
    for file in folder.glob(f"{DRAFT}*"):
        with suppress(FileNotFoundError):  # another run was faster
            if time.time() - file.stat().st_mtime > 86_400:
                file.unlink()


def _undamaged(samples: Path, about: Path, count: int) -> dict | None:
    """What was noted about the clips when they were kept, or None where they are missing or damaged."""
    try:
        note = json.loads(about.read_text())
        with samples.open("rb") as file:
            whole = os.fstat(file.fileno()).st_size == 2 * RATE * count
            same = whole and hashlib.file_digest(file, "sha256").hexdigest() == note["sha256"]
        return note if same and isinstance(note["remarks"], list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(
    samples: Path, about: Path, items: Sequence[Item], read: Callable[[Item], tuple[np.ndarray, int]], name: str
) -> dict:
    """Read all items into `samples` and note in `about` what it holds; each appears whole or not at all."""
    digest, found = hashlib.sha256(), Counter()
    with replacing(samples) as file:
        for item in watched(items, f"reading {name}"):
            recorded, rate = read(item)
            content = one_second(recorded, rate, found).tobytes()
            digest.update(content)
            file.write(content)
    remarks = [f"{name}: recordings {text}: {found[kind]}" for kind, text in REMARKS.items() if found[kind]]
    note = {"sha256": digest.hexdigest(), "remarks": remarks}
    write_atomically(about, json.dumps(note))
    return note


def one_second(samples: np.ndarray, rate: int, found: Counter) -> np.ndarray:
    """int16 [frames, channels] at `rate` Hz as int16 [16000] at 16 kHz; `found` counts what had to be done."""
    found.update(rate=rate != RATE, channels=samples.shape[1] > 1, length=len(samples) > rate)
    clip = mono(samples[:rate], rate)[:RATE]
    return np.pad(clip, (0, RATE - len(clip)))


def background_parts(recordings: Sequence[np.ndarray]) -> tuple[Tensor, ...]:
    """int16 [frames] recordings at 16 kHz, divided: a stretch of each for training, validation and testing, end to end.

    A part is at least a second, repeated if need be; without recordings all parts are empty.
    """
    parts = []
    for low, high in pairwise(NOISE_BOUNDS):
        pieces = [samples[int(low * len(samples)) : int(high * len(samples))] for samples in recordings]
        joined = np.concatenate([np.zeros(0, np.int16), *pieces])
        parts.append(torch.from_numpy(np.resize(joined, RATE) if 0 < len(joined) < RATE else joined))
    return tuple(parts)
