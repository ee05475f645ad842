"""Japanese Vowels: nine men say /ae/, and the label is the speaker. The data set comes with the project.

M. Kudo, J. Toyama, M. Shimbo, UCI Machine Learning Repository, 1999, doi:10.24432/C5NS47, CC BY 4.0. It has 640
utterances of 7 to 29 steps, each with 12 LPC cepstrum coefficients. The published split has 270 utterances for training
and 370 for testing.

The file in assets/ was made from the two .ts files of the UEA archive, which hold a line per utterance. It holds a line
per step: the number of the utterance (1 ... 270 training, 271 ... 640 testing), the speaker (1 ... 9), and the
coefficients with the decimal digits of the archive.
"""

import gzip
import hashlib
import io
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from str_triton.rnn.data.common import Data
from str_triton.rnn.data.vectors import Standardisation, VectorExamples, check_finite
from str_triton.training.errors import one_line

FILE = Path(__file__).parents[1] / "assets" / "japanese_vowels.csv.gz"
SPEAKERS, TRAINING = 9, 270
EVERY = 5  # every fifth training utterance is for validation


def load_japanese_vowels(*, noise: float = 0.0, device: torch.device | str = "cpu") -> Data:
    """Read 216 utterances for training, 54 for validation and 370 for testing.

    Every fifth training utterance of each speaker (six of thirty) is for validation, whatever the seed. Features are
    standardised with the statistics of the 216. noise: see `VectorExamples`. Raises ValueError for a damaged file.
    """
    content = FILE.read_bytes()
    try:
        table = gzip.decompress(content).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{FILE} is damaged ({one_line(error)}): install the project again") from None
    features, lengths, labels = _utterances(table)
    training = torch.arange(TRAINING)
    # The index of an utterance among those of its speaker. The training part is sorted by speaker.
    index = torch.cat([torch.arange(int(count)) for count in torch.bincount(labels[:TRAINING])])
    held_out = index % EVERY == EVERY - 1
    parts = {
        "train": training[~held_out],
        "validation": training[held_out],
        "test": torch.arange(TRAINING, len(labels)),
    }
    standardise = Standardisation.of(features[parts["train"]], lengths[parts["train"]])
    features = standardise(features, lengths).to(device)
    examples = {
        part: VectorExamples(features[chosen.to(device)], labels[chosen], lengths[chosen], noise)
        for part, chosen in parts.items()
    }
    return Data(
        name="japanese-vowels",
        class_names=tuple(f"speaker {number}" for number in range(1, SPEAKERS + 1)),
        input_size=features.shape[2],
        train=examples["train"],
        validation=examples["validation"],
        test=examples["test"],
        notes={
            "source": "Kudo, Toyama and Shimbo, doi:10.24432/C5NS47, CC BY 4.0",
            "validation": "every fifth training utterance of each speaker",
            "sha256": hashlib.sha256(content).hexdigest(),
        },
        standardisation=standardise,
    )


def _utterances(table: str) -> tuple[Tensor, Tensor, Tensor]:
    """Parse the text of the file: features [N, T, 12] padded with zeros, lengths [N] and labels [N]."""
    rows = torch.from_numpy(np.loadtxt(io.StringIO(table), delimiter=",", dtype=np.float64))
    check_finite(rows, FILE)
    numbers, lengths = torch.unique_consecutive(rows[:, 0].long(), return_counts=True)
    if not torch.equal(numbers, torch.arange(1, len(numbers) + 1)):
        raise ValueError(f"{FILE}: the utterances are not numbered 1, 2, 3, ...: the file is damaged")
    starts = lengths.cumsum(0) - lengths
    features = pad_sequence(rows[:, 2:].float().split(lengths.tolist()), batch_first=True)
    return features, lengths, rows[starts, 1].long() - 1
