"""Speech Commands, or recordings of one's own in the same layout: a folder of WAV files for each word.

P. Warden, Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition, 2018, arXiv:1804.03209. Versions 1 and
2 have the same layout.
"""

import os
import unicodedata
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from str_triton.rnn.data.audio import mono, read_wav
from str_triton.rnn.data.clip_store import cached_clips, split_background
from str_triton.rnn.data.clips import PARTS, Recordings, speech_data
from str_triton.rnn.data.common import Data
from str_triton.rnn.data.plain_text import read_text
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

    Clips are WAV files of one second. Shorter clips are padded with zeros and longer ones cut; other rates are
    resampled to 16 kHz and stereo is averaged, with one warning of each kind. The converted clips are cached in
    `cache_dir`. The lists name the clips for validation and testing (word/file.wav); the published lists keep speakers
    apart. All other clips are for training. Folders whose names begin with "_" or "." are not words. Recordings in
    other formats than WAV are skipped with a warning.

    words, seed and the features: see `clips.speech_data`. noise: standard deviation of the noise that training adds to
    the standardised features.

    Raises ValueError or OSError with a message of one line for a missing folder, missing words or lists, a list that
    names a missing file, a file that is truncated, empty or not WAV, and for the errors of `speech_data`.
    """
    root, name = Path(place), f"speech-commands:{place}"
    if not root.is_dir():
        raise ValueError(f"{name}: no such folder")
    files = _find_clips(root, name)
    parts = _read_parts(root, list(files), name)
    spoken = [file.split("/")[0] for file in files]
    known = tuple(dict.fromkeys(spoken))
    numbers = {word: number for number, word in enumerate(known)}
    labels = torch.tensor([numbers[word] for word in spoken])
    noises = _list_folder(root / BACKGROUND) if (root / BACKGROUND).is_dir() else Listing([], [], [])
    if noises.others:
        warn(f"{name}: background noise that is not a .wav file is skipped: {noises.others[0].name}")
    background = split_background([mono(*read_wav(file.path)) for file in noises.clips])
    clips = partial(
        cached_clips,
        list(files),
        lambda file: read_wav(root / file),
        name=name,
        identity=repr((str(root.resolve()), list(files.items()))),
        cache_dir=cache_dir,
    )
    recordings = Recordings(known, labels, parts, background, clips)
    return speech_data(recordings, name, words=words, seed=seed, noise=noise, device=device)


class Listing(NamedTuple):
    """The WAV files, the recordings in other formats, and the folders of a folder, each in alphabetic order."""

    clips: list[os.DirEntry]
    others: list[os.DirEntry]
    folders: list[os.DirEntry]


def _list_folder(folder: Path) -> Listing:
    """List a folder; raise ValueError for a folder or a broken link whose name ends in .wav."""
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
                    raise ValueError(f"{entry.path} is not a file, or a broken link: remove it")
                found.clips.append(entry)
    return found


def _find_clips(root: Path, name: str) -> dict[str, tuple[int, int]]:
    """Return all clips, "word/file.wav", with size and modification time, in alphabetic order.

    Warns about skipped files and folders that may have been meant as clips or words.
    """
    files, others, empty, nested = {}, [], [], []
    words = {
        entry.name: _list_folder(root / entry.name) for entry in _list_folder(root).folders if entry.name[0] != "_"
    }
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
        kinds = f", only files such as {others[0]}: convert them to WAV" if others else ""
        raise ValueError(f"{name} has no folder with WAV files for a word{kinds}")
    for kind, skipped in (
        ("recordings that are not .wav files", others),
        ("folders without a .wav file", empty),
        ("folders inside the folders of words", nested),
    ):
        if skipped:
            warn(f"{name}: {kind} are skipped: {len(skipped)}, for example {skipped[0]}")
    return files


def _check_links(root: Path, words: list[str], name: str) -> None:
    """Raise ValueError where two words are links to one folder: its clips would belong to both classes."""
    seen: dict[tuple[int, int], str] = {}
    for word in words:
        status = (root / word).stat()
        other = seen.setdefault((status.st_dev, status.st_ino), word)
        if other != word:
            raise ValueError(f"{name}: {other!r} and {word!r} are one folder, because of a link: remove one of them")


def _read_parts(root: Path, files: list[str], name: str) -> Tensor:
    """Return the index in PARTS of each file, int64 [N]."""
    part_of = dict.fromkeys(files, 0)
    composed = {unicodedata.normalize("NFC", file): file for file in files}  # macOS decomposes accented letters
    for part, file in LISTS.items():
        if not (root / file).is_file():
            raise ValueError(f"{name} has no {file}: write one, with a line word/file.wav for each clip of {part}")
        entries = _read_list(root / file)
        missing = [entry for entry in entries if entry not in composed]
        if missing:
            number = f" ({len(missing)} of its {len(entries)} files are missing)" if len(missing) > 1 else ""
            raise ValueError(f"{root / file} names {missing[0]}, which does not exist{number}")
        for clip in (composed[entry] for entry in entries):
            if part_of[clip] not in (0, PARTS.index(part)):
                raise ValueError(f"{clip} is in both {' and '.join(LISTS.values())} of {root}")
            part_of[clip] = PARTS.index(part)
    return torch.tensor(list(part_of.values()))


def _read_list(file: Path) -> list[str]:
    """Return the clips that a list names, as "word/file.wav". Accepts "./word/file.wav" and backslashes."""
    entries = []
    for line in filter(None, map(str.strip, read_text(file).split("\n"))):
        names = [name for name in line.replace("\\", "/").split("/") if name not in ("", ".")]
        if line[0] in "/\\" or line[1:2] == ":" or ".." in names:
            raise ValueError(f"{file} names {line}: write word/file.wav, relative to the folder of the list")
        entries.append(unicodedata.normalize("NFC", "/".join(names)))
    return entries
