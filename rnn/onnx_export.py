"""Export of a finished run to ONNX: for sequences of a fixed length, or for one step with the state as an input."""

import json
from typing import Any

import torch
from torch import Tensor, nn

from str_triton import deploy
from str_triton.rnn.finished_run import FinishedRun
from str_triton.rnn.models import LanguageModel, StreamState


class _Network(nn.Module):
    """The network of a run, whose inputs are not standardised."""

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, run: FinishedRun) -> None:
        super().__init__()
        self.model = run.model
        self.register_buffer("mean", run.mean)
        self.register_buffer("std", run.std)

    def standardised(self, x: Tensor) -> Tensor:
        return x if self.mean is None or self.std is None else (x - self.mean) / self.std


class _Sequences(_Network):
    def forward(self, x: Tensor) -> Tensor:
        scores = self.model(self.standardised(x))
        return scores[0] if isinstance(self.model, LanguageModel) else scores


class _Step(_Network):
    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Return the scores and the next state; `one_step` names the state's parts."""
        number = self.model.rnn.states
        rnn: Any = state[0] if number == 1 else state[:number]
        if isinstance(self.model, LanguageModel):
            scores, rnn = self.model.step(x, rnn)
            return scores, *_parts(rnn)
        pooling: Any = state[number:] or (None, 0)  # in a graph the number of steps is a tensor
        scores, following = self.model.step(self.standardised(x), StreamState(rnn, *pooling))
        pooling = () if following.total is None else (following.total, following.steps)
        return scores, *_parts(following.rnn), *pooling


def _parts(state: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else state


def sequences(run: FinishedRun, steps: int) -> deploy.OnnxFile:
    """Export the network for sequences of ``steps`` steps.

    A classifier maps frames [batch, steps, inputs], not standardised, to scores [batch, outputs]. A language model maps
    characters, int64 [batch, steps], to scores [batch, steps, outputs].
    """
    return deploy.export_onnx(
        _Sequences(run),
        _example(run, 2, steps),
        inputs=["characters" if isinstance(run.model, LanguageModel) else "frames"],
        outputs=["scores"],
        metadata=_metadata(run),
    )


def one_step(run: FinishedRun) -> deploy.OnnxFile:
    """Export one step of the network, with the state as input and output.

    The inputs are frame [batch, inputs] or character, int64 [batch]; the state h [layers, batch, hidden], for an LSTM
    also c of the same shape; and with mean pooling total, float64 [batch, hidden], and steps, int64 [1]. The state is
    zero at the beginning of a sequence. The outputs are scores [batch, outputs] and the next state, next_h, ...

    Raises ValueError for a bidirectional network.
    """
    rnn, lm = run.model.rnn, isinstance(run.model, LanguageModel)
    if rnn.bidirectional:
        raise ValueError(
            f"{run.folder}: a bidirectional network cannot run step by step: its second direction begins at the end; "
            "leave out --streaming, or train with --no-bidirectional"
        )
    names = ["h", "c"][: rnn.states]
    example = [_example(run, 2)] + [torch.zeros(rnn.num_layers, 2, rnn.hidden_size) for _ in names]
    batch: list[tuple[int, ...]] = [(0,), *((1,) for _ in names)]
    if not lm and run.model.pooling == "mean":
        names += ["total", "steps"]
        example += [torch.zeros(2, rnn.hidden_size, dtype=torch.float64), torch.full((1,), 5)]
        batch += [(0,), ()]
    return deploy.export_onnx(
        _Step(run),
        tuple(example),
        inputs=["character" if lm else "frame", *names],
        outputs=["scores", *(f"next_{name}" for name in names)],
        dynamic=batch,
        metadata=_metadata(run),
    )


def _example(run: FinishedRun, *sizes: int) -> Tensor:
    """Return inputs of these sizes, as far as the network takes them: characters, or frames."""
    if isinstance(run.model, LanguageModel):
        return torch.full(sizes, len(run.outputs) - 1)
    return torch.zeros(*sizes, run.model.rnn.input_size)


def _metadata(run: FinishedRun) -> dict[str, str]:
    standardised = {} if run.mean is None else {"inputs": "features as they are; this file standardises them"}
    return {"network": run.name, "outputs": json.dumps(run.outputs), **standardised}
