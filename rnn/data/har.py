"""UCI HAR: human activities, recorded by a phone at the waist.

J. Reyes-Ortiz, D. Anguita, A. Ghio, L. Oneto, X. Parra, UCI Machine Learning Repository, 2013, doi:10.24432/C54S4K.
The data set has windows of 128 steps (2.56 s at 50 Hz) of nine signals, six activities, 21 people for training and nine
for testing.
"""

import io
import lzma
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from str_triton.rnn.data.common import Data
from str_triton.rnn.data.vectors import Standardisation, VectorExamples, check_finite
from str_triton.training.errors import one_line

SIGNALS = tuple(f"{kind}_{axis}" for kind in ("total_acc", "body_acc", "body_gyro") for axis in "xyz")
STEPS = 128
ACTIVITIES = ("walking", "walking upstairs", "walking downstairs", "sitting", "standing", "laying")  # labels 1 ... 6
# The two classes of the FastGRNN paper, which Kusupati et al. (2020) use as well.
TWO = (("sitting", "laying", "walking upstairs"), ("standing", "walking", "walking downstairs"))
FOLDER = "UCI HAR Dataset"
EVERY = 5  # every fifth of the training people is for validation
LARGEST = 2**28  # the maximum bytes of a file; the largest published file, the inner zip file, has 61 million


def load_har(path: str, *, classes: int = 6, noise: float = 0.0, device: torch.device | str = "cpu") -> Data:
    """Read UCI HAR from a folder or a zip file.

    path: the folder "UCI HAR Dataset", a folder that holds it, a zip file of it, or the published zip file with a zip
    file inside. classes: 6 activities, or 2: sitting, laying and walking upstairs against standing, walking and walking
    downstairs. noise: see `VectorExamples`. Every fifth of the people in the training part, in the order of their
    numbers, is for validation (`notes` names them). Features [N, 128, 9] are in the order of SIGNALS and standardised
    with the statistics of the remaining training people.

    Raises ValueError, with a message of one line, for a file that is missing, is not a table of numbers, or has the
    wrong shape, NaN, or a label outside 1 ... 6; OSError for a file that cannot be read.
    """
    if classes not in (2, 6):
        raise ValueError(f"har has 6 classes or 2, not {classes}")
    root = _find_root(Path(path))
    _require_files(root)
    published, test = _read_part(root, "train"), _read_part(root, "test")
    people = published.people.unique()
    held_out = people[EVERY - 1 :: EVERY]
    if not len(held_out):
        raise ValueError(
            f"{path}: {len(people)} subjects for training; at least {EVERY} are needed to hold one out for validation"
        )
    in_validation = torch.isin(published.people, held_out)
    standardise = Standardisation.of(published.features[~in_validation], None)
    numbers = torch.arange(6)
    if classes == 2:
        numbers = torch.tensor([int(activity in TWO[1]) for activity in ACTIVITIES])

    def examples(part: "_Part", chosen: Tensor) -> VectorExamples:
        raw = part.features[chosen]
        features = standardise(raw, None).to(device)
        return VectorExamples(features, numbers[part.labels[chosen]], None, noise, raw)

    return Data(
        name="har",
        class_names=ACTIVITIES if classes == 6 else tuple(", ".join(group) for group in TWO),
        input_size=len(SIGNALS),
        train=examples(published, ~in_validation),
        validation=examples(published, in_validation),
        test=examples(test, torch.ones_like(test.labels, dtype=torch.bool)),
        notes={
            "source": "Reyes-Ortiz et al., doi:10.24432/C54S4K",
            "validation": f"training subjects {', '.join(str(person) for person in held_out.tolist())}",
        },
        standardisation=standardise,
    )


@dataclass(frozen=True)
class _Part:
    """The windows of "train" or "test": features float32 [N, 128, 9], labels int64 [N] from 0, people int64 [N]."""

    features: Tensor
    labels: Tensor
    people: Tensor


def _find_root(path: Path) -> Path | zipfile.Path:
    """Return the folder, on the disk or in a zip file, that holds "train" and "test"."""
    if path.is_dir():
        places: list[Path | zipfile.Path] = [path, path / FOLDER]
    elif path.is_file():
        outer = _open_zip(path, path)
        places = [outer, outer / FOLDER]
        inner = outer / f"{FOLDER}.zip"
        if inner.is_file():
            nested = _open_zip(io.BytesIO(_read_content(inner)), inner)
            places += [nested, nested / FOLDER]
    else:
        raise ValueError(f"har:{path}: no such folder or zip file")
    for place in places:
        if (place / "train").is_dir():
            return place
    if (path / "Inertial Signals").is_dir():
        raise ValueError(f"har:{path}: this is one part of the data; name the folder above it, {path.parent}")
    raise ValueError(f'har:{path}: no "{FOLDER}" in it (a folder with "train" and "test")')


def _open_zip(source: Path | io.BytesIO, name: Path | zipfile.Path) -> zipfile.Path:
    """Open a zip file for reading. `name` is its name in messages, since the file may lie inside another zip file."""
    try:
        archive = zipfile.ZipFile(source)
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, ValueError, struct.error):
        raise ValueError(f"{name}: neither a folder nor a complete zip file") from None
    archive.filename = str(name)
    return zipfile.Path(archive)


def _read_content(file: Path | zipfile.Path) -> bytes:
    """Read a file on the disk or in a zip file. Raises ValueError beyond LARGEST bytes, as a zip bomb would have."""
    try:
        with file.open("rb") as stream:
            content = stream.read(LARGEST + 1)
    except NotImplementedError as error:
        raise ValueError(f"{file}: {one_line(error)}: unpack the zip file and name the folder") from None
    except RuntimeError:  # zipfile raises it for a file that needs a password
        raise ValueError(f"{file}: encrypted: unpack the zip file and name the folder") from None
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, struct.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # bz2's errors for damaged data have no number
            raise
        raise ValueError(f"{file}: damaged inside the zip file ({one_line(error)})") from None
    if len(content) > LARGEST:
        raise ValueError(f"{file}: more than {LARGEST // 2**20} MiB, which no file of this data set has")
    return content


def _read_table(file: Path | zipfile.Path, columns: int) -> Tensor:
    """Read a table with a line per row, float64 [rows, columns]."""
    content = _read_content(file)
    if not content.strip():
        raise ValueError(f"{file}: empty")
    try:
        rows = torch.from_numpy(np.loadtxt(io.BytesIO(content), ndmin=2, comments=None))
    except (ValueError, UnicodeDecodeError) as error:
        reason = str(error).split(";")[0]  # the rest is numpy's advice for programmers
        raise ValueError(f"{file}: not a table of numbers ({reason})") from None
    if rows.shape[1] != columns:
        raise ValueError(f"{file}: {rows.shape[1]} numbers in a row; a file of this name has {columns}")
    check_finite(rows, file)
    return rows


def _signal_files(root: Path | zipfile.Path, part: str) -> list[Path | zipfile.Path]:
    return [root / part / "Inertial Signals" / f"{signal}_{part}.txt" for signal in SIGNALS]


def _require_files(root: Path | zipfile.Path) -> None:
    """Raise ValueError for a missing file, before any file is read."""
    for part in ("train", "test"):
        for file in (root / part / f"y_{part}.txt", root / part / f"subject_{part}.txt", *_signal_files(root, part)):
            if not file.is_file():
                raise ValueError(f"{file}: missing")


def _read_part(root: Path | zipfile.Path, part: str) -> _Part:
    """Read the raw signals of "train" or "test". The 561 published features are not used."""
    activities = _read_table(root / part / f"y_{part}.txt", 1)[:, 0]
    wrong = torch.nonzero(~torch.isin(activities, torch.arange(1, 7)))[:, 0]
    if len(wrong):
        file, row = root / part / f"y_{part}.txt", int(wrong[0])
        raise ValueError(f"{file}: label {activities[row].item():g} in row {row + 1}; labels are 1 to 6")
    people = _read_table(root / part / f"subject_{part}.txt", 1)[:, 0]
    wrong = torch.nonzero((people != people.round()) | (people.abs() > 1e6))[:, 0]
    if len(wrong):
        file, row = root / part / f"subject_{part}.txt", int(wrong[0])
        raise ValueError(f"{file}: subject {people[row].item():g} in row {row + 1}; subjects are whole numbers")
    tables = {file: _read_table(file, STEPS).float() for file in _signal_files(root, part)}
    for file, rows in {root / part / f"subject_{part}.txt": people, **tables}.items():
        if len(rows) != len(activities):
            raise ValueError(f"{file}: {len(rows)} rows, but y_{part}.txt has {len(activities)}")
    return _Part(torch.stack(list(tables.values()), dim=2), activities.long() - 1, people.long())
