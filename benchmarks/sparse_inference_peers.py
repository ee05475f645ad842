"""What `deploy.compile_sparse` is compared with: PyTorch, onnxruntime, and deepsparse in an environment of its own."""

import copy
import json
import signal
import subprocess
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

DEEPSPARSE = """
import json, sys, time
from importlib.metadata import version
from statistics import median
import numpy as np
from deepsparse import compile_model

path, threads, images, scores = sys.argv[1:]
engine = compile_model(path, batch_size=1, num_cores=int(threads))
inputs = [np.load(images)]
np.save(scores, engine.run(inputs)[0])
print("READY", json.dumps(version("deepsparse")), flush=True)
for line in sys.stdin:
    seconds = []
    for _ in range(int(line)):
        begin = time.perf_counter()
        engine.run(inputs)
        seconds.append(time.perf_counter() - begin)
    print("READY", median(seconds), flush=True)
"""


def eager(model: nn.Module, example: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Plain PyTorch: both layouts, batch norms as they are and folded into the convolutions."""
    return {
        f"{layout}, {norms}": _call(network, example, layout)
        for norms, network in (("batch norm", model), ("batch norm folded", fuse(copy.deepcopy(model))))
        for layout in LAYOUTS
    }


def compiled(model: nn.Module, example: Tensor) -> dict[str, Callable[[], Tensor]]:
    """torch.compile with frozen weights, in both layouts."""
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
    """The network as ONNX for a fixed input, batch norms folded, in an opset that all readers know."""
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


def onnxruntime_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session with all of its graph optimisations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class DeepSparse:
    """deepsparse in a process of another Python: `turn` is the contender, `output` what it computed.

    Between its turns the process stands still: its threads would spin on the others' cores.
    """

    def __init__(self, python: str, onnx: Path, threads: int, example: Tensor, work: Path) -> None:
        images, scores = work / "images.npy", work / "scores.npy"
        np.save(images, example.numpy())
        command = [python, "-c", DEEPSPARSE, str(onnx), str(threads), str(images), str(scores)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
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
        """What the process says next; it also prints a greeting."""
        for line in self._process.stdout:
            if line.startswith("READY "):
                return json.loads(line.removeprefix("READY "))
        raise RuntimeError(f"deepsparse ended with exit code {self._process.wait()}")
