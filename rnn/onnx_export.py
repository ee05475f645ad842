"""Export of a finished run to ONNX: for sequences of a fixed length, or for one step with the state as an input.

The graph is built by hand from the formulas in `str_triton.nn.recurrent`.
"""

import json
from typing import Any

import numpy as np
import torch
from torch import nn

from str_triton.rnn.finished_run import FinishedRun
from str_triton.rnn.models import LanguageModel
from str_triton.rnn.onnx_graph import Graph, Layer

OPSET, IR_VERSION = 18, 8  # the versions of 2022, which every current runtime reads
ModelProto = Any  # onnx.ModelProto; onnx is imported only when a model is exported
Value = tuple[str, type[np.generic], list[int | str]]  # an input or output of a graph: name, dtype, shape


def unrolled(run: FinishedRun, steps: int) -> ModelProto:
    """Export the network for sequences of ``steps`` steps.

    A classifier maps frames [batch, steps, inputs], not standardised, to scores [batch, outputs]. A language model maps
    characters, int64 [batch, steps], to scores [batch, steps, outputs].
    """
    graph, model, rnn = Graph(), run.model, run.model.rnn
    x, inputs = _input(graph, run, ["batch", steps])
    zeros = graph.constant("zeros", np.zeros((1, 1, rnn.hidden_size), np.float32))
    for layer in range(rnn.num_layers):
        directions = []
        for direction, suffix in enumerate(rnn._suffixes(layer)):
            own, states, outputs = Layer(graph, rnn, suffix), (zeros,) * rnn.states, []
            gates = graph.split(own.project(x), [1] * steps, axis=1)
            for gates_t in reversed(gates) if direction else gates:
                states = own.cell(gates_t, states)
                outputs.append(states[0])
            directions.append(outputs[::-1] if direction else outputs)
        ends = [outputs[-1 if direction == 0 else 0] for direction, outputs in enumerate(directions)]
        sides = [graph.add("Concat", *outputs, axis=1) for outputs in directions]
        x = sides[0] if len(sides) == 1 else graph.add("Concat", *sides, axis=2)
    if isinstance(model, LanguageModel):
        _linear(graph, x, model.decoder, "scores")
        return _model(graph, run, inputs, [("scores", np.float32, ["batch", steps, len(run.outputs)])])
    one = graph.constant("axis_1", np.array([1], np.int64))
    if model.pooling == "mean":
        pooled = graph.add("ReduceMean", x, one, keepdims=0)
    else:
        last = ends[0] if len(ends) == 1 else graph.add("Concat", *ends, axis=2)
        pooled = graph.add("Squeeze", last, one)
    _linear(graph, pooled, model.classifier, "scores")
    return _model(graph, run, inputs, [("scores", np.float32, ["batch", len(run.outputs)])])


def streaming(run: FinishedRun) -> ModelProto:
    """Export one step of the network, with the state as input and output.

    The inputs are frame [batch, inputs] or character, int64 [batch]; the state h [layers, batch, hidden], for an LSTM
    also c of the same shape; and with mean pooling total, float64 [batch, hidden], and steps, int64 [1]. The state is
    zero at the beginning of a sequence. The outputs are scores [batch, outputs] and the next state, next_h, ...

    Raises ValueError for a bidirectional network.
    """
    graph, model, rnn = Graph(), run.model, run.model.rnn
    if rnn.bidirectional:
        raise ValueError(
            f"{run.folder}: a bidirectional network cannot run step by step: its second direction begins at the end"
        )
    x, inputs = _input(graph, run, ["batch"])
    zero = graph.constant("axis_0", np.array([0], np.int64))
    names, shape = ["h", "c"][: rnn.states], [rnn.num_layers, "batch", rnn.hidden_size]
    inputs += [(name, np.float32, shape) for name in names]
    outputs = [("scores", np.float32, ["batch", len(run.outputs)])]
    outputs += [(f"next_{name}", np.float32, shape) for name in names]
    layers = [graph.split(name, [1] * rnn.num_layers, axis=0) for name in names]
    ends = []
    for layer, states in enumerate(zip(*layers, strict=True)):
        own = Layer(graph, rnn, f"l{layer}")
        ends.append(own.cell(own.project(x), tuple(graph.add("Squeeze", state, zero) for state in states)))
        x = ends[-1][0]
    for name, parts in zip(names, zip(*ends, strict=True), strict=True):
        graph.add("Concat", *(graph.add("Unsqueeze", part, zero) for part in parts), axis=0, name=f"next_{name}")
    if not isinstance(model, LanguageModel) and model.pooling == "mean":
        x = _running_mean(graph, x)
        inputs += [("total", np.float64, ["batch", rnn.hidden_size]), ("steps", np.int64, [1])]
        outputs += [("next_total", np.float64, ["batch", rnn.hidden_size]), ("next_steps", np.int64, [1])]
    _linear(graph, x, model.decoder if isinstance(model, LanguageModel) else model.classifier, "scores")
    return _model(graph, run, inputs, outputs)


def _running_mean(graph: Graph, x: str) -> str:
    from onnx import TensorProto

    total = graph.add("Add", "total", graph.add("Cast", x, to=TensorProto.DOUBLE), name="next_total")
    steps = graph.add("Add", "steps", graph.constant("one_step", np.ones(1, np.int64)), name="next_steps")
    mean = graph.add("Div", total, graph.add("Cast", steps, to=TensorProto.DOUBLE))
    return graph.add("Cast", mean, to=TensorProto.FLOAT)


def _input(graph: Graph, run: FinishedRun, shape: list[int | str]) -> tuple[str, list[Value]]:
    """Add the graph's input and its standardisation or embedding; return the result's name and the graph's inputs."""
    plural = "s" if len(shape) > 1 else ""
    if isinstance(run.model, LanguageModel):
        embedding = graph.constant("embedding", run.model.embedding.weight)
        name = f"character{plural}"
        return graph.add("Gather", embedding, name), [(name, np.int64, shape)]
    name = f"frame{plural}"
    inputs: list[Value] = [(name, np.float32, [*shape, run.model.rnn.input_size])]
    if run.mean is None:
        return name, inputs
    centred = graph.add("Sub", name, graph.constant("mean", run.mean))
    return graph.add("Div", centred, graph.constant("std", run.std)), inputs


def _linear(graph: Graph, x: str, linear: nn.Linear, name: str) -> None:
    product = graph.add("MatMul", x, graph.constant("scores.weight", linear.weight.mT))
    graph.add("Add", product, graph.constant("scores.bias", linear.bias), name=name)


def _model(graph: Graph, run: FinishedRun, inputs: list[Value], outputs: list[Value]) -> ModelProto:
    from onnx import helper, numpy_helper

    def described(values: list[Value]) -> list[Any]:
        kind = helper.np_dtype_to_tensor_dtype
        return [helper.make_tensor_value_info(name, kind(np.dtype(dtype)), shape) for name, dtype, shape in values]

    constants = [numpy_helper.from_array(values, name) for name, values in graph.constants.items()]
    body = helper.make_graph(graph.nodes, run.model.rnn.cell, described(inputs), described(outputs), constants)
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(body, opset_imports=[opset], ir_version=IR_VERSION, producer_name="str-triton")
    helper.set_model_props(model, {"network": run.name, "outputs": json.dumps(run.outputs)})
    return model


def largest_deviation(run: FinishedRun, content: bytes, steps: int | None) -> float:
    """Return the largest difference between onnxruntime's and torch's scores of two random sequences.

    content: the bytes of the ONNX file. steps: the number of steps of an `unrolled` graph, or None for a `streaming`
    graph, which runs twenty steps.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    shape = 2, steps or 20
    if isinstance(run.model, LanguageModel):
        x = torch.randint(len(run.outputs), shape, generator=generator)
        fed = x.numpy()
    else:
        x = torch.randn(*shape, run.model.rnn.input_size, generator=generator)
        fed = (x if run.mean is None else x * run.std + run.mean).numpy()
    names = [value.name for value in session.get_inputs()]
    if steps is not None:
        (scores,) = session.run(["scores"], {names[0]: fed})
        with torch.no_grad():
            expected = run.model(x)[0] if isinstance(run.model, LanguageModel) else run.model(x)
        return float(np.abs(scores - expected.numpy()).max())
    deviation, state, onnx_state = 0.0, None, _zero_state(session)
    for time in range(shape[1]):
        scores, *following = session.run(None, {names[0]: fed[:, time], **onnx_state})
        onnx_state = dict(zip(onnx_state, following, strict=True))
        expected, state = run.model.step(x[:, time], state)
        deviation = max(deviation, float(np.abs(scores - expected.numpy()).max()))
    return deviation


def _zero_state(session: Any) -> dict[str, np.ndarray]:
    """Return the zero state of two sequences by the names of a streaming session's inputs."""
    dtypes = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(int64)": np.int64}
    return {
        value.name: np.zeros([2 if size == "batch" else size for size in value.shape], dtypes[value.type])
        for value in session.get_inputs()[1:]
    }
