"""Speech Commands, or one's own recordings in the same layout: a folder of WAV files for each word.

P. Warden, Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition, 2018, arXiv:1804.03209; versions 1 and
2 alike.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from rnn.data.audio import mono, read_wav
from rnn.data.clip_store import background_parts, kept_clips
from rnn.data.clips import PARTS, Recordings, speech_data
from rnn.data.common import Data

LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}
BACKGROUND = "_background_noise_"


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
    For `words`, `seed` and the features see `clips.speech_data`; `noise`: standard deviation of noise on the
    standardised features of training batches.

    Raises ValueError or OSError, in one line, for a folder that is missing or has no words or lists, a list that names
    what is not there, a file that is truncated, empty or no WAV, and what `speech_data` refuses.
    """
    root, name = Path(place), f"speech-commands:{place}"
    if not root.is_dir():
        raise ValueError(f"{name}: no such folder")
    files = _files(root)
    if not files:
        raise ValueError(f"{name} has no folder with WAV files for a word")
    parts = _parts(root, list(files), name)
    identity = repr((str(root.resolve()), list(files.items())))
    waveforms, digest = kept_clips(
        list(files), lambda file: read_wav(root / file), name=name, identity=identity, cache_dir=cache_dir
    )
    said = [file.split("/")[0] for file in files]
    known = tuple(dict.fromkeys(said))
    numbers = {word: number for number, word in enumerate(known)}
    labels = torch.tensor([numbers[word] for word in said])
    background = background_parts([mono(*read_wav(file)) for file in sorted((root / BACKGROUND).glob("*.wav"))])
    recordings = Recordings(waveforms, known, labels, parts, background, digest)
    return speech_data(recordings, name, words=words, seed=seed, noise=noise, device=device)


def _files(root: Path) -> dict[str, tuple[int, int]]:
    """Every clip, "word/file.wav", with its size and its time of change; words and files in alphabetic order."""
    files = {}
    for folder in sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] not in "._"):
        with os.scandir(root / folder) as entries:
            clips = [entry for entry in entries if entry.name.lower().endswith(".wav") and entry.name[0] != "."]
        for entry in sorted(clips, key=lambda entry: entry.name):
            status = entry.stat()
            files[f"{folder}/{entry.name}"] = (status.st_size, status.st_mtime_ns)
    return files


def _parts(root: Path, files: list[str], name: str) -> Tensor:
    """The number of each file's part, int64 [N]."""
    part_of = dict.fromkeys(files, 0)
    for part, file in LISTS.items():
        try:
            lines = (root / file).read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            raise ValueError(f"{name} has no {file}, which names its clips for {part}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{root / file} is not UTF-8 text") from None
        for clip in filter(None, (line.strip() for line in lines)):
            if clip not in part_of:
                raise ValueError(f"{root / file} names {clip}, which is not there")
            if part_of[clip] not in (0, PARTS.index(part)):
                raise ValueError(f"{clip} is in both {' and '.join(LISTS.values())} of {root}")
            part_of[clip] = PARTS.index(part)
    return torch.tensor(list(part_of.values()))
