"""Recurrent layers on the CPU: `deploy.compile_sparse` beside torch's layers, onnxruntime and OpenVINO.

    python -m benchmarks.speed.recurrent_inference [--cells gru lstm] [--hidden 64 ...] [--batches 1 16 64]
        [--threads 1 2] [--rounds 5] [--openvino FOLDER] [--quick]

Ours are compact layers of rank H/8 and H/16; the others have the dense matrix. All take turns in one process, on 99
steps of 32 features; a figure is the median over the rounds of the median call of a turn. "_int8" is the same layer
made by `deploy.quantize`. torch's dynamic quantization ("torch_int8") and onnxruntime belong to it, OpenVINO where it
can be imported: FOLDER is where `pip install --target FOLDER --no-deps openvino` put it. The last part times one
streaming step (`deploy.compile_step`) of 64 units.

It takes 12 to 27 minutes and needs a quiet machine. Results go to benchmarks/results/recurrent_inference.json;
--quick takes few rounds and writes none.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from benchmarks.speed.sparse_inference import in_turns, repeated
from benchmarks.speed.sparse_inference_peers import import_openvino, onnxruntime_call, openvino_call
from benchmarks.timing import version, write
from str_triton import LowRankGRU, LowRankLSTM, deploy

STEPS, FEATURES = 99, 32
HIDDEN, BATCHES, THREADS = (64, 128, 256, 512, 1024), (1, 16, 64), (1, 2)
SHARES = {"ours_r8": 8, "ours_r16": 16}  # the rank is H divided by it
LAYERS = {"gru": (LowRankGRU, nn.GRU), "lstm": (LowRankLSTM, nn.LSTM)}
ONNX_GATES = {"gru": (1, 0, 2), "lstm": (0, 3, 1, 2)}  # the order of gates in ONNX, by their numbers in torch
TURN, QUICK = 0.06, 2  # how long a turn's timed calls take together, about; rounds of a quick run
STEP_CALLS = 2000

Call = Callable[[], Any]


def onnx_model(cell: str, layer: nn.Module, batch: int) -> bytes:
    """Return the first layer of nn.GRU or nn.LSTM as an ONNX model with fixed sizes."""
    hidden, order = layer.hidden_size, ONNX_GATES[cell]

    def sorted_gates(tensor: Tensor) -> np.ndarray:
        blocks = tensor.detach().unflatten(0, (len(order), hidden))
        return blocks[list(order)].flatten(0, 1).unsqueeze(0).numpy()

    biases = [sorted_gates(getattr(layer, f"bias_{part}_l0")) for part in ("ih", "hh")]
    values = {
        "W": sorted_gates(layer.weight_ih_l0),
        "R": sorted_gates(layer.weight_hh_l0),
        "B": np.concatenate(biases, 1),
        "directions": np.array([1], np.int64),
    }
    options = {"linear_before_reset": 1} if cell == "gru" else {}
    nodes = [
        helper.make_node(cell.upper(), ["x", "W", "R", "B"], ["y4"], hidden_size=hidden, **options),
        helper.make_node("Squeeze", ["y4", "directions"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        cell,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [STEPS, batch, FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [STEPS, batch, hidden])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def networks(cell: str, hidden: int) -> tuple[nn.Module, dict[str, deploy.SparseModel]]:
    """Return torch's layer, and our compact ones by their names, compiled without a choice by timing."""
    torch.manual_seed(0)
    low_rank, dense = LAYERS[cell]
    x = torch.randn(STEPS, 2, FEATURES)
    ours = {}
    for name, share in SHARES.items():
        layer = low_rank(FEATURES, hidden, ranks={"weight_hh_l0": hidden // share}).eval()
        ours[name] = deploy.compile_sparse(layer, x, tune=False)
        ours[f"{name}_int8"] = deploy.compile_sparse(deploy.quantize(layer, [x]), x, tune=False)
    return dense(FEATURES, hidden).eval(), ours


def contenders(
    cell: str, layer: nn.Module, ours: dict[str, deploy.SparseModel], x: Tensor, threads: int, openvino: Any
) -> dict[str, Call]:
    """Return the calls by name; engines are checked against torch's layer."""
    calls: dict[str, Call] = {}
    for name, network in ours.items():
        network.example = [tuple(x.shape)]
        network.retune()
        calls[name] = lambda network=network: network(x)
    calls["torch"] = lambda: layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Only the children of a module are quantized.
        small = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.GRU, nn.LSTM}, dtype=torch.qint8)
    calls["torch_int8"] = lambda: small(x)
    model = onnx_model(cell, layer, x.shape[1])
    calls["onnxruntime"] = onnxruntime_call(model, x, threads)
    if openvino is not None:
        calls["openvino"] = openvino_call(openvino, model, x, threads, INFERENCE_PRECISION_HINT="f32")
    wanted = layer(x)[0].numpy()
    for name in {"onnxruntime", "openvino"} & calls.keys():
        np.testing.assert_allclose(calls[name](), wanted, rtol=0, atol=1e-4)
    return calls


def steps() -> dict[str, float]:
    """Return the microseconds of one frame of a GRU of 64 units, rank 8, and of the least that a call of C takes."""
    layer = LowRankGRU(FEATURES, 64, ranks={"weight_hh_l0": 8}).eval()
    compiled = deploy.compile_step(layer)
    x, state, output = torch.randn(1, FEATURES), compiled.begin(), torch.empty(1, compiled.outputs)
    held = layer.step(x)[1]
    calls = {
        "step": lambda: compiled.step(x, state),
        "step_ (in place)": lambda: compiled.step_(x, state, output),
        "LowRankGRU.step": lambda: layer.step(x, held),
    }
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(20):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(STEP_CALLS // 20):
                call()
            best[name] = min(best[name], (time.perf_counter() - begin) / (STEP_CALLS // 20))
    return {name: 1e6 * seconds for name, seconds in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--hidden", nargs="+", type=int, default=HIDDEN)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--threads", nargs="+", type=int, default=THREADS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--openvino", help="folder of its own in which OpenVINO is installed")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    openvino = import_openvino(options.openvino)
    rows, rounds = [], QUICK if options.quick else options.rounds
    with torch.inference_mode():
        for cell in options.cells:
            for hidden in options.hidden:
                layer, ours = networks(cell, hidden)
                for threads in options.threads:
                    torch.set_num_threads(threads)
                    for batch in options.batches:
                        x = torch.randn(STEPS, batch, FEATURES)
                        calls = contenders(cell, layer, ours, x, threads, openvino)
                        seconds = in_turns({name: repeated(call) for name, call in calls.items()}, rounds, TURN)
                        ms = {name: 1e3 * median(values) for name, values in seconds.items()}
                        rows.append({"cell": cell, "hidden": hidden, "batch": batch, "threads": threads, "ms": ms})
                        times = ", ".join(f"{name} {value:.3f}" for name, value in ms.items())
                        print(f"{cell} {hidden}, batch {batch}, {threads} threads: {times} ms", flush=True)
        torch.set_num_threads(1)
        step = steps()
    print(", ".join(f"{name}: {us:.2f} us" for name, us in step.items()))
    if not options.quick:
        versions = {name: version(name) for name in ("onnxruntime", "openvino")}
        write("recurrent_inference", {"versions": versions, "rows": rows, "step_us": step})


if __name__ == "__main__":
    main()
