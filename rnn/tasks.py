"""The training tasks: classification of sequences, and language modelling with a state that persists between steps.

Order and augmentation depend only on (seed, epoch, step), so a resumed run sees the same examples.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from str_triton.rnn.data import Data, Text, with_validation
from str_triton.rnn.models import State
from str_triton.rnn.recipes import Config
from str_triton.training.fingerprint import Fingerprint
from str_triton.training.loop import StepOutput
from str_triton.training.meter import Means, Meter


class Task(ABC):
    """The part of a training run that depends on the kind of data.

    Attributes:
        data: the data set.
        figure: the name of the reported metric.
        sign: 1 where a larger metric is better, -1 where a smaller one is.
        inputs, outputs: the network's input and output sizes.
        steps: optimizer steps in an epoch.
    """

    figure: ClassVar[str]
    sign: ClassVar[int]
    inputs: int
    outputs: int
    steps: int

    def __init__(self, config: Config, data: Data | Text, accelerator: Accelerator) -> None:
        self.config, self.data, self.accelerator = config, data, accelerator

    @abstractmethod
    def sizes(self) -> str:
        """Return the sizes of the data for people."""

    @abstractmethod
    def fingerprint(self, part: str) -> Fingerprint:
        """Return the fingerprint of the "train", "validation" or "test" part."""

    def fingerprints(self) -> dict[str, Fingerprint]:
        """Return the fingerprints of all parts."""
        parts = {"training": "train", "validation": "validation", "test": "test"}
        return {name: self.fingerprint(part) for name, part in parts.items()}

    @abstractmethod
    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        """Yield this process's part of an epoch's training batches, from batch number ``start`` on."""

    @abstractmethod
    def forward(self, network: nn.Module, batch: Any) -> StepOutput:
        """Run the network on a training batch and compute the loss."""

    @abstractmethod
    def evaluate(self, model: nn.Module, part: str) -> Means:
        """Compute loss and accuracy on the whole "validation" or "test" part."""

    @abstractmethod
    def value(self, means: Means) -> float:
        """Return the reported metric."""

    @abstractmethod
    def text(self, value: float) -> str:
        """Format the metric for people."""

    def state(self) -> Any:
        """Return the task's own state for a checkpoint: tensors and plain values."""
        return None

    def load_state(self, state: Any) -> None:  # noqa: B027 (classification has no state)
        """Restore the state that `state` returned."""


class Classify(Task):
    """Classification of labelled sequences; the metric is accuracy."""

    figure, sign = "accuracy", 1
    data: Data

    def __init__(self, config: Config, data: Data, accelerator: Accelerator) -> None:
        super().__init__(config, with_validation(data) if config.choose == "last" else data, accelerator)
        examples = len(self.data.train)
        if config.batch_size > examples:
            raise ValueError(
                f"batch size {config.batch_size} is larger than the {examples} training sequences: choose a smaller one"
            )
        self.steps = examples // config.batch_size
        self.inputs, self.outputs = data.input_size, data.num_classes

    def sizes(self) -> str:
        parts = _parts(self.data, self.config.choose == "last")
        return f"{parts} sequences, {self.inputs} numbers a step, {self.outputs} classes"

    def fingerprint(self, part: str) -> Fingerprint:
        examples = getattr(self.data, part)
        return Fingerprint.of(examples.labels, examples.stored)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        size, seed = self.config.batch_size, self.config.seed
        order = torch.randperm(len(self.data.train), generator=_generator(seed, epoch))
        for step in range(start, self.steps):
            part = self._part(order[step * size : (step + 1) * size])
            generator = _generator(seed, epoch, step, self.accelerator.process_index)
            yield self.data.train.batch(part, augment=True, generator=generator, device=self.accelerator.device)

    def forward(self, network: nn.Module, batch: tuple[Tensor, Tensor | None, Tensor]) -> StepOutput:
        x, lengths, labels = batch
        outputs = network(x, lengths)
        loss = F.cross_entropy(outputs, labels, label_smoothing=self.config.label_smoothing)
        return StepOutput(loss, outputs, labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str) -> Means:
        model.eval()
        examples = getattr(self.data, part)
        meter = Meter(self.accelerator.device)
        for members in torch.arange(len(examples)).split(self.config.batch_size):
            own = self._part(members)
            if len(own) > 0:  # a small last batch may be empty on some processes
                options = {"augment": False, "generator": _generator(0), "device": self.accelerator.device}
                x, lengths, labels = examples.batch(own, **options)
                outputs = model(x, lengths)
                meter.add(F.cross_entropy(outputs, labels), outputs, labels)
        return meter.all_means(self.accelerator)

    def _part(self, members: Tensor) -> Tensor:
        return members.tensor_split(self.accelerator.num_processes)[self.accelerator.process_index]

    def value(self, means: Means) -> float:
        return means.accuracy

    def text(self, value: float) -> str:
        return f"accuracy {100 * value:.2f} %"


class Language(Task):
    """Language modelling of a text as ``batch_size`` parallel streams; the metric is bits per character.

    A step reads ``bptt`` characters of each stream. The recurrent state persists between steps, without gradients, and
    is zero at the beginning of each epoch.
    """

    figure, sign = "bits_per_character", -1
    data: Text

    def __init__(self, config: Config, data: Text, accelerator: Accelerator) -> None:
        if config.choose == "last":
            note = "training and validation text together: the validation score does not estimate the test score"
            train = torch.cat([data.train, data.validation])
            data = replace(data, train=train, notes={**data.notes, "train": note})
        super().__init__(config, data, accelerator)
        self.steps = (len(data.train) // config.batch_size - 1) // config.bptt
        if self.steps < 1:
            raise ValueError(
                f"the training text of {len(data.train)} characters is too short for a batch size of "
                f"{config.batch_size} and --bptt {config.bptt}: choose smaller ones"
            )
        self.inputs = self.outputs = len(data.vocabulary)
        # The streams' states, one for each part of a step (--accumulate). The first belongs to the next part.
        self._states: deque[State | None] = deque([None] * config.accumulate)

    def sizes(self) -> str:
        return f"{_parts(self.data, self.config.choose == 'last')} characters, {self.inputs} different ones"

    def fingerprint(self, part: str) -> Fingerprint:
        return Fingerprint.of_text(getattr(self.data, part))

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        if start == 0:
            self.load_state(None)
        windows = self._windows(self.data.train)
        for step in range(start, self.steps):
            yield windows[step]

    def forward(self, network: nn.Module, batch: tuple[Tensor, Tensor]) -> StepOutput:
        characters, following = batch
        outputs, state = network(characters, self._states.popleft())
        self._states.append(tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach())
        outputs, labels = outputs.flatten(0, 1), following.flatten()
        loss = F.cross_entropy(outputs, labels, label_smoothing=self.config.label_smoothing)
        return StepOutput(loss, outputs, labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str) -> Means:
        model.eval()
        meter, state = Meter(self.accelerator.device), None
        for characters, following in self._windows(getattr(self.data, part)):
            outputs, state = model(characters, state)
            outputs, labels = outputs.flatten(0, 1), following.flatten()
            meter.add(F.cross_entropy(outputs, labels), outputs, labels)
        return meter.all_means(self.accelerator)

    def _windows(self, text: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Cut this process's streams into steps: characters [streams, bptt] and the characters that follow them."""
        count = self.config.batch_size
        if len(text) < 2 * count:  # a short text for evaluation: use one stream a process
            count = self.accelerator.num_processes
        streams = text[: len(text) // count * count].view(count, -1)
        own = streams.tensor_split(self.accelerator.num_processes)[self.accelerator.process_index]
        own = own.to(self.accelerator.device)
        pieces = zip(own[:, :-1].split(self.config.bptt, 1), own[:, 1:].split(self.config.bptt, 1), strict=True)
        return list(pieces)

    def value(self, means: Means) -> float:
        return means.loss / math.log(2)

    def text(self, value: float) -> str:
        return f"{value:.4f} bits per character"

    def state(self) -> tuple[Tensor, ...] | None:
        if self._states[0] is None:
            return None
        states = [state if isinstance(state, tuple) else (state,) for state in self._states]
        parts = [torch.cat(pieces, 1) for pieces in zip(*states, strict=True)]
        # `gather` concatenates the streams of all processes along the first dimension.
        return tuple(self.accelerator.gather(part.transpose(0, 1).contiguous()).transpose(0, 1) for part in parts)

    def load_state(self, state: tuple[Tensor, ...] | None) -> None:
        number, processes = len(self._states), self.accelerator.num_processes
        if state is None:
            self._states = deque([None] * number)
            return
        mine = range(number * self.accelerator.process_index, number * (self.accelerator.process_index + 1))
        pieces = [part.to(self.accelerator.device).tensor_split(number * processes, 1) for part in state]
        states = [[part_pieces[index].contiguous() for part_pieces in pieces] for index in mine]
        self._states = deque(tuple(own) if len(own) > 1 else own[0] for own in states)


def make_task(config: Config, data: Data | Text, accelerator: Accelerator) -> Task:
    """Return the task for the data; raise ``ValueError`` where the configuration does not fit the data."""
    if isinstance(data, Text):
        return Language(config, data, accelerator)
    return Classify(config, data, accelerator)


def _parts(data: Data | Text, merged: bool) -> str:
    """Return the lengths of the parts. With ``merged`` the training part contains the validation part."""
    validation = f"{len(data.validation):,} validation{' (also trained on)' if merged else ''}"
    return f"{len(data.train):,} training, {validation} and {len(data.test):,} test"


def _generator(*numbers: int) -> torch.Generator:
    """Return a random generator that depends only on ``numbers``."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))
