"""Speech and text from the Hugging Face hub, and from local folders in its format."""

import io
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from str_triton.rnn.data.audio import mono
from str_triton.rnn.data.clip_store import cached_clips, split_background
from str_triton.rnn.data.clips import PARTS, Recordings, speech_data
from str_triton.rnn.data.common import Data
from str_triton.rnn.data.wav import CHANNELS, RATES, is_wav, parse_wav
from str_triton.training.errors import one_line
from str_triton.training.hub import local_folder, read_splits
from str_triton.training.hub_features import class_names, one_column
from str_triton.training.hub_files import files_below, stamps
from str_triton.training.hub_labels import TABLES
from str_triton.training.hub_splits import check_named_files, named_files

if TYPE_CHECKING:
    from datasets import Dataset

AUDIO_COLUMN, LABEL_COLUMNS = "audio", ("label", "labels", "word")
LONGEST = 3_600  # the maximum length of a compressed recording in seconds
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
    """Read the speech data set `place`: NAME or NAME@CONFIGURATION, where NAME is of the hub or a local folder.

    An example is google/speech_commands. A local folder holds parquet, arrow, csv or json files, or the output of
    `save_to_disk`. The data set must have the splits train, validation and test with the columns audio and label (or
    labels, or word; a ClassLabel or strings). Recordings labelled _silence_ in train are background noise: each part
    gets a piece of every one. Such recordings in other splits are left out. Conversion, cache and classes are those of
    `load_speech_commands`.

    Raises ValueError with a message of one line, also for errors of the `datasets` library.
    """
    name = f"hub:{place}"
    root, _ = local_folder(place, "@") or (None, "")
    try:
        splits = read_splits(place, "@", PARTS, LABEL_COLUMNS)
    except ValueError as error:
        tabled = root and any(path.suffix.lower() in TABLES for path in files_below(root))
        if root and not tabled and any(root.glob("*/*.wav")):
            raise ValueError(f"{error}; folders of WAV files are --data speech-commands:{place}") from error
        if root and "torchcodec" in str(error):  # Installing it does not help: the words are not read from folders.
            advice = (
                "folders of WAV files are --data speech-commands:DIR, where DIR has one folder for each word, and "
                "validation_list.txt and testing_list.txt name the files that are not for training"
            )
            if tabled:
                advice = (
                    "metadata beside recordings is not read: write a table for each split, with the columns audio "
                    "(paths below DIR) and label, and declare the tables in README.md as data_files"
                )
            raise ValueError(f"{name}: {advice}") from error
        raise
    missing = [part for part in PARTS if part not in splits]
    if missing:
        raise ValueError(f"{name} has no split {' and no split '.join(map(repr, missing))}, only {', '.join(splits)}")
    said = {part: _labels(splits[part], f"{name} {part}") for part in PARTS}
    sounds = {part: _audio_column(splits[part], f"{name} {part}") for part in PARTS}
    check_named_files(name, sounds, AUDIO_COLUMN)
    items: list[tuple[str, int]] = []
    silent: list[tuple[str, int]] = []
    for part in PARTS:
        for row, word in enumerate(said[part]):
            (silent if word in SILENT else items).append((part, row))
    if not items:
        raise ValueError(f"{name} has no recordings of words")

    def read(item: tuple[str, int]) -> tuple[np.ndarray, int]:
        part, row = item
        return _decode(sounds[part][row][AUDIO_COLUMN], f"{name} {part}[{row}]", root or Path())

    files = {part: stamps(_files(sounds[part], root or Path())) for part in PARTS}
    identity = repr((place, [(part, len(said[part]), splits[part]._fingerprint, files[part]) for part in PARTS]))
    known = tuple(sorted({said[part][row] for part, row in items}))
    numbers = {word: number for number, word in enumerate(known)}
    labels = torch.tensor([numbers[said[part][row]] for part, row in items])
    parts = torch.tensor([PARTS.index(part) for part, _ in items])
    background = split_background([mono(*read(item)) for item in silent if item[0] == "train"])
    clips = partial(cached_clips, items, read, name=name, identity=identity, cache_dir=cache_dir)
    recordings = Recordings(known, labels, parts, background, clips)
    return speech_data(recordings, name, words=words, seed=seed, noise=noise, device=device)


def hub_text(place: str) -> str:
    """Return the text of `place`, NAME:COLUMN or NAME@CONFIGURATION:COLUMN: the column's rows, joined by line breaks.

    The order of the splits is train, validation, test, then all others. Raises ValueError with a message of one line
    for a column that is missing or holds no text, and for errors of the `datasets` library.
    """
    source, _, column = place.rpartition(":")
    splits = read_splits(source, "@")
    texts = []
    places = {part: place for place, part in enumerate(PARTS)}
    for part in sorted(splits, key=lambda part: (places.get(part.lower(), len(PARTS)), part)):
        rows, where = splits[part], f"hub:{source} {part}"
        if column not in rows.column_names:
            raise ValueError(f"{where} has no column {column!r}; its columns are {', '.join(rows.column_names)}")
        for text in rows.select_columns([column])[:][column]:
            if not isinstance(text, str | None):
                raise ValueError(f"{where}: column {column!r} holds {repr(text)[:40]}, which is not text")
            texts.append(text or "")
    return "\n".join(texts)


def _labels(rows: "Dataset", place: str) -> list[str]:
    """Return the word of each recording."""
    column = one_column(LABEL_COLUMNS, rows.column_names, place)
    names = class_names(rows.features[column])
    said = []
    for row, value in enumerate(rows.select_columns([column])[:][column]):
        if names and type(value) is int and 0 <= value < len(names):
            said.append(names[value])
        elif not names and isinstance(value, str) and value:
            said.append(value)
        else:
            kind = f"a number from 0 to {len(names) - 1}" if names else "a word"
            advice = ""
            if value is None:
                advice = "; for the words null, none and na of a csv file, add keep_default_na: false to README.md"
            elif not names and isinstance(value, int):
                advice = f"; if they are words, give {column!r} the dtype string in README.md"
            raise ValueError(f"{place}[{row}]: column {column!r} holds {repr(value)[:40]}, not {kind}{advice}")
    return said


def _audio_column(rows: "Dataset", place: str) -> "Dataset":
    """Return the column of recordings as stored bytes, without decoding them."""
    import datasets

    one_column((AUDIO_COLUMN,), rows.column_names, place)
    rows = rows.select_columns([AUDIO_COLUMN])
    if isinstance(rows.features[AUDIO_COLUMN], datasets.Audio):
        rows = rows.cast_column(AUDIO_COLUMN, datasets.Audio(decode=False))
    return rows


def _files(rows: "Dataset", root: Path) -> list[Path]:
    """Return the files that hold the recordings: tables, and files below `root` that the tables name."""
    named = (root / path for path in named_files(rows, AUDIO_COLUMN))
    return [*(Path(file["filename"]) for file in rows.cache_files), *named]


def _decode(value: object, name: str, root: Path) -> tuple[np.ndarray, int]:
    """Decode a recording (bytes, or a file below `root`) to samples, int16 [frames, channels], and their rate."""
    if isinstance(value, str):
        value = {"path": value}
    if isinstance(value, dict):
        path, value = value.get("path"), value.get("bytes")
        if value is None and path:
            name = f"{name} ({path})"
            value = (root / path).read_bytes()
    if not isinstance(value, bytes):
        raise ValueError(f"{name}: column {AUDIO_COLUMN!r} has neither the bytes nor the path of a recording")
    if not value or is_wav(value):
        return parse_wav(value, name)
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the package without its library
        raise ValueError(f"{name} is not a WAV file; other formats need soundfile: pip install soundfile") from None
    try:
        with soundfile.SoundFile(io.BytesIO(value)) as file:
            if not (RATES[0] <= file.samplerate <= RATES[1] and file.channels <= CHANNELS[1]):
                raise ValueError(f"{name}: {file.channels} channels at {file.samplerate:,} Hz cannot be read")
            if file.frames > LONGEST * file.samplerate:  # a few compressed bytes can decode to days of silence
                raise ValueError(f"{name} is longer than the {LONGEST:,} seconds that a recording may have")
            return file.read(dtype="int16", always_2d=True), file.samplerate
    except soundfile.SoundFileError as error:
        raise ValueError(f"{name} cannot be decoded: {one_line(error)}") from error
