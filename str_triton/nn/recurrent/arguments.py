"""The inputs of a recurrent layer: torch's checks with torch's messages, and packed sequences."""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


class Packing(NamedTuple):
    """The lengths of packed sequences, sorted from longest to shortest.

    Attributes:
        batch_sizes: int64 [T] on the CPU, the number of sequences that have each step.
        lengths: int64 [B] on the CPU.
        lengths_on_device: `lengths` on the device of the sequences.
    """

    batch_sizes: Tensor
    lengths: Tensor
    lengths_on_device: Tensor

    @classmethod
    def of(cls, packed: PackedSequence) -> Self:
        """Compute the lengths of a PackedSequence."""
        positions = torch.arange(int(packed.batch_sizes[0]))
        lengths = (packed.batch_sizes[:, None] > positions).sum(0)
        return cls(packed.batch_sizes, lengths, lengths.to(packed.data.device, non_blocking=True))

    def padded(self, x: Tensor) -> Tensor:
        """Return `x`, packed or padded, as padded steps [T, B, features] with zeros after the end of a sequence."""
        return pad_packed_sequence(PackedSequence(x, self.batch_sizes))[0] if x.dim() == 2 else x

    def packed(self, x: Tensor) -> Tensor:
        """Return `x`, packed or padded, as packed steps [sum of lengths, features]."""
        return pack_padded_sequence(x, self.lengths).data if x.dim() == 3 else x


def check_input(layer: nn.Module, x: Tensor, dtype: torch.dtype, *, packed: bool) -> None:
    """Raise the errors of torch's layer for an input of the wrong dtype or shape."""
    if not packed and x.dim() not in (2, 3):
        raise ValueError(f"{type(layer).__name__}: Expected input to be 2D or 3D, got {x.dim()}D instead")
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({dtype}). "
            f"Convert input: input.to({dtype}), or convert model: model.to({x.dtype})"
        )
    if packed and x.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {x.dim()}")
    if x.shape[-1] != layer.input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {layer.input_size}, got {x.shape[-1]}"
        )
    if not packed and x.shape[1 if layer.batch_first and x.dim() == 3 else 0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")


def prepare_states(
    states: tuple[Tensor, ...], expected: tuple[int, int, int], *, unbatched: bool, packed: bool
) -> tuple[Tensor, ...]:
    """Return the initial states as [layers * directions, B, hidden_size]; raise torch's errors for a wrong shape."""
    dimensions = 2 if unbatched else 3
    if not packed and any(state.dim() != dimensions for state in states):
        kind = "unbatched 2-D" if unbatched else "batched 3-D"
        if len(states) == 1:
            raise RuntimeError(f"For {kind} input, hx should also be {dimensions}-D but got {states[0].dim()}-D tensor")
        given = ", ".join(f"{state.dim()}-D" for state in states)
        raise RuntimeError(f"For {kind} input, hx and cx should also be {dimensions}-D but got ({given}) tensors")
    if unbatched:
        states = tuple(state.unsqueeze(1) for state in states)
    for i, state in enumerate(states):
        if state.shape != expected:
            which = f"hidden[{i}]" if len(states) > 1 else "hidden"
            raise RuntimeError(f"Expected {which} size {expected}, got {list(state.shape)}")
    return states
