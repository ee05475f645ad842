"""The methods of cnn/train.py on CIFAR-10: accuracy and FLOPs at equal sparsity.

    python -m benchmarks.studies.cifar --data hub:DIR [--models resnet20] [--runs 1] [--threads 2] [--list]
    python -m benchmarks.studies.cifar --data hub:DIR --tune

Runs the recipe `cifar10` of the training program for each missing line, the most informative lines first, and appends
its result to benchmarks/results/cifar.jsonl. A killed run is resumed from its checkpoint at the next start, because
the runs' folders are below runs/cifar and are deleted only after their lines are written. `--runs 1` ends after one
run, so that a shell can give the machine to other work between two runs.

All lines of a network share the number of epochs, the learning rate, the batches and their augmentation. Sparsity
counts all weights, including those of the first and the last layer. "from dense": the run starts from the trained dense
network of the same seed, with half the learning rate, so that it has seen twice as many epochs; compare it with "dense,
from dense". "teacher": the network also learns that dense network's scores (--teacher). Its run is kept below
runs/cifar.

`--tune` trains the dense network with several learning rates on four fifths of the training images and tests it on the
last fifth; the test images take no part. Its lines are in cifar_tuning.jsonl, and the runs take each network's best.

`str`, the paper's method, has no target. Its lines name lambda, the weight decay of the weights and thresholds, and the
table gives the sparsity that each one reached. "budget of": the run gets the sparsity of each layer from that run of
the same seed. "weight decay": that in place of the recipe's 0.0005. "straight-through": the gradient that trains
pruned weights too, for the whole run; the default has it for the first half.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path

from benchmarks.runs import Run, RunFile
from benchmarks.studies.cnn_runs import METHODS, THROUGHOUT, finished, without_test_images, write_budget
from benchmarks.timing import RESULTS, machine

RUNS = RunFile(RESULTS / "cifar.jsonl", ("model", "line", "target", "seed"))
TUNING = RunFile(RESULTS / "cifar_tuning.jsonl", ("model", "lr"))
FOLDERS = Path("runs/cifar")
EPOCHS = 5
LRS, TUNING_EPOCHS = (0.1, 0.2, 0.4, 0.05), 2
DENSE, FROM_DENSE, TEACHER, BUDGET = "dense", ", from dense", ", teacher", ", budget of "
STR = {f"str, lambda {value:g}": ["--method", "str", "--weight-decay", str(value)] for value in (1e-3, 2e-3, 4e-3)}
DECAY = ("--weight-decay", str(1e-3))  # twice the recipe's, and that of the first line of `STR`
LINES: dict[str, list[str]] = {
    **METHODS,
    f"{DENSE}{FROM_DENSE}": METHODS[DENSE],
    **{
        f"{line}{start}": METHODS[line]
        for line in ("str-exact", "gmp, global")
        for start in (TEACHER, FROM_DENSE, f"{FROM_DENSE}{TEACHER}")
    },
    **STR,
    **{f"{method}{BUDGET}{next(iter(STR))}": ["--method", method] for method in ("str-exact", "gmp")},
    **{f"{line}, weight decay {DECAY[1]}": [*METHODS[line], *DECAY] for line in ("str-exact", "gmp, global", DENSE)},
    f"{THROUGHOUT}{TEACHER}": METHODS[THROUGHOUT],
}
WITHOUT_TARGET = tuple(line for line in LINES if line.startswith((DENSE, "str, ")) or BUDGET in line)
LEADERS = tuple(METHODS)[:5]
TAUGHT = tuple(f"{line}{FROM_DENSE}{TEACHER}" for line in ("str-exact", "gmp, global"))


def wanted(model: str) -> Iterator[Run]:
    """Yield the runs of a network in their order: the leaders at 90 %, then the others, then other sparsities.

    The target of lines without one is 0. They come up again with each sparsity.
    """

    def at(target: float, lines: tuple[str, ...], seeds: tuple[int, ...]) -> Iterator[Run]:
        for seed, line in product(seeds, lines):
            own = 0.0 if line in WITHOUT_TARGET else target
            yield {"model": model, "line": line, "target": own, "seed": seed}

    yield from at(0.9, LEADERS[:3], (0,))
    yield from at(0.9, (*TAUGHT, f"{DENSE}{FROM_DENSE}", f"str-exact{TEACHER}"), (0,))
    yield from at(0.9, LEADERS, (0,))
    for seed in (1, 2):  # a dense run of this seed is the teacher of the lines that follow it
        yield from at(0.9, (*LEADERS[:3], f"str-exact{TEACHER}", f"gmp, global{TEACHER}"), (seed,))
    yield from at(0.9, tuple(LINES), (0,))
    yield from at(0.9, (*LEADERS, THROUGHOUT, "dnw, ERK"), (1, 2))
    for target in (0.95, 0.98, 0.8):
        yield from at(target, tuple(LINES), (0,))
    for target in (0.95, 0.98, 0.8):
        yield from at(target, LEADERS, (1, 2))


def train_line(key: Run, data: str, threads: int) -> None:
    """Train one line and append its result; before it the dense network that it needs, if its run is not here."""
    line, dense = key["line"], {**key, "line": DENSE, "target": 0.0}
    shared = ["cifar10", "--data", data, "--threads", str(threads)]
    if FROM_DENSE in line or TEACHER in line:
        finished(_folder(dense), [*shared, *options_of(dense)])
    folder = _folder(key)
    result = finished(folder, [*shared, *options_of(key)])
    RUNS.append({**key, **result, "lr": _rate(key), "threads": threads, "machine": machine()})
    if line != DENSE:
        shutil.rmtree(folder)


def options_of(key: Run) -> list[str]:
    """Return the training program's options for a line, except for the recipe, the data and the threads."""
    line, dense = key["line"], str(_folder({**key, "line": DENSE, "target": 0.0}))
    options = ["--model", key["model"], "--seed", str(key["seed"]), "--epochs", str(EPOCHS)]
    options += ["--warmup-epochs", "1", "--lr", str(_rate(key)), *LINES[line]]
    if FROM_DENSE in line:
        options += ["--pretrained", dense]
    if TEACHER in line:
        options += ["--teacher", dense]
    if BUDGET in line:
        source = {**key, "line": line.partition(BUDGET)[2]}
        budget = FOLDERS / f"budget-{_folder(source).name}.json"
        write_budget(budget, RUNS.read(), source)
        options += ["--budget", str(budget)]
    if key["target"]:
        options += ["--target-sparsity", str(key["target"])]
    return options


def _rate(key: Run) -> float:
    """Return the network's learning rate with the highest accuracy on held-out images; half of it from dense on."""
    tuned = max((run for run in TUNING.read() if run["model"] == key["model"]), key=lambda run: run["accuracy"])["lr"]
    return tuned / 2 if FROM_DENSE in key["line"] else tuned


def _folder(key: Run) -> Path:
    name = key["line"].replace(", ", "-").replace(" ", "-")
    return FOLDERS / f"{key['model']}-{name}-{key['target']:g}-{key['seed']}"


def tune(models: list[str], data: str, threads: int) -> None:
    """Train the dense networks with each learning rate, without the test images."""
    with without_test_images(data) as held_out, tempfile.TemporaryDirectory() as folder:
        for key in TUNING.missing({"model": model, "lr": lr} for model, lr in product(models, LRS)):
            model, lr = key["model"], key["lr"]
            options = ["cifar10", "--data", held_out, "--model", model, "--method", "dense", "--lr", str(lr)]
            options += ["--epochs", str(TUNING_EPOCHS), "--warmup-epochs", "0.4", "--threads", str(threads)]
            result = finished(Path(folder) / f"{model}-{lr}", options)
            TUNING.append({**key, **result, "threads": threads, "machine": machine()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="hub:DIR or hub:NAME, as for cnn/train.py")
    parser.add_argument("--models", nargs="*", default=["resnet20"], choices=["resnet20", "resnet-medium"])
    parser.add_argument("--runs", type=int, help="end after so many runs; all by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tune", action="store_true", help="choose the learning rate on held-out training images")
    parser.add_argument("--list", action="store_true", help="print the missing runs in their order, run nothing")
    options = parser.parse_args()
    if options.tune:
        tune(options.models, options.data, options.threads)
        return
    keys = RUNS.missing(key for model in options.models for key in wanted(model))
    for key in islice(keys, options.runs):
        print(*key.values())
        if not options.list:
            train_line(key, options.data, options.threads)


if __name__ == "__main__":
    main()
