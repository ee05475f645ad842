"""The peers of `deploy.compile_sparse`: PyTorch, onnxruntime, and others in processes of their own."""

import copy
import importlib
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

Contender = Callable[[int], float]
"""The median seconds of so many calls, one after the other."""

OPSET = 13  # the newest that deepsparse 1.8.0 knows well
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# Programs of peers. Each reads the input from a file, writes what it computes to another, says READY with its version,
# and then, for each number of calls that it reads, their median seconds. `call` makes one call.
_BEGIN = """
import json, sys, time
from importlib.metadata import version
from statistics import median
import numpy as np

path, threads, images_path, scores_path = sys.argv[1:5]
threads, images = int(threads), np.load(images_path)
"""
_END = """
np.save(scores_path, call())
print("READY", json.dumps(peer_version), flush=True)
for line in sys.stdin:
    seconds = []
    for _ in range(int(line)):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    print("READY", median(seconds), flush=True)
"""
_PROGRAMS = {
    "deepsparse": """
from deepsparse import compile_model

engine = compile_model(path, batch_size=1, num_cores=threads)
peer_version = version("deepsparse")

def call():
    return engine.run([images])[0]
""",
    # Its converter times which layers are faster sparse.
    "MNN": """
import os, subprocess
import MNN

converter, converted = os.path.join(os.path.dirname(sys.executable), "mnnconvert"), path + ".mnn"
if not os.path.exists(converted):
    files = ["--modelFile", path, "--MNNModel", converted, "--bizCode", "MNN"]
    command = [converter, "-f", "ONNX", *files, "--detectSparseSpeedUp"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
net = MNN.Interpreter(converted)
session = net.createSession({"backend": "CPU", "numThread": threads, "precision": "high"})
given, made = net.getSessionInput(session), net.getSessionOutput(session)
kind = MNN.Halide_Type_Float, MNN.Tensor_DimensionType_Caffe
host = MNN.Tensor(images.shape, kind[0], images, kind[1])
scores = MNN.Tensor(made.getShape(), kind[0], np.zeros(made.getShape(), np.float32), kind[1])
peer_version = version("MNN")

def call():
    given.copyFrom(host)
    net.runSession(session)
    made.copyToHostTensor(scores)
    return np.array(scores.getNumpyData())
""",
    # compile_sparse of another checkout, which stands first in Python's path.
    "before": """
import torch
from str_triton.cnn.models import build
from str_triton import deploy

torch.set_num_threads(threads)
weights, name = path.split(",")
model, x = build(name).eval(), torch.from_numpy(images)
model.load_state_dict(torch.load(weights, weights_only=True))
network = deploy.compile_sparse(model, x)
peer_version = deploy.__file__

def call():
    with torch.no_grad():
        return network(x).numpy()
""",
}


def eager(model: nn.Module, example: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Plain PyTorch: both layouts, batch norms as they are and folded into the convolutions."""
    return {
        f"{layout}, {norms}": _call(network, example, layout)
        for norms, network in (("batch norm", model), ("batch norm folded", fuse(copy.deepcopy(model))))
        for layout in LAYOUTS
    }


def compiled(model: nn.Module, example: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Compile with torch.compile and frozen weights, in both memory formats."""
    return {
        f"{layout}, freezing": _call(model, example, layout, lambda m: torch.compile(m, options={"freezing": True}))
        for layout in LAYOUTS
    }


def _call(
    model: nn.Module, example: Tensor, layout: str, change: Callable[[nn.Module], Any] = lambda model: model
) -> Callable[[], Tensor]:
    network = change(copy.deepcopy(model).to(memory_format=LAYOUTS[layout]))
    images = example.contiguous(memory_format=LAYOUTS[layout])
    return lambda: network(images)


def onnx_file(model: nn.Module, example: Tensor, path: Path) -> None:
    """Write the network as ONNX for a fixed input, with folded batch norms, in an opset that all readers know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the newer exporter writes newer opsets alone
        torch.onnx.export(
            model,
            (example,),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["scores"],
        )


def onnxruntime_session(model: Path | bytes, threads: int) -> onnxruntime.InferenceSession:
    """Return an onnxruntime session with all graph optimizations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnxruntime_call(model: Path | bytes, x: Tensor, threads: int) -> Callable[[], np.ndarray]:
    """Return a call of onnxruntime that computes the first output of a model with one input."""
    session = onnxruntime_session(model, threads)
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)[0]


def import_openvino(folder: str | None) -> Any:
    """Import OpenVINO, from a folder of its own if one is given; None: it is not installed."""
    if folder:
        sys.path.append(folder)
    try:
        return importlib.import_module("openvino")
    except ImportError:
        return None


def openvino_call(
    openvino: Any, model: Path | bytes, x: Tensor, threads: int, **options: str
) -> Callable[[], np.ndarray]:
    """Return a call of OpenVINO that computes the first output of a model with one input, for the size of x."""
    core = openvino.Core()
    network = core.read_model(model)
    network.reshape(list(x.shape))
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **options}
    request = core.compile_model(network, "CPU", options).create_infer_request()
    given = x.numpy()
    return lambda: request.infer([given], share_inputs=True)[0]


class Peer:
    """One of `_PROGRAMS` in a process of another Python: `turn` is the contender, `output` what it computed.

    Between its turns the process stands still: its threads would spin on the others' cores.

    Args:
        name: the program's.
        python: the interpreter.
        network: the path of the network's ONNX file; for "before" that of its weights, a comma, the model's name.
        threads, example: how many, and the input.
        work: a folder for files.
        path: a folder that stands first in Python's path.
    """

    def __init__(
        self, name: str, python: str, network: str, threads: int, example: Tensor, work: Path, path: str = ""
    ) -> None:
        images, scores = work / "images.npy", work / f"scores-{name}.npy"
        np.save(images, example.numpy())
        program = _BEGIN + _PROGRAMS[name] + _END
        # -P: the folder that the benchmark runs in would come before `path`.
        command = [python, *(["-P"] if path else []), "-c", program, network, str(threads), str(images), str(scores)]
        environment = os.environ | ({"PYTHONPATH": path} if path else {})
        self._name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.version: str = self._answer()
        self.output = torch.from_numpy(np.load(scores))
        self._process.send_signal(signal.SIGSTOP)

    def turn(self, calls: int) -> float:
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(f"{calls}\n")
        self._process.stdin.flush()
        seconds = self._answer()
        self._process.send_signal(signal.SIGSTOP)
        return seconds

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> Any:
        """Return what the process says next; some print more than that."""
        for line in self._process.stdout:
            if line.startswith("READY "):
                return json.loads(line.removeprefix("READY "))
        raise RuntimeError(f"{self._name} ended with exit code {self._process.wait()}")
