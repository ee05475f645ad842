"""Pruned weights that are trained ever more seldom, as an alternative to str-exact's gradients, in three studies.

    python -m benchmarks.studies.fading_gradient cifar --data hub:DIR
    python -m benchmarks.studies.fading_gradient caltech --data hub:DIR --pretrained FILE
    python -m benchmarks.studies.fading_gradient methods --data DIR

A share of the steps, spread evenly, has the straight-through gradient, and the others have the masked one. The share
falls from 1 at the start of training to 0 at its end. Everything else is as in the lines of the same names in
benchmarks/studies/{cifar,caltech,methods}.py. Appends a line per run to benchmarks/results/fading_gradient.jsonl and
skips runs that it already holds. docs/methods.md has the comparison.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.runs import Run, RunFile
from benchmarks.studies import caltech, cifar, methods
from benchmarks.studies.cnn_runs import finished
from benchmarks.timing import RESULTS, machine
from str_triton import SparsityController
from str_triton.cnn.data import load

RUNS = RunFile(RESULTS / "fading_gradient.jsonl", ("study", "line", "target", "seed"))
FOLDERS = Path("runs/fading")
GOLDEN_RATIO = (5**0.5 - 1) / 2  # Its multiples, modulo 1, spread a share of the steps more evenly than chance does.


class Fading(SparsityController):
    """A controller whose layers have the straight-through gradient in a falling share of the steps."""

    def _set_gradient(self) -> None:
        is_used = self.steps * GOLDEN_RATIO % 1 < 1 - self.progress
        for module in self._straight_through:
            module.gradient = "straight_through" if is_used else "masked"


def wanted(study: str) -> Iterator[Run]:
    """Yield the runs of a study. Those with a teacher need the dense network of `cifar` with the same seed."""
    runs = {
        "cifar": (("str-exact", "str-exact, teacher"), (0.9,)),
        "caltech": (("str-exact",), ("0.9",)),
        "methods": (("str-exact", "str-exact, fine-tuned 0.4"), (0.9, 0.95, 0.98, 0.99)),
    }
    lines, targets = runs[study]
    for line, seed, target in product(lines, (0, 1, 2), targets):
        yield {"study": study, "line": line, "target": target, "seed": seed}


def train(key: Run, data: str, pretrained: str | None, threads: int) -> Run:
    """Run a line and return its results."""
    folder = FOLDERS / f"{key['study']}-{key['line'].replace(', ', '-')}-{key['target']}-{key['seed']}"
    with patch("str_triton.cnn.methods.soft.SparsityController", Fading):
        if key["study"] == "methods":
            torch.set_num_threads(threads)
            images = load("fashion-mnist", data)
            dense = partial(methods.dense_network, images)
            run = methods.run_line(key["line"], key["target"], key["seed"], images, dense)
            assert run is not None  # It needs no other line.
            return run
        if key["study"] == "caltech":
            line = caltech.Key(key["line"], key["target"], key["seed"])
            return finished(folder, caltech.arguments(line, data, str(pretrained), threads))
        options = cifar.options_of({**key, "model": "resnet20"})
        return finished(folder, ["cifar10", "--data", data, "--threads", str(threads), *options])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("cifar", "caltech", "methods"))
    parser.add_argument("--data", required=True, help="as for that study: hub:DIR, or the folder of Fashion-MNIST")
    parser.add_argument("--pretrained", help="MobileNetV1's weights, for caltech")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    for key in RUNS.missing(wanted(options.study)):
        result = train(key, options.data, options.pretrained, options.threads)
        RUNS.append({**key, **result, "machine": machine()})


if __name__ == "__main__":
    main()
