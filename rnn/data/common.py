"""The types of all data sets: labelled sequences (`Data`), or one long text for a language model (`Text`)."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from str_triton.rnn.data.vectors import Standardisation


class Examples(Protocol):
    """A map-style set of labelled sequences that is read in batches."""

    @property
    def labels(self) -> Tensor:
        """Return the labels, int64 [N] on the CPU."""
        ...

    def __len__(self) -> int: ...

    def stored(self, index: int) -> bytes | None:
        """Return what identifies an example, before arithmetic whose last bits depend on the machine; None: nothing."""
        ...

    def batch(
        self, indices: Tensor, *, augment: bool, generator: torch.Generator, device: torch.device | str
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the sequences of `indices` (int64 [B] on the CPU), padded with zeros to the longest one.

        Returns x, float32 [B, T, input_size] on `device`; the lengths, int64 [B] on the CPU, or None where all lengths
        are T; and the labels, int64 [B] on `device`. Without `augment` no random numbers are drawn.
        """
        ...


@dataclass(frozen=True)
class Data:
    """Labelled sequences of `input_size` numbers a step; label k stands for `class_names[k]`.

    notes: facts for the report, such as the source, the split and a hash. standardisation: the standardisation of the
    vectors, None where the vectors were not standardised.
    """

    name: str
    class_names: tuple[str, ...]
    input_size: int
    train: Examples
    validation: Examples
    test: Examples
    notes: dict[str, str]
    standardisation: Standardisation | None = None
    task: str = "classify"

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return len(self.class_names)


@dataclass(frozen=True)
class Text:
    """A text in three parts, each int64 [N] on the CPU: the indices of the characters in `vocabulary`."""

    name: str
    vocabulary: tuple[str, ...]
    train: Tensor
    validation: Tensor
    test: Tensor
    notes: dict[str, str]
    task: str = "lm"


@dataclass(frozen=True, eq=False)
class Merged:
    """The examples of `first` followed by the examples of `second`. See `Examples`."""

    first: Examples
    second: Examples

    @property
    def labels(self) -> Tensor:
        """Return the labels, int64 [N] on the CPU."""
        return torch.cat([self.first.labels, self.second.labels])

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def stored(self, index: int) -> bytes | None:
        count = len(self.first)
        return self.first.stored(index) if index < count else self.second.stored(index - count)

    def batch(
        self, indices: Tensor, *, augment: bool, generator: torch.Generator, device: torch.device | str
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        in_first = indices < len(self.first)
        options: dict[str, Any] = {"augment": augment, "generator": generator, "device": device}
        if in_first.all():
            return self.first.batch(indices, **options)
        if not in_first.any():
            return self.second.batch(indices - len(self.first), **options)
        parts = [
            self.first.batch(indices[in_first], **options),
            self.second.batch(indices[~in_first] - len(self.first), **options),
        ]
        steps = max(x.shape[1] for x, _, _ in parts)
        x = torch.cat([F.pad(x, (0, 0, 0, steps - x.shape[1])) for x, _, _ in parts])
        known = torch.cat(
            [torch.full((len(x),), x.shape[1]) if lengths is None else lengths for x, lengths, _ in parts]
        )
        labels = torch.cat([labels for _, _, labels in parts])
        # The position of each example of the batch in the concatenation of the two parts.
        places = torch.empty_like(indices)
        places[torch.cat([torch.nonzero(in_first)[:, 0], torch.nonzero(~in_first)[:, 0]])] = torch.arange(len(indices))
        lengths = None if bool((known == steps).all()) else known[places]
        places = places.to(x.device)
        return x[places], lengths, labels[places]


def with_validation(data: Data) -> Data:
    """Return `data` with the validation examples added to the training examples, for runs of a fixed length.

    `validation` does not change, so curves can still be drawn. It now measures performance on training data:
    `notes["train"]` says so. The standardisation does not change either.
    """
    count = len(data.train) + len(data.validation)
    note = f"training and validation examples together ({count}): the validation score does not estimate the test score"
    return replace(data, train=Merged(data.train, data.validation), notes={**data.notes, "train": note})
