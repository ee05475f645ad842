"""Random recurrent networks for benchmarks/studies/sparse_fuzz.py."""

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from str_triton import LowRankFastGRNN, LowRankGRU, LowRankLSTM, low_rank_mgu

FEATURES = 6


class MinimalGatedUnit(nn.Module):
    """The op without a layer of its own, [T, B, inputs] -> [T, B, hidden] and the last state."""

    def __init__(self, inputs: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.project = nn.Linear(inputs, 2 * hidden)
        self.u, self.v = nn.Parameter(torch.randn(2 * hidden, rank)), nn.Parameter(torch.randn(hidden, rank) / hidden)
        self.m, self.bias = nn.Parameter(torch.rand(rank)), nn.Parameter(torch.randn(2 * hidden))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = x.new_zeros(x.shape[1], len(self.v)) if state is None else state[0]
        outputs, last = low_rank_mgu(self.project(x), self.u, self.m, self.v, self.bias, h)
        return outputs, last[None]


class RecurrentNetwork(nn.Module):
    """[B, T, features], perhaps with the first states -> a tensor, a tuple or a dict."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.hidden, self.batch_first = draw.choice((1, 5, 8, 16, 17, 24, 33)), draw.random() < 0.5
        self.count, self.two_ways = draw.randint(1, 2), draw.random() < 0.4
        kinds: dict[str, Callable[[], nn.Module]] = {
            "nn.GRU": lambda: nn.GRU(*self._arguments(draw)),
            "nn.LSTM": lambda: nn.LSTM(*self._arguments(draw)),
            "low-rank GRU": lambda: LowRankGRU(*self._arguments(draw), **self._ranks(draw)),
            "low-rank LSTM": lambda: LowRankLSTM(*self._arguments(draw), **self._ranks(draw)),
            "low-rank FastGRNN": lambda: LowRankFastGRNN(*self._arguments(draw), **self._ranks(draw)),
            "minimal gated unit": lambda: self._minimal(draw),
        }
        self.kind = draw.choice(list(kinds))
        self.kinds = [f"recurrent: {self.kind}"]
        self.rnn = kinds[self.kind]()
        self.head = nn.Linear(self.hidden * (1 + self.two_ways), 4)
        self.before = nn.Conv1d(FEATURES, FEATURES, 3, padding=1) if draw.random() < 0.3 else None
        self.read = draw.choice(("last", "mean", "all", "state", "first"))
        self.result, self.has_states = draw.choice(("tensor", "tuple", "dict")), draw.random() < 0.4
        self.scale = draw.choice((1.0, 1.0, 40.0, 1e4))  # of the inputs: e^x of some gates overflows

    def _arguments(self, draw: random.Random) -> tuple[Any, ...]:
        return FEATURES, self.hidden, self.count, draw.random() < 0.8, self.batch_first, 0.3, self.two_ways

    def _ranks(self, draw: random.Random) -> dict[str, Any]:
        if draw.random() < 0.3:  # Not compact.
            return {"max_rank": draw.randint(1, self.hidden)}
        names = [f"weight_{part}_l{layer}" for part in ("hh", "ih") for layer in range(self.count)]
        return {
            "ranks": {name: 1 + draw.randrange(min(self.hidden, FEATURES)) for name in names if draw.random() < 0.7}
        }

    def _minimal(self, draw: random.Random) -> nn.Module:
        self.count, self.two_ways, self.batch_first = 1, False, False
        return MinimalGatedUnit(FEATURES, self.hidden, draw.randint(1, self.hidden))

    def forward(self, x: Tensor, *states: Tensor) -> Any:
        if self.before is not None:
            x = F.relu(self.before(x.transpose(1, 2)).transpose(1, 2))
        given = () if not states else (states if len(states) > 1 else states[0],)
        outputs, state = self.rnn(x if self.batch_first else x.transpose(0, 1), *given)
        outputs = outputs if self.batch_first else outputs.transpose(0, 1)
        h = state[0] if isinstance(state, tuple) else state
        y = {
            "last": lambda: self.head(outputs[:, -1]),
            "mean": lambda: self.head(outputs.mean(1)),
            "all": lambda: self.head(outputs),
            "state": lambda: self.head(h[-1 - self.two_ways :].transpose(0, 1).flatten(1)),
            "first": lambda: outputs[:, 0].relu(),
        }[self.read]()
        return {"tensor": y, "tuple": (y, state), "dict": {"scores": y, "state": h.tanh()}}[self.result]

    def example(self, batch: int, height: int, width: int) -> tuple[Tensor, ...]:
        """Return sequences of `height` steps."""
        x = self.scale * torch.randn(batch, height, FEATURES)
        count = 2 if "LSTM" in self.kind else 1
        shape = self.count * (1 + self.two_ways), batch, self.hidden
        return (x, *(torch.randn(shape) for _ in range(count))) if self.has_states else (x,)
