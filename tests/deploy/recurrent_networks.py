"""Recurrent classifiers with random weights, as a user would write them, for the tests of the exports."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from str_triton import LowRankFastGRNN, LowRankGRU, LowRankLSTM
from tests.nn.recurrent.test_streaming import cut

INPUTS, OUTPUTS, HIDDEN = 5, 4, 12


class Classifier(nn.Module):
    """A recurrent layer and a linear layer on its last states, or on the mean of its outputs."""

    def __init__(self, rnn: nn.Module, pooling: str = "last") -> None:
        super().__init__()
        self.rnn, self.pooling = rnn, pooling
        self.head = nn.Linear(HIDDEN * (1 + rnn.bidirectional), OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        outputs, state = self.rnn(x)
        if self.pooling == "mean":
            return self.head(outputs.mean(1 if self.rnn.batch_first else 0))
        h = state[0] if isinstance(state, tuple) else state
        return self.head(torch.cat([*h[-1 - self.rnn.bidirectional :]], 1))


@dataclass(frozen=True, eq=False)
class Case:
    """A classifier and the standardisation of its inputs, if any."""

    model: Classifier
    mean: Tensor | None
    std: Tensor | None

    def standardised(self, x: Tensor) -> Tensor:
        return x if self.mean is None else (x - self.mean) / self.std


def made(
    layer: type[nn.Module], *, pooling: str = "last", standardised: bool = True, rank: int | None = 3, **options: object
) -> Case:
    """Make a classifier of compact layers; `rank` components of each matrix survive (None: dense)."""
    torch.manual_seed(0)
    low_rank = not issubclass(layer, nn.RNNBase)
    rnn = layer(INPUTS, HIDDEN, **options, **({"factorize": "none" if rank is None else "both"} if low_rank else {}))
    model = Classifier(rnn, pooling)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.uniform_(-1, 1)
            elif name.endswith(".u") or (parameter.dim() == 2 and not name.endswith(".v")):
                parameter.mul_(2)
    if low_rank:
        cut(rnn, rank or 1)
        model.rnn = rnn.compact()
    mean, std = (torch.randn(INPUTS), torch.rand(INPUTS) + 0.5) if standardised else (None, None)
    return Case(model.eval(), mean, std)


def projected(pooling: str = "last", **options: Any) -> Case:
    """Make a classifier of an nn.LSTM whose states are projected to HIDDEN numbers."""
    torch.manual_seed(0)
    return Case(Classifier(nn.LSTM(INPUTS, 2 * HIDDEN, proj_size=HIDDEN, **options), pooling).eval(), None, None)


# The gates of each cell whose two biases the C program stores as their sum.
SUMMED = {"gru": 2, "lstm": 4, "fastgrnn": 0}
CASES = {
    "gru low-rank": made(LowRankGRU, num_layers=2),
    "lstm low-rank, mean": made(LowRankLSTM, num_layers=2, pooling="mean", batch_first=True),
    "fastgrnn low-rank": made(LowRankFastGRNN, num_layers=2),
    "gru dense, bidirectional, mean": made(LowRankGRU, rank=None, bidirectional=True, pooling="mean"),
    "lstm dense": made(LowRankLSTM, rank=None, standardised=False),
    "fastgrnn dense": made(LowRankFastGRNN, rank=None),
    "gru low-rank, bidirectional": made(LowRankGRU, bidirectional=True),
    "nn.GRU, no bias": made(nn.GRU, bias=False, batch_first=True),
    "nn.LSTM": made(nn.LSTM, num_layers=2, pooling="mean"),
}
