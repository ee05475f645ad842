"""Speech and text of the Hugging Face hub, and of local folders in its format."""

import io
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from rnn.data.audio import mono
from rnn.data.clip_store import background_parts, kept_clips
from rnn.data.clips import PARTS, Recordings, speech_data
from rnn.data.common import Data
from rnn.data.wav import CHANNELS, RATES, is_wav, parse_wav
from str_triton.training.errors import one_line
from str_triton.training.hub import read_splits

if TYPE_CHECKING:
    from datasets import Dataset

AUDIO_COLUMN, LABEL_COLUMNS = "audio", ("label", "labels", "word")
LONGEST = 3_600  # seconds of a compressed recording
SILENT = ("_silence_", "_background_noise_")  # recordings of these labels are background noise, not words


def load_hub(
    place: str,
    *,
    words: tuple[str, ...] | None = None,
    seed: int = 0,
    noise: float = 0.0,
    device: torch.device | str = "cpu",
    cache_dir: str | None = None,
) -> Data:
    """Read the speech data set NAME or NAME@CONFIGURATION of the hub, such as google/speech_commands, or a local folder
    of parquet or arrow files or of `save_to_disk`.

    It has the splits train, validation and test with the columns audio and label (or labels, or word; a ClassLabel or
    strings). Recordings labelled _silence_ are background noise: each part gets a stretch of every one in train; those
    of other splits are left out. Clips are treated, kept and divided into classes as by `load_speech_commands`.

    Raises ValueError, in one line, also for what the `datasets` library reports.
    """
    name = f"hub:{place}"
    splits = read_splits(place, "@")
    missing = [part for part in PARTS if part not in splits]
    if missing:
        raise ValueError(f"{name} has no split {' and no split '.join(map(repr, missing))}, only {', '.join(splits)}")
    said = {part: _labels(splits[part], f"{name} {part}") for part in PARTS}
    sounds = {part: _encoded(splits[part], f"{name} {part}") for part in PARTS}
    items, silent = [], []
    for part in PARTS:
        for row, word in enumerate(said[part]):
            (silent if word in SILENT else items).append((part, row))
    if not items:
        raise ValueError(f"{name} has no recordings of words")

    def read(item: tuple[str, int]) -> tuple[np.ndarray, int]:
        part, row = item
        return _decoded(sounds[part][row][AUDIO_COLUMN], f"{name} {part}[{row}]", place)

    identity = repr((place, [(part, len(said[part]), splits[part]._fingerprint) for part in PARTS]))
    known = tuple(sorted({said[part][row] for part, row in items}))
    numbers = {word: number for number, word in enumerate(known)}
    labels = torch.tensor([numbers[said[part][row]] for part, row in items])
    parts = torch.tensor([PARTS.index(part) for part, _ in items])
    background = background_parts([mono(*read(item)) for item in silent if item[0] == "train"])
    clips = partial(kept_clips, items, read, name=name, identity=identity, cache_dir=cache_dir)
    recordings = Recordings(known, labels, parts, background, clips)
    return speech_data(recordings, name, words=words, seed=seed, noise=noise, device=device)


def hub_text(place: str) -> str:
    """The text of `place`, NAME:COLUMN or NAME@CONFIGURATION:COLUMN: that column of all splits, a line break between.

    The order is train, validation, test, then what else there is. Raises ValueError, in one line, for a column that is
    missing or holds no text, and for what the `datasets` library reports.
    """
    source, _, column = place.rpartition(":")
    splits = read_splits(source, "@")
    texts = []
    for part in sorted(splits, key=lambda part: (PARTS.index(part) if part in PARTS else len(PARTS), part)):
        rows, where = splits[part], f"hub:{source} {part}"
        if column not in rows.column_names:
            raise ValueError(f"{where} has no column {column!r}; its columns are {', '.join(rows.column_names)}")
        for text in rows.select_columns([column])[:][column]:
            if not isinstance(text, str | None):
                raise ValueError(f"{where}: column {column!r} holds {repr(text)[:40]}, which is no text")
            texts.append(text or "")
    return "\n".join(texts)


def _labels(rows: "Dataset", place: str) -> list[str]:
    """What is said in each recording."""
    column = next((column for column in LABEL_COLUMNS if column in rows.column_names), None)
    if column is None:
        expected = " or ".join(map(repr, LABEL_COLUMNS))
        raise ValueError(f"{place} has no column {expected}; its columns are {', '.join(rows.column_names)}")
    names = getattr(rows.features[column], "names", None)
    said = []
    for row, value in enumerate(rows.select_columns([column])[:][column]):
        if names and type(value) is int and 0 <= value < len(names):
            said.append(names[value])
        elif not names and isinstance(value, str) and value:
            said.append(value)
        else:
            kind = f"a number from 0 to {len(names) - 1}" if names else "a word"
            raise ValueError(f"{place}[{row}]: column {column!r} holds {repr(value)[:40]}, not {kind}")
    return said


def _encoded(rows: "Dataset", place: str) -> "Dataset":
    """The column of recordings alone, left as the bytes that are stored."""
    import datasets

    if AUDIO_COLUMN not in rows.column_names:
        raise ValueError(f"{place} has no column {AUDIO_COLUMN!r}; its columns are {', '.join(rows.column_names)}")
    rows = rows.select_columns([AUDIO_COLUMN])
    if isinstance(rows.features[AUDIO_COLUMN], datasets.Audio):
        rows = rows.cast_column(AUDIO_COLUMN, datasets.Audio(decode=False))
    return rows


def _decoded(value: object, name: str, place: str) -> tuple[np.ndarray, int]:
    """The samples, int16 [frames, channels], and the rate of a stored recording: bytes, or a file in folder `place`."""
    if isinstance(value, dict):
        path, value = value.get("path"), value.get("bytes")
        if value is None and path:
            name = f"{name} ({path})"
            value = (Path(place) / path).read_bytes()
    if not isinstance(value, bytes):
        raise ValueError(f"{name}: column {AUDIO_COLUMN!r} has neither the bytes nor the path of a recording")
    if not value or is_wav(value):
        return parse_wav(value, name)
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the package without its library
        raise ValueError(f"{name} is no WAV file; others need the package soundfile: pip install soundfile") from None
    try:
        with soundfile.SoundFile(io.BytesIO(value)) as file:
            if not (RATES[0] <= file.samplerate <= RATES[1] and file.channels <= CHANNELS[1]):
                raise ValueError(f"{name}: {file.channels} channels at {file.samplerate:,} Hz cannot be read")
            if file.frames > LONGEST * file.samplerate:  # silence of days fits into a few bytes
                raise ValueError(f"{name} is longer than the {LONGEST:,} seconds that a recording may have")
            return file.read(dtype="int16", always_2d=True), file.samplerate
    except soundfile.SoundFileError as error:
        raise ValueError(f"{name} cannot be decoded: {one_line(error)}") from error
