"""The loops over time of the recurrent cells as ONNX functions.

onnxscript reads the source of these functions and takes the annotations as types. Shapes: x [T, B, gates * hidden],
w [gates * hidden, rank], v [hidden, rank], bias as in `low_rank_rnn`, states [B, hidden]. direction is [1] for a loop
from the last step to the first, else [0].
"""

from collections.abc import Callable, Sequence

from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

DOMAIN = Opset("str_triton", 1)


@script(DOMAIN, default_opset=op)
def low_rank_gru(x: FLOAT, w: FLOAT, v: FLOAT, bias: FLOAT, h0: FLOAT, direction: Sequence[int]) -> tuple[FLOAT, FLOAT]:
    """Run a GRU over x; return its outputs and last states."""
    factor = op.Transpose(w, perm=[1, 0])

    @graph()
    def step(h, x_t):
        x_r, x_z, x_n = op.Split(x_t, axis=-1, num_outputs=3)
        h_r, h_z, h_n = op.Split(op.Add(op.MatMul(op.MatMul(h, v), factor), bias), axis=-1, num_outputs=3)
        r = op.Sigmoid(op.Add(x_r, h_r))
        z = op.Sigmoid(op.Add(x_z, h_z))
        n = op.Tanh(op.Add(x_n, op.Mul(r, h_n)))
        state = op.Add(n, op.Mul(z, op.Sub(h, n)))
        output = op.Identity(state)
        return state, output

    final, outputs = op.Scan(
        h0, x, body=step, num_scan_inputs=1, scan_input_directions=direction, scan_output_directions=direction
    )
    return outputs, final


@script(DOMAIN, default_opset=op)
def low_rank_lstm(
    x: FLOAT, w: FLOAT, v: FLOAT, bias: FLOAT, h0: FLOAT, c0: FLOAT, direction: Sequence[int]
) -> tuple[FLOAT, FLOAT, FLOAT]:
    """Run an LSTM over x; return its outputs and last states."""
    factor = op.Transpose(w, perm=[1, 0])

    @graph()
    def step(h, c, x_t):
        gates = op.Add(op.Add(op.MatMul(op.MatMul(h, v), factor), bias), x_t)
        i, f, g, o = op.Split(gates, axis=-1, num_outputs=4)
        cell = op.Add(op.Mul(op.Sigmoid(f), c), op.Mul(op.Sigmoid(i), op.Tanh(g)))
        state = op.Mul(op.Sigmoid(o), op.Tanh(cell))
        output = op.Identity(state)
        return state, cell, output

    final_h, final_c, outputs = op.Scan(
        h0, c0, x, body=step, num_scan_inputs=1, scan_input_directions=direction, scan_output_directions=direction
    )
    return outputs, final_h, final_c


@script(DOMAIN, default_opset=op)
def low_rank_fastgrnn(
    x: FLOAT, w: FLOAT, v: FLOAT, bias: FLOAT, zeta: FLOAT, nu: FLOAT, h0: FLOAT, direction: Sequence[int]
) -> tuple[FLOAT, FLOAT]:
    """Run a FastGRNN over x; return its outputs and last states."""
    factor = op.Transpose(w, perm=[1, 0])
    bias_gate, bias_update = op.Split(bias, axis=0, num_outputs=2)

    @graph()
    def step(h, x_t):
        a = op.Add(op.MatMul(op.MatMul(h, v), factor), x_t)
        z = op.Sigmoid(op.Add(a, bias_gate))
        n = op.Tanh(op.Add(a, bias_update))
        share = op.Add(op.Sub(zeta, op.Mul(zeta, z)), nu)
        state = op.Add(op.Mul(share, n), op.Mul(z, h))
        output = op.Identity(state)
        return state, output

    final, outputs = op.Scan(
        h0, x, body=step, num_scan_inputs=1, scan_input_directions=direction, scan_output_directions=direction
    )
    return outputs, final


LOOPS: dict[str, Callable] = {"gru": low_rank_gru, "lstm": low_rank_lstm, "fastgrnn": low_rank_fastgrnn}
