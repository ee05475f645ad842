"""The forward pass of the recurrent layers. Each layer runs either the low-rank op or torch's own kernel."""

from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from str_triton.nn.low_rank import LowRankWeight
from str_triton.nn.recurrent.arguments import Packing, check_input, prepare_states
from str_triton.nn.recurrent.dense_kernel import dense_layer
from str_triton.nn.recurrent.execution import fastest
from str_triton.nn.recurrent.matrices import LowRankMatrices
from str_triton.ops.low_rank_gpu import shared_memory_limit
from str_triton.ops.low_rank_plan import low_rank_plan


class LowRankRNN(LowRankMatrices):
    """The base class of the recurrent layers. A subclass names its cell and defines `_loop` and `_cell`."""

    cell: ClassVar[str]  # the cell's name in `low_rank_plan` and `dense_layer`
    states: ClassVar[int] = 1  # 1 for h, 2 for h and c

    @abstractmethod
    def _loop(
        self, suffix: str, gates_x: Tensor, states: list[Tensor], lengths: Tensor | None, *, reverse: bool, native: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the cell's op over gates_x [T, B, gates * hidden_size]; return the outputs and the last states.

        Each state is [B, hidden_size].
        """

    @abstractmethod
    def _cell(self, suffix: str, gates_x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run one step of the cell: map gates_x [B, gates * hidden_size] and states [B, hidden_size] to new states."""

    def flatten_parameters(self) -> None:
        """Do nothing. torch's layers arrange their parameters for cuDNN here."""

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, Tensor]]:
        """Return (output, h), for an LSTM (output, (h, c)), as torch's layer does; see the class."""
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        x = input
        check_input(self, x, self._dtype, packed=False)
        unbatched = x.dim() == 2
        if unbatched:
            x = x.unsqueeze(1)
        elif self.batch_first:
            x = x.transpose(0, 1)
        states = self._initial_states(hx, x, x.shape[1], unbatched=unbatched, packed=False)
        output, states = self._layers(x, states, None)
        if unbatched:
            output, states = output.squeeze(1), tuple(state.squeeze(1) for state in states)
        elif self.batch_first:
            output = output.transpose(0, 1)
        return output, _hidden(states)

    def _forward_packed(
        self, input: PackedSequence, hx: Tensor | tuple[Tensor, Tensor] | None
    ) -> tuple[PackedSequence, Tensor | tuple[Tensor, Tensor]]:
        """Run over packed sequences. They are sorted by length, but the initial states are not."""
        x, batch_sizes = input.data, input.batch_sizes
        order, inverse_order = input.sorted_indices, input.unsorted_indices
        check_input(self, x, self._dtype, packed=True)
        states = self._initial_states(hx, x, int(batch_sizes[0]), unbatched=False, packed=True)
        packing = Packing.of(input)
        if order is not None:
            states = tuple(state.index_select(1, order) for state in states)
        output, states = self._layers(x, states, packing)
        if inverse_order is not None:
            states = tuple(state.index_select(1, inverse_order) for state in states)
        return PackedSequence(packing.packed(output), batch_sizes, order, inverse_order), _hidden(states)

    @torch.no_grad()
    def step(
        self, x: Tensor, state: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """Run one time step, for endless input in constant memory. The result equals that of the forward pass.

        No gradients are recorded, and dropout is off as in evaluation mode. A layer is fastest after `compact`.

        Args:
            x: [B, input_size], regardless of batch_first.
            state: the state that the previous step returned; None: zeros, at the beginning of a sequence.

        Returns:
            The last layer's output [B, hidden_size], and the state: h [num_layers, B, hidden_size], for an LSTM (h, c),
            as the forward pass returns them.

        Raises:
            RuntimeError: the layer is bidirectional, or an input or state has the wrong shape.
            ValueError, TypeError: as the forward pass.
        """
        if self.bidirectional:
            raise RuntimeError(
                f"{type(self).__name__}: a bidirectional layer cannot run step by step: its second direction begins at "
                "the end of the sequence"
            )
        check_input(self, x, self._dtype, packed=True)
        states = self._initial_states(state, x, x.shape[0], unbatched=False, packed=True)
        finals = []
        for layer in range(self.num_layers):
            (suffix,) = self._suffixes(layer)
            gates_x = self._project(suffix, x)
            final = self._cell(suffix, gates_x, tuple(own[layer].to(gates_x.dtype) for own in states))
            finals.append(tuple(own.to(gates_x.dtype) for own in final))
            x = finals[-1][0]
        return x, _hidden(tuple(torch.stack(parts) for parts in zip(*finals, strict=True)))

    def _initial_states(
        self, hx: Tensor | tuple[Tensor, ...] | None, x: Tensor, batch: int, *, unbatched: bool, packed: bool
    ) -> tuple[Tensor, ...]:
        """Return the initial states, each [num_layers * directions, B, hidden_size], zeros by default."""
        shape = self.num_layers * (1 + self.bidirectional), batch, self.hidden_size
        if hx is None:
            return tuple(x.new_zeros(shape) for _ in range(self.states))
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if len(states) != self.states or not all(isinstance(state, Tensor) for state in states):
            wanted = "a tensor" if self.states == 1 else "a pair of tensors (h, c)"
            raise TypeError(f"{type(self).__name__}: hx must be {wanted}, got {type(hx).__name__} of {len(states)}")
        other = next((state.dtype for state in states if state.dtype != x.dtype), None)
        if other is not None and not torch.is_autocast_enabled(x.device.type):
            raise RuntimeError(f"{type(self).__name__}: hx must have the input's dtype {x.dtype}, got {other}")
        return prepare_states(states, shape, unbatched=unbatched, packed=packed)

    def _layers(
        self, x: Tensor, states: tuple[Tensor, ...], packing: Packing | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run all layers over steps in time order, [T, B, input] or packed [sum of lengths, input]."""
        directions = 1 + self.bidirectional
        finals = []
        for layer in range(self.num_layers):
            own = tuple(state[layer * directions : (layer + 1) * directions] for state in states)
            kind = self._execution(layer, x, own[0].shape[1], packing)
            if kind == "dense":
                x, final = self._dense_layer(layer, x, own, packing)
            else:
                x, final = self._low_rank_layer(layer, x, own, packing, native=kind == "native")
            finals.append(final)
            if self.dropout and self.training and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout)
        return x, tuple(torch.cat(parts) for parts in zip(*finals, strict=True))

    def _execution(self, layer: int, x: Tensor, batch: int, packing: Packing | None) -> str:
        """Return what runs this layer fastest.

        "dense" is torch's own kernel, with dense matrices formed once, "native" the op with its steps in C; everything
        else is the op.
        """
        # In a compiled graph, torch's kernel runs its forward pass twice for a backward pass. The CPU's op has no limit
        # on the rank, so it can always run instead.
        if torch.compiler.is_compiling() and not x.is_cuda:
            return "loop"
        matrices = [getattr(self, f"weight_hh_{suffix}") for suffix in self._suffixes(layer)]
        factors = [matrix for matrix in matrices if isinstance(matrix, LowRankWeight)]
        if self.has_dense and len(factors) < len(matrices):
            return "dense"
        device, training, batch = x.device.type, torch.is_grad_enabled(), max(batch, 1)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        is_timed = device == "cpu" and dtype == torch.float32
        if not self.has_dense and not is_timed:
            return "loop"
        with torch.no_grad():
            ranks = [matrix.max_rank if x.is_cuda else matrix.surviving()[1].numel() for matrix in factors]
        rank = max(ranks, default=self.hidden_size)
        if is_timed:
            steps = len(x) if packing is None else len(packing.batch_sizes)
            return fastest(self.cell, self.hidden_size, rank, batch, steps, training=training)
        limit, packed = shared_memory_limit(x.device), packing is not None
        plan = low_rank_plan(
            self.cell, self.hidden_size, rank, batch, dtype, shared_memory=limit, training=training, packed=packed
        )
        return plan.kind

    def _low_rank_layer(
        self, layer: int, x: Tensor, states: tuple[Tensor, ...], packing: Packing | None, *, native: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run one layer with the low-rank op: x and outputs [T, B, ...], states [directions, B, hidden_size]."""
        lengths = None
        if packing is not None:
            x, lengths = packing.padded(x), packing.lengths_on_device
        outputs, finals = [], []
        for direction, suffix in enumerate(self._suffixes(layer)):
            gates_x = self._project(suffix, x)
            own = [state[direction].to(gates_x.dtype) for state in states]
            output, final = self._loop(suffix, gates_x, own, lengths, reverse=direction == 1, native=native)
            outputs.append(output)
            finals.append(final)
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return output, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))

    def _project(self, suffix: str, x: Tensor) -> Tensor:
        """Compute the input's part of the gates, [T, B, gates * hidden_size]."""
        weight, bias = getattr(self, f"weight_ih_{suffix}"), getattr(self, f"bias_ih_{suffix}", None)
        return weight(x, bias) if isinstance(weight, LowRankWeight) else F.linear(x, weight, bias)

    def _recur(self, suffix: str, h: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute the recurrent part of the gates at one step: h [B, hidden_size] -> [B, gates * hidden_size]."""
        weight = getattr(self, f"weight_hh_{suffix}")
        return weight(h, bias) if isinstance(weight, LowRankWeight) else F.linear(h, weight, bias)

    def _recurrent_factors(self, suffix: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return u, m and v of the recurrent matrix for the op. A dense matrix is u, with the identity as v."""
        weight = getattr(self, f"weight_hh_{suffix}")
        if isinstance(weight, LowRankWeight):
            return weight.surviving()
        size = weight.shape[1]
        return weight, weight.new_ones(size), torch.eye(size, dtype=weight.dtype, device=weight.device)

    def _dense_layer(
        self, layer: int, x: Tensor, states: tuple[Tensor, ...], packing: Packing | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run one layer with torch's kernel: x, output [T, B, ...] or packed, states [directions, B, hidden_size]."""
        names = "weight_ih", "weight_hh", *(self.biases if self.bias else ())
        owns = [getattr(self, f"{name}_{suffix}") for suffix in self._suffixes(layer) for name in names]
        # Autocast casts the kernel's inputs. Before that, the products must have the dtype of the biases.
        with torch.autocast(x.device.type, enabled=False):
            weights = [own.weight() if isinstance(own, LowRankWeight) else own for own in owns]
        batch_sizes = None
        if packing is not None:
            x, batch_sizes = packing.packed(x), packing.batch_sizes
        output, *final = dense_layer(
            self.cell, x, states, weights, bias=self.bias, bidirectional=self.bidirectional, batch_sizes=batch_sizes
        )
        return output, tuple(final)


def _hidden(states: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, Tensor]:
    """Return the last states in the form of torch's layers: h, or (h, c)."""
    if len(states) == 1:
        return states[0]
    h, c = states
    return h, c
