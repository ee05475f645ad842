"""Learned ranks beside fixed ranks, the SVD of a dense network, and smaller dense networks, at equal parameters.

    python -m benchmarks.studies.learned_rank DATA [--compressions 2 4 8] [--seeds 0 1 2] [--jobs 2]
    python -m benchmarks.studies.learned_rank DATA --tune --compressions 4 --seeds 5 6 7 [--jobs 2]
    python -m benchmarks.studies.learned_rank DATA --picture FILE

DATA is a key of `DATA_SETS`. Every run is one of rnn/train.py, with one thread and the recipe of the data set. A line
per run is appended to benchmarks/results/learned_rank.jsonl; runs that it already holds are skipped. `--tune` tries
the learning rates of `RATES` with every method, at the first compression, and writes the validation results, never
those of the test data, to benchmarks/results/learned_rank_tuning.jsonl; take other seeds for it than for the runs. The
runs then use the best rate of each method. A data set that was not tuned takes the multiples of its rate that were best
on `TUNED`.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks import charts
from benchmarks.runs import RunFile
from benchmarks.timing import RESULTS
from str_triton.rnn.models import Architecture
from str_triton.rnn.recipes import RECIPES
from str_triton.rnn.train import main as train
from str_triton.training.metrics import read_metrics

KEY = ("data", "method", "compression", "seed", "rate")
RUNS = RunFile(RESULTS / "learned_rank.jsonl", KEY)
TUNING = RunFile(RESULTS / "learned_rank_tuning.jsonl", KEY)
METHODS = ("str-exact", "fixed", "svd-finetune", "small dense")
RATES = (0.5, 1.0, 2.0, 4.0)
TUNED = "japanese-vowels"
FIGURE = ("accuracy", 100, "test accuracy, %")
# The data's recipes, with the learning rates that `RATES` multiplies (the recipes' own follow from the tuning); that of
# text is shrunk to what a study on two cores can carry.
DATA_SETS = {
    "japanese-vowels": replace(RECIPES["japanese-vowels-gru"](), lr=5e-3),
    "spoken": replace(RECIPES["spoken-gru"](), lr=5e-3),
    "text": replace(RECIPES["text-lstm"](), lr=3e-3, hidden_size=128, epochs=6),
}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train once. `job` names data, method, compression (None: the whole dense network), size, seed and rate."""
    torch.set_num_threads(1)
    config = DATA_SETS[job["data"]]
    method = "dense" if "dense" in job["method"] else job["method"]
    arguments = [config.recipe, "--method", method, "--seed", str(job["seed"]), "--threads", "1"]
    arguments += ["--epochs", str(config.epochs), "--hidden-size", str(job["hidden_size"])]
    arguments += ["--lr", str(config.lr * job["rate"]), "--choose", job["choose"]]
    if job["compression"] is not None and method != "dense":
        arguments += ["--target-params", str(job["params"])]
    folder = Path(tempfile.mkdtemp())
    try:
        code = train([*arguments, "--run-dir", str(folder / "run")])
        if code:
            raise RuntimeError(f"rnn/train.py {' '.join(arguments)} ended with exit code {code}")
        summary = json.loads((folder / "run" / "summary.json").read_text())
        last = [record for record in read_metrics(folder / "run") if record["kind"] == "epoch"][-1]
    finally:
        shutil.rmtree(folder)
    return {**job, **{key: value for key, value in summary.items() if key != "seed"}, "validation_loss": last["loss"]}


def hidden_size(data: str, params: int, sizes: dict[str, Any]) -> int:
    """Return the units of the largest dense network of the same kind with at most `params` parameters."""
    hidden = 1
    while dense_params(data, hidden + 1, sizes) <= params:
        hidden += 1
    return hidden


def dense_params(data: str, hidden: int, sizes: dict[str, Any]) -> int:
    config = DATA_SETS[data]
    architecture = Architecture(
        sizes["task"], config.cell, sizes["inputs"], sizes["outputs"], hidden, config.layers, config.bidirectional
    )
    with torch.device("meta"):
        return sum(p.numel() for p in architecture.build(factorize="none").parameters())


SIZES = {
    "japanese-vowels": {"task": "classify", "inputs": 12, "outputs": 9},
    "spoken": {"task": "classify", "inputs": 32, "outputs": 12},
    "text": {"task": "lm", "inputs": 100, "outputs": 100},
}


def jobs(data: str, compressions: Iterable[float], seeds: Iterable[int]) -> list[dict]:
    config = DATA_SETS[data]
    whole = dense_params(data, config.hidden_size, SIZES[data])
    found = []
    for seed in seeds:
        for compression in (None, *compressions):
            params = None if compression is None else int(whole / compression)
            for method in ("dense",) if compression is None else METHODS:
                size = hidden_size(data, params, SIZES[data]) if method == "small dense" else config.hidden_size
                found.append(
                    {"data": data, "method": method, "compression": compression, "params": params, "hidden_size": size}
                    | {"seed": seed, "choose": config.choose}
                )
    return found


def best_rate(data: str, method: str) -> float:
    """Return the rate with the least validation loss in tuning. Smaller dense networks take the rate of "dense"."""
    lines = TUNING.read()
    data = data if any(line["data"] == data for line in lines) else TUNED
    losses: dict[float, list[float]] = {}
    for line in lines:
        if line["data"] == data and line["method"] == ("dense" if "dense" in method else method):
            losses.setdefault(line["rate"], []).append(line["validation_loss"])
    return min(losses, key=lambda rate: mean(losses[rate]), default=1.0)


def tuning_jobs(data: str, compression: float, seeds: Iterable[int]) -> list[dict]:
    own = jobs(data, [compression], seeds)
    return [
        job | {"choose": "validation", "rate": rate} for job in own if job["method"] != "small dense" for rate in RATES
    ]


def do(wanted: Iterable[dict], held: RunFile, count: int, keep_test: bool) -> None:
    """Train the jobs that `held` lacks, `count` at a time, and append their results."""
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        for result in pool.map(run, held.missing(wanted)):
            if not keep_test:
                result = {k: v for k, v in result.items() if k not in ("accuracy", "bits_per_character")}
            held.append(result)
            print({k: result.get(k) for k in (*KEY, "accuracy", "bits_per_character", "validation_loss", "seconds")})


def picture(runs: list[dict], path: Path) -> None:
    """Draw test results against parameters as SVG: a part per data set, a curve per method, mean and deviation."""
    names = list(dict.fromkeys(run["data"] for run in runs))
    figure, parts = charts.new("learned_rank", len(names))
    for name, axes in zip(names, parts, strict=True):
        own = [run for run in runs if run["data"] == name]
        key, scale, label = ("bits_per_character", 1, "bits per character") if name == "text" else FIGURE
        dense = [run for run in own if run["method"] == "dense"]
        axes.axhline(mean(run[key] * scale for run in dense), color="grey", linestyle="--", label="dense, whole")
        for method in METHODS:
            chosen = [run for run in own if run["method"] == method]
            points = [[run for run in chosen if run["compression"] == c] for c in {r["compression"]: 0 for r in chosen}]
            shares = [100 * mean(run["params"] for run in point) / dense[0]["params"] for point in points]
            figures = [[run[key] * scale for run in point] for point in points]
            deviations = [stdev(values) if len(values) > 1 else 0.0 for values in figures]
            axes.errorbar(
                shares, list(map(mean, figures)), deviations, marker="o", markersize=4, capsize=3, label=method
            )
        axes.set(xlim=(0, 40), xlabel="parameters, % of the dense network's", ylabel=label, title=name)
        axes.grid(alpha=0.3)
    parts[0].legend()
    charts.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=DATA_SETS)
    parser.add_argument("--tune", action="store_true", help="find each method's learning rate")
    parser.add_argument("--compressions", nargs="+", type=float, default=[2.0, 4.0, 8.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--picture", type=Path, help="draw all lines as SVG, run nothing")
    args = parser.parse_args()
    if args.picture:
        picture(RUNS.read(), args.picture)
        return
    if args.tune:
        do(tuning_jobs(args.data, args.compressions[0], args.seeds), TUNING, args.jobs, keep_test=False)
        return
    todo = jobs(args.data, args.compressions, args.seeds)
    do([job | {"rate": best_rate(args.data, job["method"])} for job in todo], RUNS, args.jobs, keep_test=True)


if __name__ == "__main__":
    main()
