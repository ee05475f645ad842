"""Sparse networks on 8-bit integers on the CPU: `deploy.quantize` beside onnxruntime and OpenVINO on the same codes.

    python -m benchmarks.speed.int8_inference NETWORK... [--openvino FOLDER] [--batches 1 8] [--rounds 11] [--threads 2]
        [--until STEP] [--quick]

NETWORK is one of those of sparse_inference.py, or "all": mobilenetv1-89.01, resnet50-90.23 and resnet50-95.03. All take
turns in one process: ours in float32, ours on integers, and the engines on the QDQ file that `deploy.export_onnx` makes
of the same quantized network. FOLDER is where `pip install --target FOLDER --no-deps openvino` put OpenVINO.

Steps that are done are not done again while --work has their files: "prepare" (weights, quantization, ONNX: not timed),
"compile" (ours, for each batch), "time". The two last need a quiet machine. A figure is the median over the rounds of
the median call of a turn. Results go to benchmarks/results/int8_inference_PROCESSOR.json; --quick takes few rounds and
writes none.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.sparse_inference import (
    NETWORKS,
    QUICK,
    STEPS,
    in_turns,
    is_current,
    random_network,
    ratio,
    repeated,
)
from benchmarks.speed.sparse_inference_peers import import_openvino, onnxruntime_call, openvino_call
from benchmarks.timing import RESULTS, in_file_names, machine, version
from str_triton import count, deploy
from str_triton.cnn.models import build

ALL = ("mobilenetv1-89.01", "resnet50-90.23", "resnet50-95.03")
BATCHES = (1, 8)
IMAGES = 8  # of the calibration: random weights have no accuracy to lose
OURS, FLOATS = "int8", "float32"
Call = Callable[[], Any]


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(seed))


def prepare(name: str, work: Path) -> tuple[nn.Module, deploy.QuantizedModel]:
    """Make the network, its quantized form and the ONNX file of that, or load them."""
    weights, quantized, onnx = (work / f"{name}.{kind}" for kind in ("pt", "quantized.pt", "qdq.onnx"))
    model = build(NETWORKS[name][0]).eval()
    if not weights.exists():
        torch.save(random_network(*NETWORKS[name], images(1, 1)).state_dict(), weights)
    model.load_state_dict(torch.load(weights, weights_only=True))
    if not is_current(quantized):
        torch.save(deploy.quantize(model, [images(IMAGES, 2)]), quantized)
        onnx.unlink(missing_ok=True)
    found = torch.load(quantized, weights_only=False)
    if not onnx.exists():
        deploy.export_onnx(found, images(2, 1), inputs=["images"], outputs=["scores"]).save(onnx)
    return model, found


def compiled(network: nn.Module, path: Path, x: Tensor) -> nn.Module:
    """Compile with compile_sparse, or load the file if it is newer than the code."""
    if not is_current(path):
        deploy.compile_sparse(network, x).save(path)
    return deploy.load_sparse(path)


def measure(name: str, batch: int, options: argparse.Namespace, openvino: Any) -> dict[str, Any] | None:
    """Return the times of one network with one size of the batch; None: only the files were wanted."""
    model, quantized = prepare(name, options.work)
    if options.until == "prepare":
        return None
    x = images(batch, 1)
    ours = {
        kind: compiled(network, options.work / f"{name}.{kind}.{batch}.sparse", x)
        for kind, network in ((OURS, quantized), (FLOATS, model))
    }
    if options.until == "compile":
        return None
    onnx = options.work / f"{name}.qdq.onnx"
    calls: dict[str, Call] = {kind: lambda network=network: network(x) for kind, network in ours.items()}
    calls["onnxruntime int8"] = onnxruntime_call(onnx, x, options.threads)
    if openvino is not None:
        calls["OpenVINO int8"] = openvino_call(openvino, onnx, x, options.threads)
    outputs, wanted = {kind: torch.as_tensor(call()) for kind, call in calls.items()}, model(x)
    seconds = in_turns({kind: repeated(call) for kind, call in calls.items()}, options.rounds)
    budget = count(model, x[:1])
    return {
        "sparsity": budget.sparsity,
        "flops": budget.flops,
        "milliseconds": {kind: 1e3 * median(values) for kind, values in seconds.items()},
        "times_as_fast": {kind: ratio(values, seconds[OURS]) for kind, values in seconds.items() if kind != OURS},
        "relative_error": {kind: float((y - wanted).norm() / wanted.norm()) for kind, y in outputs.items()},
        "relative_difference_to_int8": {
            kind: float((y - outputs[OURS]).norm() / wanted.norm()) for kind, y in outputs.items()
        },
        "layers": ours[OURS].table().splitlines(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", choices=[*NETWORKS, "all"], metavar="NETWORK")
    parser.add_argument("--openvino", help="folder of its own in which OpenVINO is installed", metavar="FOLDER")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--until", choices=STEPS, default=STEPS[-1], help="the last step to do")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/sparse_inference"), help="where steps leave files")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.rounds = QUICK if options.quick else options.rounds
    torch.set_num_threads(options.threads)
    openvino = import_openvino(options.openvino)
    rows = []
    for name in ALL if "all" in options.networks else options.networks:
        for batch in options.batches:
            with torch.inference_mode():
                row = measure(name, batch, options, openvino)
            if row is None:
                continue
            rows.append({"network": name, "batch": batch, **row})
            times = ", ".join(f"{kind} {ms:.2f}" for kind, ms in row["milliseconds"].items())
            print(f"{name}, batch {batch}: {times} ms", flush=True)
    if rows and not options.quick:
        write(rows, options)


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Put the rows into the result file of this machine, in place of those of the same network and batch."""
    engines = {name: version(name) for name in ("onnxruntime", "openvino")}
    shared = {"machine": machine(), "versions": engines, "rounds": options.rounds, "threads": options.threads}
    path = RESULTS / f"int8_inference_{in_file_names(machine()['processor'])}.json"
    found = json.loads(path.read_text())["rows"] if path.exists() else []
    every = {(row["network"], row["batch"]): row for row in [*found, *({**row, **shared} for row in rows)]}
    path.write_text(json.dumps({"rows": [every[key] for key in sorted(every)]}, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
