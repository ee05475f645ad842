"""Helpers of the speech commands' tests: small folders in their layout."""

from pathlib import Path

import numpy as np
import pytest

from str_triton.rnn.data import Data, load
from str_triton.rnn.data.audio import RATE, write_wav

TEN = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
PER_PART = {"train": 4, "validation": 2, "test": 2}


def sound(number: int, frames: int = RATE) -> np.ndarray:
    return np.random.default_rng(number).integers(-8000, 8000, frames, np.int16)


def make(root: Path, words: tuple[str, ...], background: bool = True) -> Path:
    """Make clips of different noise for every word and part. A file's name tells its part."""
    lists = {"train": [], "validation": [], "test": []}
    number = 0
    for word in words:
        (root / word).mkdir(parents=True)
        for part, count in PER_PART.items():
            for _ in range(count):
                write_wav(root / word / f"{part[0]}{number:03}.wav", sound(number))
                lists[part].append(f"{word}/{part[0]}{number:03}.wav")
                number += 1
    (root / "validation_list.txt").write_text("\n".join(lists["validation"]) + "\n")
    (root / "testing_list.txt").write_text("\n".join(lists["test"]))
    if background:
        (root / "_background_noise_").mkdir()
        (root / "_background_noise_" / "README.md").write_text("no sound")
        write_wav(root / "_background_noise_" / "rain.wav", sound(999, 20 * RATE))
    return root


def read(root: Path, words: tuple[str, ...] | None = ("all",), **options: object) -> Data:
    return load(f"speech-commands:{root}", words=words, cache_dir=str(root.parent / "cache"), **options)


def refuse(root: Path, message: str, words: tuple[str, ...] | None = ("all",)) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(root, words)
    assert "\n" not in str(caught.value)
