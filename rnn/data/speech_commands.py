"""Speech Commands, or one's own recordings in the same layout: a folder of WAV files for each word.

P. Warden, Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition, 2018, arXiv:1804.03209; versions 1 and
2 alike.
"""

import os
import unicodedata
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rnn.data.audio import mono, read_wav
from rnn.data.clip_store import background_parts, kept_clips
from rnn.data.clips import PARTS, Recordings, speech_data
from rnn.data.common import Data
from rnn.data.plain_text import read_text
from str_triton.training.errors import warn

LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}
BACKGROUND = "_background_noise_"
OTHER_SOUND = frozenset({".aac", ".aif", ".aiff", ".au", ".caf", ".flac", ".m4a", ".mp3", ".ogg", ".opus", ".wma"})


def load_speech_commands(
    place: str,
    *,
    words: tuple[str, ...] | None = None,
    seed: int = 0,
    noise: float = 0.0,
    device: torch.device | str = "cpu",
    cache_dir: str | None = None,
) -> Data:
    """Read the folder `place`: a folder of clips per word, validation_list.txt, testing_list.txt, _background_noise_.

    Clips are WAV files of a second; shorter ones are filled up with zeros, longer ones cut, other rates resampled to
    16 kHz, stereo mixed, with one warning each for the whole set. They are read once and kept in `cache_dir`. The lists
    name the clips for validation and testing (word/file.wav), as published by speaker; all others are for training.
    Folders whose names begin with "_" or "." are no words; recordings that are no WAV files are left out, with a
    warning.
    For `words`, `seed` and the features see `clips.speech_data`; `noise`: standard deviation of noise on the
    standardised features of training batches.

    Raises ValueError or OSError, in one line, for a folder that is missing or has no words or lists, a list that names
    what is not there, a file that is truncated, empty or no WAV, and what `speech_data` refuses.
    """
    root, name = Path(place), f"speech-commands:{place}"
    if not root.is_dir():
        raise ValueError(f"{name}: no such folder")
    files = _files(root, name)
    parts = _parts(root, list(files), name)
    said = [file.split("/")[0] for file in files]
    known = tuple(dict.fromkeys(said))
    numbers = {word: number for number, word in enumerate(known)}
    labels = torch.tensor([numbers[word] for word in said])
    noises = _listed(root / BACKGROUND) if (root / BACKGROUND).is_dir() else Listing([], [], [])
    if noises.others:
        warn(f"{name}: background noise that is no .wav file is left out: {noises.others[0].name}")
    background = background_parts([mono(*read_wav(file.path)) for file in noises.clips])
    clips = partial(
        kept_clips,
        list(files),
        lambda file: read_wav(root / file),
        name=name,
        identity=repr((str(root.resolve()), list(files.items()))),
        cache_dir=cache_dir,
    )
    recordings = Recordings(known, labels, parts, background, clips)
    return speech_data(recordings, name, words=words, seed=seed, noise=noise, device=device)


class Listing(NamedTuple):
    """What of a folder of clips is a WAV file, a recording of another kind, and a folder; in alphabetic order."""

    clips: list[os.DirEntry]
    others: list[os.DirEntry]
    folders: list[os.DirEntry]


def _listed(folder: Path) -> Listing:
    """Sort the entries of a folder; raise ValueError for a WAV file that is no file."""
    found = Listing([], [], [])
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            ending = os.path.splitext(entry.name)[1].lower()
            if entry.name[0] == ".":
                continue
            if entry.is_dir():
                found.folders.append(entry)
            elif ending in OTHER_SOUND:
                found.others.append(entry)
            elif ending == ".wav":
                if not entry.is_file():
                    raise ValueError(f"{entry.path} is no file, or a link to none: remove it")
                found.clips.append(entry)
    return found


def _files(root: Path, name: str) -> dict[str, tuple[int, int]]:
    """Return every clip, "word/file.wav", with its size and its time of change; words and files in alphabetic order.

    Warns of what might be meant as a clip or as a word and is left out.
    """
    files, others, empty, nested = {}, [], [], []
    words = {entry.name: _listed(root / entry.name) for entry in _listed(root).folders if entry.name[0] != "_"}
    _check_links(root, list(words), name)
    for word, found in words.items():
        for entry in found.clips:
            status = entry.stat()
            files[f"{word}/{entry.name}"] = (status.st_size, status.st_mtime_ns)
        others += [f"{word}/{entry.name}" for entry in found.others]
        if found.clips:
            nested += [f"{word}/{entry.name}" for entry in found.folders]
        elif not found.others:
            empty.append(word)
    if not files:
        kinds = f", only files as {others[0]}: convert them" if others else ""
        raise ValueError(f"{name} has no folder with WAV files for a word{kinds}")
    for kind, left_out in (
        ("recordings that are no .wav file", others),
        ("folders without a .wav file", empty),
        ("folders in the folders of words", nested),
    ):
        if left_out:
            warn(f"{name}: {kind} are left out: {len(left_out)}, as {left_out[0]}")
    return files


def _check_links(root: Path, words: list[str], name: str) -> None:
    """Raise ValueError where two words are one folder: each of its clips would be of both classes."""
    seen: dict[tuple[int, int], str] = {}
    for word in words:
        status = (root / word).stat()
        other = seen.setdefault((status.st_dev, status.st_ino), word)
        if other != word:
            raise ValueError(f"{name}: {other!r} and {word!r} are one folder, by a link: remove one of them")


def _parts(root: Path, files: list[str], name: str) -> Tensor:
    """Return the number of each file's part, int64 [N]."""
    part_of = dict.fromkeys(files, 0)
    composed = {unicodedata.normalize("NFC", file): file for file in files}  # a Mac writes accents in another way
    for part, file in LISTS.items():
        if not (root / file).is_file():
            raise ValueError(f"{name} has no {file}, which names its clips for {part}")
        entries = _entries(root / file)
        missing = [entry for entry in entries if entry not in composed]
        if missing:
            number = f" (nor are {len(missing) - 1} more of {len(entries)})" if len(missing) > 1 else ""
            raise ValueError(f"{root / file} names {missing[0]}, which is not there{number}")
        for clip in (composed[entry] for entry in entries):
            if part_of[clip] not in (0, PARTS.index(part)):
                raise ValueError(f"{clip} is in both {' and '.join(LISTS.values())} of {root}")
            part_of[clip] = PARTS.index(part)
    return torch.tensor(list(part_of.values()))


def _entries(file: Path) -> list[str]:
    """Return the clips, "word/file.wav", that a list names: also by "./word/file.wav" or with backslashes."""
    entries = []
    for line in filter(None, map(str.strip, read_text(file).split("\n"))):
        steps = [step for step in line.replace("\\", "/").split("/") if step not in ("", ".")]
        if line[0] in "/\\" or line[1:2] == ":" or ".." in steps:
            raise ValueError(f"{file} names {line}: write word/file.wav, as seen from the folder of the list")
        entries.append(unicodedata.normalize("NFC", "/".join(steps)))
    return entries
