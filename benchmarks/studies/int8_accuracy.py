"""Accuracy, bytes and time of runs of cnn/train.py in float32 and on 8-bit integers, both by `compile_sparse`.

    python -m benchmarks.studies.int8_accuracy RUN... [--images 512] [--methods mse percentile minmax] [--name NAME]

RUN is the folder of a run. The calibration takes the first --images training images, without augmentation and without
labels; the accuracy is that on all test images. Times are minima of alternating calls with one image. Each run is an
entry in benchmarks/results/int8_accuracy.json, under its folder's name or NAME.
"""

import argparse
import json
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import RESULTS, machine
from str_triton import count, deploy
from str_triton.cnn.data import Data, batches, load
from str_triton.cnn.rebuild import rebuild
from str_triton.deploy.sparse.quantize.ranges import METHODS

PATH = RESULTS / "int8_accuracy.json"
BATCH, ROUNDS, SECONDS = 64, 400, 5.0


def examples(data: Data, *, test: bool) -> Any:
    """Yield batches of images and labels, each image once and as it is."""
    part = data.test if test else data.train
    options = {"augment": False, "shuffle": False, "workers": 0, "device": torch.device("cpu")}
    return batches(part, batch_size=BATCH, seed=0, epoch=0, **options)


@torch.inference_mode()
def accuracy(model: nn.Module, data: Data) -> float:
    """Return the share of test images that are classified rightly."""
    right = images = 0
    for x, labels in examples(data, test=True):
        right += int((model(x).argmax(1) == labels).sum())
        images += len(labels)
    return right / images


def fastest(models: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
    """Return the fewest milliseconds of a call of each model; they take turns."""
    best, begin = dict.fromkeys(models, float("inf")), time.perf_counter()
    for _ in range(ROUNDS):
        for name, model in models.items():
            start = time.perf_counter()
            model(x)
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
        if time.perf_counter() - begin > SECONDS:
            break
    return best


def size(network: nn.Module) -> int:
    """Return the bytes of a saved network."""
    with tempfile.TemporaryDirectory() as folder:
        network.save(Path(folder) / "net")
        return (Path(folder) / "net").stat().st_size


def study(run: Path, images: int, methods: list[str]) -> dict[str, Any]:
    """Return what is measured of a run."""
    network = rebuild(run, None)
    data = load(network.config.data, network.config.data_dir, None, network.config.image_size)
    model = network.model.eval()
    calibration = [x for x, _ in islice(examples(data, test=False), -(-images // BATCH))]
    one = calibration[0][:1].clone()
    budget = count(model, one)
    networks, errors, left = {"float32": deploy.compile_sparse(model, one)}, {}, {}
    for method in methods:
        quantized = deploy.quantize(model, calibration, method=method)
        networks[method] = deploy.compile_sparse(quantized, one)
        errors[method] = quantized.report.error
        left[method] = {layer.label: layer.left for layer in quantized.report.layers if layer.left}
    return {
        "network": network.name,
        "data": network.config.data.rpartition("/")[2],  # the folder's name alone: paths are those of one machine
        "sparsity": budget.sparsity,
        "images": images,
        "accuracy": {name: accuracy(found, data) for name, found in networks.items()},
        "bytes": {name: size(found) for name, found in networks.items()},
        "milliseconds": fastest(networks, one),
        "relative_error": errors,
        "in_float32": left,
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["percentile"])
    parser.add_argument("--name", help="of the entry; default: the folder's")
    options = parser.parse_args()
    if options.name and len(options.runs) > 1:
        parser.error("--name is for one RUN")
    for run in options.runs:
        entry = study(run, options.images, options.methods)
        found = json.loads(PATH.read_text()) if PATH.exists() else {}
        found[options.name or run.name] = entry
        PATH.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
        print(
            run.name, json.dumps({key: entry[key] for key in ("accuracy", "bytes", "milliseconds", "relative_error")})
        )


if __name__ == "__main__":
    main()
