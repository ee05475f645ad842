"""Networks for Japanese Vowels as C: size, accuracy of the compiled program in float32 and int8, time per frame.

    python -m benchmarks.speed.c_export RUNS

RUNS is a folder for the trained networks. Missing ones are trained. The accuracy is that of the compiled program on the
whole test set of 370 utterances, which no choice depends on. A bidirectional network is called twice per frame. Times
are processor times of gcc -O2 code on this CPU, one sequence after the other.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import write
from str_triton import deploy
from str_triton.rnn.data import load
from str_triton.rnn.finished_run import FinishedRun, open_run
from tests.deploy.c_program import compiled, scores

SEEDS = (0, 1, 2)
FASTGRNN = ["--cell", "fastgrnn", "--no-bidirectional"]
NETWORKS = {
    "gru-96 (the demo)": [],
    "gru-48": ["--hidden-size", "48", "--target-rank", "24"],
    "fastgrnn-48": [*FASTGRNN, "--hidden-size", "48", "--target-rank", "20"],
    "fastgrnn-24": [*FASTGRNN, "--hidden-size", "24", "--target-rank", "16"],
}
REPEATS = 20


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("runs", type=Path, metavar="RUNS")
    runs = arguments.parse_args().runs
    torch.set_num_threads(1)
    test = load("japanese-vowels").test
    rows = []
    for name, options in NETWORKS.items():
        for seed in SEEDS:
            folder = runs / f"{name.split()[0]}-seed-{seed}"
            train(folder, options, seed)
            rows.append({"network": name, "seed": seed, **measured(open_run(folder), test)})
            print(json.dumps(rows[-1]))
    write("c_export", {"data": "japanese-vowels", "rows": rows})


def train(folder: Path, options: list[str], seed: int) -> None:
    if not (folder / "summary.json").exists():
        command = [sys.executable, "rnn/train.py", *options, "--seed", str(seed), "--device", "cpu"]
        subprocess.run([*command, "--run-dir", str(folder)], check=True, stdout=subprocess.DEVNULL)


def measured(run: FinishedRun, test: Any) -> dict[str, Any]:
    """Measure size, accuracy and time of the C programs of a run, and torch's."""
    x, lengths, labels = test.batch(torch.arange(len(test)), augment=False, generator=torch.Generator(), device="cpu")
    with torch.no_grad():
        exact = run.model(x, lengths)
    frames = [(sequence[:n] * run.std + run.mean).numpy() for sequence, n in zip(x, lengths, strict=True)]
    result: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "torch_accuracy": accuracy(exact.numpy(), labels.numpy()),
    }
    for weights in ("float32", "int8"):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "vowels"
            sizes = deploy.export_c(run.model, folder, weights=weights, mean=run.mean, std=run.std)
            logits, best, seconds = scores(compiled(folder, "-O2"), frames, len(run.outputs), REPEATS)
        assert (best == logits.argmax(1)).all()
        result[weights] = {
            "weight_bytes": sizes.weights,
            "flash_bytes": sizes.flash,
            "state_bytes": sizes.state,
            "stack_bytes": sizes.stack,
            "accuracy": accuracy(logits, labels.numpy()),
            "largest_deviation": float(np.abs(logits - exact.numpy()).max()),
            "microseconds_per_frame": round(1e6 * seconds, 3),
        }
    return result


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(1) == labels).mean())


if __name__ == "__main__":
    main()
