"""The networks: a sequence classifier and a character language model, each on a recurrent layer."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from str_triton import LowRankFastGRNN, LowRankGRU, LowRankLSTM, LowRankRNN, LowRankWeight

CELLS: dict[str, Callable[..., LowRankRNN]] = {"gru": LowRankGRU, "lstm": LowRankLSTM, "fastgrnn": LowRankFastGRNN}
State = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Architecture:
    """The architecture of a network, without the ranks of its matrices.

    Attributes:
        task: "classify" for sequences of vectors, "lm" for a language model.
        cell: "gru", "lstm" or "fastgrnn".
        inputs, outputs: the size of a step's vector and the number of classes; for "lm" both are the size of the
            vocabulary.
        hidden_size, layers, bidirectional: options of the recurrent layers.
        dropout: the dropout between the recurrent layers and before the scores.
        pooling: the classifier's input, the "last" states or the "mean" output of the last layer.
    """

    task: str
    cell: str
    inputs: int
    outputs: int
    hidden_size: int
    layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    pooling: str = "last"

    def build(self, **options: Any) -> "SequenceClassifier | LanguageModel":
        """Build a network with new weights; ``options`` are keyword-only arguments of the layers (`LowRankGRU`)."""
        lm = self.task == "lm"
        rnn = CELLS[self.cell](
            self.hidden_size if lm else self.inputs,
            self.hidden_size,
            self.layers,
            batch_first=True,
            dropout=self.dropout if self.layers > 1 else 0.0,
            bidirectional=self.bidirectional,
            **options,
        )
        if lm:
            return LanguageModel(rnn, self.outputs, self.dropout)
        return SequenceClassifier(rnn, self.outputs, self.dropout, self.pooling)


class StreamState(NamedTuple):
    """The state of a `SequenceClassifier` that runs step by step.

    Attributes:
        rnn: the state of the recurrent layers.
        total: with mean pooling, the sum of the outputs, float64 [B, hidden_size] to limit rounding errors.
        steps: the number of steps so far.
    """

    rnn: State
    total: Tensor | None
    steps: int


class SequenceClassifier(nn.Module):
    """A recurrent layer with a linear classifier of its last states or of the mean of its outputs.

    Maps sequences [B, T, input_size] to scores [B, num_classes]. Padded sequences need lengths, int64 [B] on the CPU.
    """

    def __init__(self, rnn: LowRankRNN, num_classes: int, dropout: float = 0.0, pooling: str = "last") -> None:
        super().__init__()
        self.rnn = rnn
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(rnn.hidden_size * (1 + rnn.bidirectional), num_classes)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        sequences = x if lengths is None else pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        outputs, state = self.rnn(sequences)
        if self.pooling == "mean":
            steps = outputs if lengths is None else pad_packed_sequence(outputs, batch_first=True)[0]
            count = steps.shape[1] if lengths is None else lengths.to(steps.device)[:, None]
            pooled = steps.sum(1) / count
        else:
            h = state[0] if isinstance(state, tuple) else state
            pooled = h[-1 - self.rnn.bidirectional :].transpose(0, 1).flatten(1)
        return self.classifier(self.dropout(pooled))

    @torch.no_grad()
    def step(self, x: Tensor, state: StreamState | None = None) -> tuple[Tensor, StreamState]:
        """Run one step, x [B, input_size], and return the scores of the sequence so far and the new state.

        state: the state of the previous step, None at the beginning of a sequence. Memory is constant; there are no
        gradients and no dropout; see `LowRankRNN.step`.
        """
        rnn, total, steps = (None, None, 0) if state is None else state
        pooled, rnn = self.rnn.step(x, rnn)
        if self.pooling == "mean":
            total = pooled.double() if total is None else total + pooled
            pooled = (total / (steps + 1)).to(pooled.dtype)
        return self.classifier(pooled), StreamState(rnn, total, steps + 1)


class LanguageModel(nn.Module):
    """A character language model: an embedding, a recurrent layer and a decoder.

    Maps characters, int64 [B, T], and the state before them (None: zeros) to the scores of each next character,
    [B, T, characters], and the state after them.
    """

    def __init__(self, rnn: LowRankRNN, characters: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, rnn.input_size)
        self.rnn = rnn
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.Linear(rnn.hidden_size, characters)

    def forward(self, characters: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        outputs, state = self.rnn(self.dropout(self.embedding(characters)), state)
        return self.decoder(self.dropout(outputs)), state

    @torch.no_grad()
    def step(self, characters: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run one step, a character of each text, int64 [B]; return scores [B, characters] and the new state.

        Memory is constant; there are no gradients and no dropout; see `LowRankRNN.step`.
        """
        output, state = self.rnn.step(self.embedding(characters), state)
        return self.decoder(output), state


def compact(model: SequenceClassifier | LanguageModel) -> SequenceClassifier | LanguageModel:
    """Return a copy of ``model`` that holds only the surviving components, without thresholds."""
    small = copy.deepcopy(model)
    small.rnn = model.rnn.compact()
    return small


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the weights of ``source``, a network with dense matrices, to ``target``.

    A matrix in factors of ``target`` gets the largest singular components, as many as its maximum rank.
    """
    factors = {name: module for name, module in target.named_modules() if isinstance(module, LowRankWeight)}
    own = dict(target.named_parameters())
    for name, weight in source.named_parameters():
        if name in factors:
            factors[name].reset_parameters(weight)
        else:
            own[name].copy_(weight)


def architecture_of(config: Mapping[str, Any], inputs: int, outputs: int) -> Architecture:
    """Return the architecture of a configuration, for data of these sizes."""
    given = {field.name: config[field.name] for field in fields(Architecture) if field.name in config}
    return Architecture(**given, inputs=inputs, outputs=outputs)


def load_trained(run_dir: str | Path) -> SequenceClassifier | LanguageModel:
    """Load the compact network of a finished run of rnn/train.py, on the CPU, in evaluation mode."""
    from safetensors import safe_open

    config = json.loads((Path(run_dir) / "config.json").read_text())
    with safe_open(Path(run_dir) / "model.safetensors", "pt") as file:
        sizes = json.loads(file.metadata()["network"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is not a dict)
    model = architecture_of(config, sizes["inputs"], sizes["outputs"]).build(ranks=sizes["ranks"])
    model.load_state_dict(weights)
    return model.eval()
