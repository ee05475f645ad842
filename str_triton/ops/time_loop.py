"""What the low-rank recurrent ops share: the checks of their arguments, sequences of unequal length, and the plan.

The registered ops see one dtype and contiguous tensors: w = u m, so that R h = w (v^T h), and v, both in gates_x's
dtype. On the CPU a batch of unequal lengths is put in order of falling length: then the sequences that are still (or,
in reverse, already) running are the first few rows of every buffer, and no step computes anything at the padding.

The CPU keeps no gates for the backward, which computes them again from gates_x and the states, a piece of time at a
time: two products and three activations in the caches cost less than to write 4 H numbers a step to fresh memory and
to read them back.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from str_triton.ops.soft_threshold import DTYPES

CELLS = {"gru": 3, "lstm": 4, "fastgrnn": 1}  # and how many rows of the recurrent matrix belong to a hidden unit
CHUNK = 1 << 16  # Elements of the [time, batch, hidden] blocks of a piece of the backward: a dozen stay in the caches.


# ---- sequences of unequal length, on the CPU ----------------------------------------------------------------------


class Schedule:
    """Which sequences run at which step. Its tensors have their batch in order of falling length: `sort` puts it so."""

    def __init__(self, lengths: Tensor | None, steps: int, batch: int, reverse: bool) -> None:
        self.steps, self.batch, self.reverse = steps, batch, reverse
        self.times = range(steps - 1, -1, -1) if reverse else range(steps)
        self.order: Tensor | None = None
        self.lengths: Tensor | None = None
        self.counts: list[int] | None = None  # by time; None, like lengths: all of them at all times
        if lengths is None:
            return
        check_lengths(lengths, steps)
        lengths, order = lengths.sort(descending=True, stable=True)
        if batch and int(lengths[-1]) < steps:
            self.lengths = lengths
            self.counts = (lengths > torch.arange(steps)[:, None]).sum(1).tolist()
            self.order = None if torch.equal(order, torch.arange(batch)) else order

    def sort(self, x: Tensor, dim: int) -> Tensor:
        return x if self.order is None else x.index_select(dim, self.order)

    def unsort(self, x: Tensor, dim: int) -> Tensor:
        return x if self.order is None else x.index_select(dim, self.order.argsort())

    def buffer(self, like: Tensor, width: int) -> Tensor:
        """[steps, batch, width] to be written where sequences run; zero elsewhere."""
        new = like.new_empty if self.counts is None else like.new_zeros
        return new((self.steps, self.batch, width))

    def scratch(self, like: Tensor, *widths: int) -> Tensor:
        """[1, batch, ...]: what one step leaves to itself."""
        return like.new_empty((1, self.batch, *widths))

    def rows(self, buffer: Tensor) -> list[Tensor]:
        """By time: the rows of a [steps, batch, ...] buffer that run; those of a scratch again and again."""
        slices = buffer.unbind(0) if len(buffer) == self.steps else buffer.unbind(0) * self.steps
        if self.counts is None:
            return list(slices)
        return [rows[:count] for rows, count in zip(slices, self.counts, strict=True)]

    def blank(self, chunk: Tensor, begin: int) -> None:
        """Zeros at the padding of a piece [time, batch, ...] that begins at a step."""
        if self.counts is not None:
            for rows, count in zip(chunk, self.counts[begin : begin + len(chunk)], strict=True):
                rows[count:].zero_()

    def previous(self, rows: list[Tensor], first: Tensor, time: int) -> Tensor:
        """The state before a step, from the states after each step: `first` where a sequence begins."""
        before = time + 1 if self.reverse else time - 1
        if not 0 <= before < self.steps:
            return first if self.counts is None else first[: self.counts[time]]
        if self.counts is None or not self.reverse:
            return rows[before] if self.counts is None else rows[before][: self.counts[time]]
        begun, count = self.counts[before], self.counts[time]
        return rows[before] if begun == count else torch.cat((rows[before], first[begun:count]))

    def last(self, states: Tensor) -> Tensor:
        """The state after each sequence's last step, from those after every step."""
        if self.reverse or self.counts is None:
            return states[0 if self.reverse else -1].clone()
        return states[self.lengths - 1, torch.arange(self.batch)]

    def chunks(self, width: int) -> Iterator[tuple[int, int]]:
        """Pieces of time in the order of the backward, few enough steps each for the caches."""
        size = self.chunk(width)
        begins = range(0, self.steps, size)
        for begin in begins if self.reverse else reversed(begins):
            yield begin, min(begin + size, self.steps)

    def chunk(self, width: int) -> int:
        return min(self.steps, max(1, CHUNK // max(1, self.batch * width)))

    def backward_times(self, begin: int, end: int) -> range:
        return range(begin, end) if self.reverse else range(end - 1, begin - 1, -1)

    def previous_chunk(self, states: Tensor, first: Tensor, begin: int, end: int) -> Tensor:
        """The states before the steps from begin to end [end - begin, batch, hidden]: a view where that is one."""
        shift = 1 if self.reverse else -1
        inside = begin + shift >= 0 and end + shift <= self.steps
        if inside and not (self.reverse and self.counts is not None):
            return states[begin + shift : end + shift]
        previous = torch.zeros_like(states[begin:end])
        kept_begin, kept_end = max(begin + shift, 0), min(end + shift, self.steps)
        previous[kept_begin - shift - begin : kept_end - shift - begin] = states[kept_begin:kept_end]
        begins = self.begins()
        here = torch.nonzero((begins >= begin) & (begins < end)).squeeze(1)
        previous[begins[here] - begin, here] = first[here]
        return previous

    def begins(self) -> Tensor:
        """When each sequence's first step is."""
        if self.reverse and self.counts is not None:
            return self.lengths - 1
        return torch.full((self.batch,), self.steps - 1 if self.reverse else 0)


def grad_v(outputs: Tensor, h0: Tensor, grad_p: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """dL/dv [hidden, r]: the sum over the steps of h_prev^T grad_p, without a copy of the previous states.

    grad_p [steps, batch, r] is 0 at padding; lengths as the op got them.
    """
    earlier, later = (outputs[1:], grad_p[:-1]) if reverse else (outputs[:-1], grad_p[1:])
    begin = grad_p[-1] if reverse else grad_p[0]
    if reverse and lengths is not None:
        begin = grad_p[lengths.to(grad_p.device) - 1, torch.arange(grad_p.shape[1], device=grad_p.device)]
    total = h0.t() @ begin
    return total.addmm_(earlier.flatten(0, 1).t(), later.flatten(0, 1))


def with_ones(size: tuple[int, ...], like: Tensor) -> Tensor:
    """[*size, r + 1] whose last column is 1: times (w | bias)^T it adds the bias, and dw | dbias is one product."""
    ones = like.new_empty(*size[:-1], size[-1] + 1)
    ones[..., -1] = 1
    return ones


def kept(gates_x: Tensor) -> Tensor:
    """gates_x for the backward: of a GPU, which saves the gates themselves, it need not live on."""
    return gates_x if gates_x.device.type == "cpu" else gates_x.new_empty(0)


def saved_shape(gates_x: Tensor, width: int, save: bool) -> tuple[int, ...]:
    """Of what the forward saves on a GPU, and the CPU does not."""
    return (*gates_x.shape[:2], width) if save and gates_x.device.type != "cpu" else (0,)


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


# ---- the plan -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How to run a layer. kind: "loop" or "dense" on the CPU; "resident", "streamed" or "dense" on a GPU.

    "dense" means: form the recurrent matrix once and let torch's own layer run. The rest concerns GPUs alone: a
    program's tile of sequences, hidden units and rank, its warps, and the stages of its loads.
    """

    kind: str
    block_batch: int = 0
    block_hidden: int = 0
    block_rank: int = 0
    warps: int = 0
    stages: int = 0


def low_rank_plan(
    cell: str,
    hidden_size: int,
    rank: int,
    batch_size: int,
    dtype: torch.dtype,
    *,
    shared_memory: int | None = None,
    training: bool = True,
) -> Plan:
    """The fastest way to run a low-rank recurrent layer of this size; a pure function of its arguments.

    Args:
        cell: "gru", "lstm" or "fastgrnn".
        hidden_size, rank, batch_size: of one layer and direction.
        dtype: float16, bfloat16, float32 or float64.
        shared_memory: bytes that one GPU program may use; None for the CPU.
        training: whether a backward follows.

    Raises:
        ValueError: unknown cell, or a size below 1.
        TypeError: another dtype.
    """
    if cell not in CELLS:
        raise ValueError(f"cell must be 'gru', 'lstm' or 'fastgrnn', got {cell!r}")
    for name, size in (("hidden_size", hidden_size), ("rank", rank), ("batch_size", batch_size)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    if shared_memory is not None:
        from str_triton.ops.low_rank_triton import plan_gpu

        return plan_gpu(cell, hidden_size, rank, batch_size, dtype, shared_memory, training)
    return Plan(_plan_cpu(cell, hidden_size, rank, batch_size, training))


def _plan_cpu(cell: str, hidden_size: int, rank: int, batch_size: int, training: bool) -> str:
    return "loop"


# ---- arguments ----------------------------------------------------------------------------------------------------


def check(
    gates_x: Tensor,
    factors: dict[str, Tensor],
    biases: dict[str, Tensor | None],
    states: dict[str, Tensor],
    lengths: Tensor | None,
    gates: int,
) -> None:
    """Everything but the values of lengths, which the op itself reads: a graph that is traced has none yet.

    factors: u, m, v (and scalars of one element, by any other name). biases: of gates H elements each, or None.
    """
    others = {**factors, **{name: bias for name, bias in biases.items() if bias is not None}, **states}
    for name, tensor in {"gates_x": gates_x, **others}.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a tensor of float16, bfloat16, float32 or float64, got {kind}")
        if tensor.device != gates_x.device:
            raise ValueError(f"{name} is on {tensor.device}, gates_x on {gates_x.device}: move them to one device")
    for name, state in states.items():
        if state.dtype != gates_x.dtype:
            raise TypeError(f"{name} is {state.dtype}, gates_x {gates_x.dtype}: give both in one dtype")
    if gates_x.dim() != 3 or gates_x.shape[2] % gates:
        width = f"{gates} H" if gates > 1 else "H"
        raise ValueError(f"gates_x must have shape [T, B, {width}], got {tuple(gates_x.shape)}")
    steps, batch, width = gates_x.shape
    if steps == 0:
        raise ValueError(f"gates_x of shape {tuple(gates_x.shape)} has no time step: give at least one")
    _check_shapes(gates_x, factors, others, width // gates, gates)
    if lengths is not None:
        if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64:
            kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
            raise TypeError(f"lengths must be a tensor of int64, got {kind}")
        if lengths.shape != (batch,):
            raise ValueError(f"lengths must have shape {(batch,)}, one for each sequence, got {tuple(lengths.shape)}")
        if lengths.device.type != "cpu" and lengths.device != gates_x.device:
            raise ValueError(
                f"lengths is on {lengths.device}, gates_x on {gates_x.device}: move it there or to the CPU"
            )


def _check_shapes(
    gates_x: Tensor, factors: dict[str, Tensor], others: dict[str, Tensor], hidden: int, gates: int
) -> None:
    u, batch = factors["u"], gates_x.shape[1]
    if u.dim() != 2:
        raise ValueError(f"u must be a matrix [{gates * hidden}, r], got shape {tuple(u.shape)}")
    rank = u.shape[1]
    expected = {"u": (gates * hidden, rank), "m": (rank,), "v": (hidden, rank), "h0": (batch, hidden)}
    expected |= {"c0": (batch, hidden), "bias": (gates * hidden,), "bias_gate": (hidden,), "bias_update": (hidden,)}
    for name, tensor in others.items():
        if name not in expected:
            if tensor.numel() != 1:
                raise ValueError(f"{name} must have one element, got shape {tuple(tensor.shape)}")
        elif tensor.shape != expected[name]:
            raise ValueError(
                f"{name} must have shape {expected[name]} to fit gates_x of shape {tuple(gates_x.shape)} "
                f"and u of shape {tuple(u.shape)}, got {tuple(tensor.shape)}"
            )


def check_lengths(lengths: Tensor, steps: int) -> None:
    """Their values. On a GPU that waits for it."""
    if lengths.numel():
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest < 1 or longest > steps:
            wrong = shortest if shortest < 1 else longest
            raise ValueError(f"lengths must be from 1 to {steps}, the steps of gates_x, got {wrong}")


def prepare(gates_x: Tensor, u: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gates_x, w = u m and v as the registered ops expect them."""
    w = (u * m).to(gates_x.dtype)
    return gates_x.contiguous(), w.contiguous(), v.to(gates_x.dtype).contiguous()
