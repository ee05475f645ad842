"""The low-rank time loops' CPU side: which sequences run when, and pieces of time for the backward.

A batch of unequal lengths is sorted by falling length. Then the sequences that still run (in reverse: that already run)
are the first rows of every buffer, and no step computes anything at the padding.

The CPU keeps no gates of a GRU or an LSTM for the backward, which computes them again from gates_x and the states, a
piece of time at a time: two products and the activations in the caches cost less than writing 4 H numbers a step to
fresh memory and reading them back. FastGRNN has 2 H numbers a step and one activation for each, and keeps them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from str_triton.ops.low_rank_checks import check_lengths

CHUNK = 1 << 16  # Elements of the [time, batch, hidden] blocks of a piece of the backward: a dozen stay in the caches.


class Schedule:
    """The sequences that run at each step. Its tensors have the batch sorted by falling length, as `sort` does it."""

    def __init__(self, lengths: Tensor | None, steps: int, batch: int, reverse: bool) -> None:
        self.steps, self.batch, self.reverse = steps, batch, reverse
        self.times = range(steps - 1, -1, -1) if reverse else range(steps)
        self.order: Tensor | None = None
        self.lengths: Tensor | None = None
        self.running: Tensor | None = None  # int64, how many run at each time; None, like lengths: all of them
        self.counts: list[int] | None = None  # the same numbers
        if lengths is None:
            return
        check_lengths(lengths, steps)
        lengths, order = lengths.sort(descending=True, stable=True)
        if batch and int(lengths[-1]) < steps:
            self.lengths = lengths
            self.running = (lengths > torch.arange(steps)[:, None]).sum(1)
            self.counts = self.running.tolist()
            self.order = None if torch.equal(order, torch.arange(batch)) else order

    def sort(self, x: Tensor, dim: int) -> Tensor:
        return x if self.order is None else x.index_select(dim, self.order)

    def unsort(self, x: Tensor, dim: int) -> Tensor:
        return x if self.order is None else x.index_select(dim, self.order.argsort())

    def buffer(self, like: Tensor, width: int) -> Tensor:
        """Return [steps, batch, width] to be written where sequences run; zero elsewhere."""
        new = like.new_empty if self.counts is None else like.new_zeros
        return new((self.steps, self.batch, width))

    def scratch(self, like: Tensor, *widths: int) -> Tensor:
        """Return [1, batch, ...], memory that every step uses again."""
        return like.new_empty((1, self.batch, *widths))

    def rows(self, buffer: Tensor) -> list[Tensor]:
        """Return, for each step, the active rows of a [steps, batch, ...] buffer; a scratch gives the same ones."""
        slices = buffer.unbind(0) if len(buffer) == self.steps else buffer.unbind(0) * self.steps
        if self.counts is None:
            return list(slices)
        return [rows[:count] for rows, count in zip(slices, self.counts, strict=True)]

    def blank(self, chunk: Tensor, begin: int) -> None:
        """Write zeros at the padding of a piece [time, batch, ...] that begins at a step."""
        if self.counts is not None:
            for rows, count in zip(chunk, self.counts[begin : begin + len(chunk)], strict=True):
                rows[count:].zero_()

    def previous(self, rows: list[Tensor], first: Tensor, time: int) -> Tensor:
        """Return the state before a step, from the states after each step: `first` where a sequence begins."""
        before = time + 1 if self.reverse else time - 1
        if not 0 <= before < self.steps:
            return first if self.counts is None else first[: self.counts[time]]
        if self.counts is None or not self.reverse:
            return rows[before] if self.counts is None else rows[before][: self.counts[time]]
        begun, count = self.counts[before], self.counts[time]
        return rows[before] if begun == count else torch.cat((rows[before], first[begun:count]))

    def chunks(self, width: int) -> Iterator[tuple[int, int]]:
        """Yield pieces of time in the order of the backward, each with few enough steps for the caches."""
        size = self.chunk(width)
        begins = range(0, self.steps, size)
        for begin in begins if self.reverse else reversed(begins):
            yield begin, min(begin + size, self.steps)

    def chunk(self, width: int) -> int:
        return min(self.steps, max(1, CHUNK // max(1, self.batch * width)))

    def backward_times(self, begin: int, end: int) -> range:
        return range(begin, end) if self.reverse else range(end - 1, begin - 1, -1)

    def previous_chunk(self, states: Tensor, first: Tensor, begin: int, end: int) -> Tensor:
        """Return the states before the steps from begin to end, [end - begin, batch, hidden]: a view if possible."""
        shift = 1 if self.reverse else -1
        inside = begin + shift >= 0 and end + shift <= self.steps
        if inside and not (self.reverse and self.counts is not None):
            return states[begin + shift : end + shift]
        previous = torch.zeros_like(states[begin:end])
        kept_begin, kept_end = max(begin + shift, 0), min(end + shift, self.steps)
        previous[kept_begin - shift - begin : kept_end - shift - begin] = states[kept_begin:kept_end]
        # When each sequence's first step is.
        ends = self.steps if self.lengths is None else self.lengths
        begins = torch.zeros(self.batch, dtype=torch.int64) + (ends - 1 if self.reverse else 0)
        here = torch.nonzero((begins >= begin) & (begins < end)).squeeze(1)
        previous[begins[here] - begin, here] = first[here]
        return previous


def last_state(states: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """Return the state after each sequence's last processed step, from those after every step."""
    if reverse or lengths is None:
        return states[0 if reverse else -1].clone()
    return states[lengths - 1, torch.arange(states.shape[1], device=states.device)]


def with_ones(size: tuple[int, ...], like: Tensor) -> Tensor:
    """Return [*size, r + 1] whose last column is 1: one product with (w | bias)^T, and one for dw | dbias."""
    ones = like.new_empty(*size[:-1], size[-1] + 1)
    ones[..., -1] = 1
    return ones
