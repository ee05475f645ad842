"""The base of the studies of ranks on real data: runs of rnn/train.py, one line of JSON each, resumable at any kill."""

import argparse
import fcntl
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.runs import RunFile, at_its_rate
from str_triton import count_ranks, deploy
from str_triton.rnn.finished_run import open_run
from str_triton.rnn.models import Architecture
from str_triton.rnn.train import main as train
from str_triton.training.metrics import read_metrics

Job = dict[str, Any]
# The values that tell one run from another.
KEY = ("data", "cell", "method", "ranks", "compression", "hidden_size", "epochs", "max_norm", "rate", "seed")
KEPT = ("accuracy", "validation_accuracy", "ranks", "params", "dense_params", "chosen_epoch", "seconds")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that the studies share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the data, as rnn/train.py takes them")
    parser.add_argument("--out", type=Path, help="the file of results")
    parser.add_argument("--work", type=Path, default=Path("runs/studies"), help="folder of the runs in progress")
    parser.add_argument("--lock", type=Path, help="a file to lock during each run, so that studies take turns")
    parser.add_argument("--list", action="store_true", help="print the runs that are left, train nothing")
    return parser


def key(job: Job) -> tuple[Any, ...]:
    return tuple(job.get(name) for name in KEY)


def do(next_jobs: Callable[[list[dict[str, Any]]], Iterable[Job]], args: argparse.Namespace) -> None:
    """Run all jobs that `args.out` does not hold, in order; ask for the list again after each run.

    next_jobs: returns the jobs, given the finished runs, on which later jobs may depend.
    """
    held = RunFile(args.out)
    while True:
        done = held.read()
        finished = {key(run["job"]) for run in done}
        left = [job for job in next_jobs(done) if key(job) not in finished]
        if args.list:
            for job in left:
                print(json.dumps(job))
        if args.list or not left:
            return
        with turn(args.lock):
            result = run(left[0], args.data, args.work)
        held.append(result)
        print({**left[0], **{name: result[name] for name in ("accuracy", "params", "seconds")}}, flush=True)


@contextmanager
def turn(lock: Path | None) -> Iterator[None]:
    """Wait for the lock, and hold it in the block."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(job: Job, data: str, work: Path) -> dict[str, Any]:
    """Train once with one thread, or go on with the run of the same job, and return its line."""
    torch.set_num_threads(1)
    folder = work / "-".join(str(value) for value in key(job) if value is not None).replace(",", "_")
    arguments = [*job["arguments"], "--data", data, "--threads", "1", "--run-dir", str(folder)]
    if (folder / "config.json").exists():
        arguments.append("--resume")
    else:  # killed before it began
        shutil.rmtree(folder, ignore_errors=True)
    code = train(arguments)
    if code:
        raise SystemExit(f"rnn/train.py {' '.join(arguments)} ended with exit code {code}")
    summary = json.loads((folder / "summary.json").read_text())
    epochs = [record for record in read_metrics(folder) if record["kind"] == "epoch"]
    chosen = next(record for record in epochs if record["epoch"] == summary["chosen_epoch"])
    result = {"job": job, **{name: summary[name] for name in KEPT}, "validation_loss": chosen["loss"], **sizes(folder)}
    shutil.rmtree(folder)
    return result


def sizes(folder: Path) -> dict[str, int]:
    """Return the multiply-adds of the network's matrices per time step, and the bytes of its weights as int8 in C."""
    finished = open_run(folder)
    matrices = (parameter for parameter in finished.model.rnn.parameters() if parameter.dim() == 2)
    with tempfile.TemporaryDirectory() as place:
        exported = deploy.export_c(
            finished.model, Path(place) / "net", weights="int8", mean=finished.mean, std=finished.std
        )
    return {"multiply_adds": sum(matrix.numel() for matrix in matrices), "int8_weight_bytes": exported.weights}


def best_rate(done: list[dict[str, Any]], candidates: list[Job]) -> float:
    """Return the learning rate of the candidate that `at_its_rate` chooses, the first one's if none has run.

    candidates: jobs that differ in their rates alone. Their runs with other seeds count too.
    """

    def seedless(job: Job) -> Job:
        return {name: value for name, value in job.items() if name not in ("seed", "arguments")}

    tried = [seedless(job) for job in candidates]
    runs = [run for run in done if seedless(run["job"]) in tried]
    return (at_its_rate(runs)[0]["job"] if runs else candidates[0])["rate"]


@cache
def params_at(architecture: Architecture, **ranks: int) -> int:
    """Return the number of parameters of the compact network with these ranks."""
    return count_ranks(architecture.build(ranks=ranks)).params
