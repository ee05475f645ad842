"""Japanese Vowels: nine men say /ae/, and the task is to tell who speaks. The data set that comes with the project.

M. Kudo, J. Toyama, M. Shimbo, UCI Machine Learning Repository, 1999, doi:10.24432/C5NS47, CC BY 4.0. 640 utterances of
7 to 29 steps, each step 12 LPC cepstrum coefficients; the published split has 270 for training and 370 for testing.
The file in assets/ holds a line per step: the number of the utterance (1 ... 270 training, 271 ... 640 testing), the
speaker (1 ... 9), and the coefficients in the decimal digits of the UEA archive's .ts files, which hold a line per
utterance; made by reading those two files and writing each utterance's steps below each other, in their order.
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

from rnn.data.common import Data
from rnn.data.vectors import Standardisation, VectorExamples, check_finite
from str_triton.training.errors import one_line

FILE = Path(__file__).parents[1] / "assets" / "japanese_vowels.csv.gz"
SPEAKERS, TRAINING = 9, 270
EVERY = 5


def load_japanese_vowels(*, noise: float = 0.0, device: torch.device | str = "cpu") -> Data:
    """216 / 54 / 370 utterances: every fifth training utterance of each speaker (six of thirty) is for validation.

    The split is the same for every seed. Features are standardised by the 216; `noise` (see `VectorExamples`) is added
    to them in training. Raises ValueError if the file has been damaged.
    """
    content = FILE.read_bytes()
    try:
        table = gzip.decompress(content).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{FILE} is damaged ({one_line(error)}): install the project again") from None
    features, lengths, labels = _utterances(table)
    training = torch.arange(TRAINING)
    # An utterance's place among those of its speaker: the training part has them speaker by speaker.
    place = torch.cat([torch.arange(int(count)) for count in torch.bincount(labels[:TRAINING])])
    held_out = place % EVERY == EVERY - 1
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
        notes={
            "source": "Kudo, Toyama and Shimbo, doi:10.24432/C5NS47, CC BY 4.0",
            "validation": "every fifth training utterance of each speaker",
            "sha256": hashlib.sha256(content).hexdigest(),
        },
        standardisation=standardise,
        **examples,
    )


def _utterances(table: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return features [N, T, 12] padded with zeros, lengths [N] and labels [N] of the file's text."""
    rows = torch.from_numpy(np.loadtxt(io.StringIO(table), delimiter=",", dtype=np.float64))
    check_finite(rows, FILE)
    numbers, lengths = torch.unique_consecutive(rows[:, 0].long(), return_counts=True)
    if not torch.equal(numbers, torch.arange(1, len(numbers) + 1)):
        raise ValueError(f"{FILE}: the utterances are not numbered 1, 2, 3, ...: the file is damaged")
    starts = lengths.cumsum(0) - lengths
    features = pad_sequence(rows[:, 2:].float().split(lengths.tolist()), batch_first=True)
    return features, lengths, rows[starts, 1].long() - 1
