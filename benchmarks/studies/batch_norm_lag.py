"""The lag of batch norm's running statistics in the demo: python -m benchmarks.studies.batch_norm_lag [--seed 0].

Trains `cnn/train.py`'s demo as a dense network, by GMP, and by the controller with a solve every 20 steps and at every
step. After each epoch it measures the test accuracy with three kinds of statistics: the running ones of training, those
recomputed from 20 batches (as in the program), and from all training batches. Writes
benchmarks/results/batch_norm_lag.json.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import ClassVar

from accelerate import Accelerator

from benchmarks.timing import RESULTS, machine
from str_triton import SparsityController, refresh_batch_norm
from str_triton.cnn import train
from str_triton.cnn.config import Config
from str_triton.training.metrics import Record
from str_triton.training.run import Run

RUNS = {
    "dense": ("dense", None),
    "gmp": ("gmp", None),
    "every 20 steps": ("str-exact", 20),
    "every step": ("str-exact", 1),
}


class Experiment(train.Experiment):
    """A training that measures each epoch with three kinds of statistics."""

    interval: ClassVar[int | None] = None
    epochs: ClassVar[list[Record]]

    @classmethod
    def prepare(cls, config: Config, accelerator: Accelerator) -> "Experiment":
        experiment = super().prepare(config, accelerator)
        if cls.interval is not None:
            assert isinstance(experiment.controller, SparsityController)
            experiment.controller.interval = cls.interval
        return experiment

    def measure(self, run: Run, epoch: int) -> Record:
        running = self.evaluate().accuracy
        record = super().measure(run, epoch)
        refresh_batch_norm(self.model, (images for images, _ in self.batches(epoch, 0)))
        recomputed = self.evaluate().accuracy
        self.refresh_batch_norm(epoch)
        accuracies = {"running": running, "20 batches": record["accuracy"], "all batches": recomputed}
        self.epochs.append({"epoch": epoch, "sparsity": record["sparsity"], **accuracies})
        return record


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.batch_norm_lag", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    runs = {}
    for name, (method, Experiment.interval) in RUNS.items():
        Experiment.epochs = []
        with tempfile.TemporaryDirectory() as folder:
            options = ["--method", method, "--seed", str(seed), "--run-dir", str(Path(folder) / "run")]
            if Experiment.main(train.COMMAND_LINE, options):
                raise SystemExit(f"{name}: the run failed")
        runs[name] = Experiment.epochs
    result = {"machine": machine(), "seed": seed, "runs": runs}
    (RESULTS / "batch_norm_lag.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
