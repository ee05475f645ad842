"""`compile_step`: a recurrent layer or classifier that runs frame by frame, one call of C for each."""

import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from str_triton.deploy.recurrent_classifier import RecurrentClassifier
from str_triton.deploy.sparse.graph.nodes import FREE
from str_triton.deploy.sparse.graph.quantized_recurrent import quantized_recurrent
from str_triton.deploy.sparse.graph.recurrent import Recurrent
from str_triton.deploy.sparse.model import CompiledModel
from str_triton.deploy.sparse.quantize.model import QuantizedModel
from str_triton.deploy.sparse.runtime.stepping import PackedStepper, StackedLayer
from str_triton.deploy.sparse.surroundings import plain_torch
from str_triton.native.build import library
from str_triton.nn import LowRankGRU, LowRankLSTM, LowRankRNN, LowRankWeight

MEAN_ROWS = 3  # of the state, for a mean: sums of the outputs, their rounding errors, and the number of steps
TRIED = 5  # steps that are compared with torch's
# The largest difference of a step from torch's, relative to 1 or to the largest value. Beside int8 weights the states
# are 16-bit codes in C, which torch's steps in float32 do without.
TOLERANCE, TOLERANCE_INT8 = 1e-4, 1e-3


def compile_step(module: nn.Module, *, int8: bool = False) -> "CompiledStep":
    """Compile one time step of a recurrent layer or classifier for streams of frames on the CPU.

    Args:
        module: a `LowRankGRU`, `LowRankLSTM` or `LowRankFastGRNN`, an nn.GRU or nn.LSTM, or a classifier: a module with
            one of these and one nn.Linear, which scores the last states or the mean of the outputs. It stays as it is.
        int8: hold the recurrent matrices as int8, rounded as `quantize` rounds them; states and the rest stay float32.

    Raises:
        TypeError: module is no module, or made by `quantize` or `compile_sparse`.
        ValueError: the layer is bidirectional, the module computes something else, or int8 cannot hold its weights.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"compile_step takes a module, got {type(module).__name__}")
    if isinstance(module, CompiledModel | QuantizedModel):
        name = type(module).__name__
        raise TypeError(f"compile_step takes the model itself, got a {name}: int8=True gives it int8 weights")
    if isinstance(module, LowRankRNN | nn.GRU | nn.LSTM):
        return CompiledStep(_compact(module), int8=int8)
    found = RecurrentClassifier.of(module)
    return CompiledStep(found.rnn, (found.weight, found.bias), mean=found.pooling == "mean", int8=int8)


class CompiledStep:
    """One time step in C. The outputs of all steps differ from the module's on the whole sequence by rounding only.

    Attributes:
        inputs: features of a frame.
        outputs: hidden units of a layer, or classes.
        rows: the state is [rows, B, hidden], float32. It is zero at the beginning of a sequence, so
            `state[:, i] = 0` starts a new sequence in row i of a batch.
    """

    def __init__(
        self, rnn: LowRankRNN, head: tuple[Tensor, Tensor] | None = None, *, mean: bool = False, int8: bool = False
    ) -> None:
        if rnn.bidirectional:
            raise ValueError(
                f"{type(rnn).__name__} is bidirectional: its second direction begins at the end of the sequence, so it "
                "cannot run step by step"
            )
        self._rnn, self._head, self._mean, self._int8 = rnn, head, mean, int8
        if int8:
            _round(rnn)
        self._hidden, self._states = rnn.hidden_size, rnn.states
        self.inputs, self.outputs = rnn.input_size, rnn.hidden_size if head is None else len(head[0])
        self.rows = rnn.num_layers * self._states + MEAN_ROWS * mean
        self._make_packed()

    def _make_packed(self) -> None:
        self._packed: PackedStepper | None = None
        kernels = library()
        if kernels is None:
            return
        layers = [_layer(self._rnn, index) for index in range(self._rnn.num_layers)]
        if self._int8:
            layers = [replace(layer, node=quantized_recurrent(layer.node)) for layer in layers]
        self._packed = PackedStepper(layers, self._head, self._mean, kernels)
        if not self._agrees():
            warnings.warn("the compiled step gives other values than torch, which runs it instead", stacklevel=4)
            self._packed = None

    def begin(self, batch: int = 1) -> Tensor:
        """Return the state at the beginning of `batch` sequences."""
        return torch.zeros((self.rows, batch, self._hidden), dtype=torch.float32, device="cpu")

    def step(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run one step and return the output [B, outputs] and the new state.

        Args:
            x: [B, inputs], float32 on the CPU.
            state: the state that the previous step returned; None: the beginning of a sequence.

        Raises:
            ValueError: another shape, dtype or device.
        """
        batch = _batch(x)
        state = self.begin(batch) if state is None else state
        _check("x", x, (batch, self.inputs))
        _check("state", state, (self.rows, batch, self._hidden))
        output, following = x.new_empty((batch, self.outputs)), x.new_empty((self.rows, batch, self._hidden))
        self._run(x, state, following, output, batch)
        return output, following

    def step_(self, x: Tensor, state: Tensor, output: Tensor) -> Tensor:
        """Run one step without new tensors: write the new state into `state`, and return `output`, which is written.

        Raises:
            ValueError: another shape, dtype or device, or a `state` or `output` that is not contiguous.
        """
        batch = _batch(x)
        _check("x", x, (batch, self.inputs))
        _check("state", state, (self.rows, batch, self._hidden))
        _check("output", output, (batch, self.outputs))
        if not (state.is_contiguous() and output.is_contiguous()):
            raise ValueError("step_ writes into contiguous tensors only: state and output must be contiguous")
        self._run(x, state, state, output, batch)
        return output

    def _run(self, x: Tensor, state: Tensor, following: Tensor, output: Tensor, batch: int) -> None:
        packed = self._packed
        if packed is None:
            self._by_torch(x, state, following, output)
            return
        if packed.room < batch:
            packed.make_room(batch)
        x, state = x.contiguous(), state.contiguous()
        addresses = x.data_ptr(), state.data_ptr(), following.data_ptr(), output.data_ptr()
        if batch and not all(addresses):
            raise ValueError("the values of x, state or output are not in memory: their storage is freed or none")
        packed.step(packed.address, batch, *addresses)

    def _by_torch(self, x: Tensor, state: Tensor, following: Tensor, output: Tensor) -> None:
        with plain_torch():
            count = self._rnn.num_layers
            parts = state[: count * self._states].unflatten(0, (count, self._states)).unbind(1)
            result, new = self._rnn.step(x, parts if len(parts) > 1 else parts[0])
            new = new if isinstance(new, tuple) else (new,)
            rest = state[count * self._states :]
            if self._mean:
                steps = rest[2, :, 0].contiguous().view(torch.int32) + 1
                total = rest[0].double() + rest[1] + result
                result = (total / steps.unsqueeze(1)).float()
                rest = torch.stack([total.float(), (total - total.float()).float(), torch.zeros_like(rest[2])])
                rest[2, :, 0] = steps.view(torch.float32)
            following.copy_(torch.cat([torch.stack(new, 1).flatten(0, 1), rest]))
            output.copy_(result if self._head is None else nn.functional.linear(result, *self._head))

    def _agrees(self) -> bool:
        """Compare a few steps with torch's."""
        generator, tolerance = torch.Generator().manual_seed(0), TOLERANCE_INT8 if self._int8 else TOLERANCE
        states = [self.begin(2), self.begin(2)]
        outputs = [torch.empty((2, self.outputs), dtype=torch.float32, device="cpu") for _ in states]
        for _ in range(TRIED):
            x = torch.randn((2, self.inputs), generator=generator, dtype=torch.float32, device="cpu")
            self._run(x, states[0], states[0], outputs[0], 2)
            self._by_torch(x, states[1], states[1], outputs[1])
            ours, theirs = ([state[: self.rows - MEAN_ROWS * self._mean].clone(), output] for state, output in
                            zip(states, outputs, strict=True))  # fmt: skip
            for a, b in zip(ours, theirs, strict=True):
                scale = max(1.0, float(b.nan_to_num(0.0, 0.0, 0.0).abs().max())) if b.numel() else 1.0
                if not torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True):
                    return False
        return True

    def __getstate__(self) -> dict[str, object]:
        """Leave out the packed weights, which hold addresses."""
        return {name: value for name, value in vars(self).items() if name != "_packed"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._make_packed()


def _batch(x: Tensor) -> int:
    shape = x.shape  # len(x) would take a tenth of a small step's time.
    return shape[0] if shape else 0


def _check(name: str, given: Tensor, shape: tuple[int, ...]) -> None:
    if given.shape != shape or given.dtype is not torch.float32 or not given.is_cpu or given.is_neg():
        raise ValueError(
            f"{name} must be float32 {list(shape)} on the CPU, got {given.dtype} {list(given.shape)} on {given.device}"
        )


@torch.no_grad()
def _compact(module: nn.Module) -> LowRankRNN:
    """Return a compact float32 copy on the CPU, in evaluation mode."""
    if isinstance(module, LowRankRNN):
        made = module.compact()
    else:
        kind = LowRankGRU if isinstance(module, nn.GRU) else LowRankLSTM
        made = kind.from_dense(module, factorize="none")
    return made.to("cpu", torch.float32).eval()


@torch.no_grad()
def _round(rnn: LowRankRNN) -> None:
    """Replace the recurrent matrices of a compact layer by the numbers that their int8 weights stand for."""
    if not all(bool(parameter.isfinite().all()) for parameter in rnn.parameters()):
        raise ValueError(f"{type(rnn).__name__} has weights that are NaN or infinite, which int8 cannot hold")
    for index in range(rnn.num_layers):
        rounded, own = quantized_recurrent(_layer(rnn, index).node).decoded(), getattr(rnn, f"weight_hh_l{index}")
        if isinstance(own, LowRankWeight):
            own.u.copy_(rounded.weight)
            own.v.copy_(rounded.v)
        else:
            own.copy_(rounded.weight)


@torch.no_grad()
def _layer(rnn: LowRankRNN, index: int) -> StackedLayer:
    suffix = f"l{index}"
    own = {
        name: getattr(rnn, f"{name}_{suffix}", None) for name in ("weight_ih", "weight_hh", *rnn.biases, *rnn.scalars)
    }
    projection, recurrent = (_factors(own[name]) for name in ("weight_ih", "weight_hh"))
    *thin, weight = recurrent
    rows = rnn.gates * rnn.hidden_size
    biases = {name: weight.new_zeros(rows) if own[name] is None else own[name].detach() for name in rnn.biases}
    bias = biases.pop("bias_ih", weight.new_zeros(rows))  # of the projection; a cell without it adds all of its own
    recurrent_bias = torch.cat(list(biases.values()))
    node = Recurrent("y", ["x", "h", "c"][: 1 + rnn.states], weight, recurrent_bias, FREE, suffix, cell=rnn.cell)
    node.v = thin[0].t().contiguous() if thin else None
    if rnn.scalars:
        node.scale = torch.cat([own[name].detach().sigmoid() for name in rnn.scalars])
    return StackedLayer(projection, bias, node)


def _factors(matrix: LowRankWeight | nn.Parameter) -> list[Tensor]:
    """Return the factors of a weight, in the order in which they are applied."""
    if isinstance(matrix, LowRankWeight):
        u, m, v = matrix.surviving()
        return [v.t().contiguous(), (u * m).contiguous()]
    return [matrix.detach().contiguous()]
