"""The cache of clips: recordings are converted to clips of one second once, and then read from a memory-mapped file."""

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

from str_triton.files import replacing, write_atomically
from str_triton.rnn.data.audio import RATE, mono
from str_triton.rnn.data.progress import with_progress
from str_triton.training.errors import warn

DRAFT = "."  # the prefix of unfinished files' names
VERSION = 1  # of the cached clips; another version makes new files
NOISE_BOUNDS = (0.0, 0.8, 0.9, 1.0)  # every recording of noise is divided here between training, validation and test
REMARKS = {
    "rate": f"not at {RATE} Hz, resampled",
    "channels": "in stereo, mixed to one channel",
    "length": "longer than a second, cut",
}

Item = TypeVar("Item")


def cache_root(cache_dir: str | None) -> Path:
    """Return the cache folder: `cache_dir`, or str-triton in the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "str-triton"


def cached_clips(
    items: Sequence[Item],
    read: Callable[[Item], tuple[np.ndarray, int]],
    *,
    name: str,
    identity: str,
    cache_dir: str | None,
) -> tuple[Tensor, str]:
    """Return the clips of `items`, int16 [N, 16000], and the SHA-256 of their bytes.

    read: a function that returns an item's samples, int16 [frames, channels], and rate in Hz. The channels are
    averaged, the samples resampled to 16 kHz, and cut or padded with zeros to one second. One warning for each kind of
    conversion counts the clips that needed it.

    The clips are cached in `cache_dir` under a name made from `identity`. A later call reads them from there unless the
    file is damaged. Raises ValueError where the cache cannot be written.
    """
    folder = cache_root(cache_dir) / "clips"
    key = hashlib.sha256(f"{VERSION} {identity}".encode()).hexdigest()[:24]
    samples, about = folder / f"{key}.int16", folder / f"{key}.json"
    note = _valid_note(samples, about, len(items))
    if note is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            needed, free = 2 * RATE * len(items), shutil.disk_usage(folder).free
            if needed > free:  # fail now rather than after minutes of reading
                raise OSError(errno.ENOSPC, f"it needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
            _remove_leftovers(folder)
            note = _write(samples, about, items, read, name)
        except OSError as error:
            if error.filename is not None and not str(error.filename).startswith(str(folder)):
                raise
            reason = error.strerror or error
            raise ValueError(f"the cache {folder} cannot be written ({reason}): name another folder for it") from error
    for remark in note["remarks"]:
        warn(remark)
    # Copy on write, because torch warns about read-only memory. Nothing writes to it.
    clips = np.memmap(samples, np.int16, mode="c", shape=(len(items), RATE))
    return torch.from_numpy(clips), note["sha256"]


def _remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of killed runs. Files younger than a day stay: another run may be writing them."""
    for file in folder.glob(f"{DRAFT}*"):
        with suppress(FileNotFoundError):  # another run removed it first
            if time.time() - file.stat().st_mtime > 86_400:
                file.unlink()


def _valid_note(samples: Path, about: Path, count: int) -> dict | None:
    """Return the note in `about`, or None where the clips are missing or damaged."""
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
    """Write the clips of all items to `samples` and a note (hash, remarks) to `about`, each file atomically."""
    digest = hashlib.sha256()
    found: Counter[str] = Counter()
    with replacing(samples) as file:
        for item in with_progress(items, f"reading {name}"):
            recorded, rate = read(item)
            content = to_one_second(recorded, rate, found).tobytes()
            digest.update(content)
            file.write(content)
    remarks = [f"{name}: recordings {text}: {found[kind]}" for kind, text in REMARKS.items() if found[kind]]
    note = {"sha256": digest.hexdigest(), "remarks": remarks}
    write_atomically(about, json.dumps(note))
    return note


def to_one_second(samples: np.ndarray, rate: int, found: Counter) -> np.ndarray:
    """Convert int16 [frames, channels] at `rate` Hz to int16 [16000] at 16 kHz; count the conversions in `found`."""
    found.update(rate=rate != RATE, channels=samples.shape[1] > 1, length=len(samples) > rate)
    clip = mono(samples[:rate], rate)[:RATE]
    return np.pad(clip, (0, RATE - len(clip)))


def split_background(recordings: Sequence[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    """Divide recordings, int16 [frames] at 16 kHz, between training, validation and testing.

    Each part gets a piece of every recording, concatenated to int16 [frames]. A part shorter than a second is repeated
    up to one second. Without recordings all parts are empty.
    """
    parts = []
    for low, high in pairwise(NOISE_BOUNDS):
        pieces = [samples[int(low * len(samples)) : int(high * len(samples))] for samples in recordings]
        joined = np.concatenate([np.zeros(0, np.int16), *pieces])
        parts.append(torch.from_numpy(np.resize(joined, RATE) if 0 < len(joined) < RATE else joined))
    training, validation, test = parts
    return training, validation, test
