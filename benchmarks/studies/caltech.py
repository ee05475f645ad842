"""Fine-tuning of MobileNetV1 on Caltech-101: accuracy, size and speed at equal sparsity and at a third of the FLOPs.

    python -m benchmarks.studies.caltech --data hub:DIR --pretrained FILE [--runs 1] [--threads 2] [--list]
    python -m benchmarks.studies.caltech --data hub:DIR --pretrained FILE --tune [--runs 1]
    python -m benchmarks.studies.caltech --deploy

The first command trains each missing line with the recipe `mobilenetv1-finetune`, the most informative lines first, and
appends its result to benchmarks/results/caltech.jsonl. A killed run is resumed from its checkpoint at the next start.
`--runs 1` ends after one run, so that a shell can give the machine to other work between two runs.

All lines share the batches and their augmentation, and the number of epochs where their names give none. Each has the
learning rate that was best for it, or for str-exact or global GMP, to which it is akin, in `--tune`. Sparsity counts
all weights, including those of the first and the last layer. "straight-through": pruned weights are trained for the
whole run, not for its first half. "budget of str-exact" gives another method the layers' sparsities of str-exact with
the same target and seed. A target that ends in "flops" is a share of the dense network's multiply-adds. "teacher": the
network also learns the scores of the dense network with the same seed (--teacher). That network has 8 epochs; of the
line "teacher of 16 epochs" it has 16.

`--tune` compares learning rates on a fifth of the training images, which it holds out. The test images take no part.
Its lines are in caltech_tuning.jsonl. `--deploy` packs and compiles, for each run of the first seed, a network with
random weights and with zeros in random places, as many in each layer as the run has, and times it beside the dense
network: caltech_deploy.jsonl. Size and time depend on the zeros only, not on the other values.
"""

import argparse
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.runs import RunFile
from benchmarks.speed.sparse_inference import with_random_zeros
from benchmarks.studies.cnn_runs import METHODS, THROUGHOUT, finished, without_test_images, write_budget
from benchmarks.timing import RESULTS, alternating, machine
from str_triton import deploy
from str_triton.cnn.models import build

RUNS, SIZE, CLASSES = Path("runs/caltech"), 128, 101
EPOCHS = 8
TUNING_EPOCHS, LRS, TUNED = 2, (0.02, 0.01, 0.05, 0.005), ("str-exact", "gmp, global", "dense")
ROUNDS = 100
DENSE = "dense"
BUDGET = "budget of str-exact"
TEACHER, LONGER_TEACHER = ", teacher", ", teacher of 16 epochs"
LINES: dict[str, list[str]] = {
    **METHODS,
    "gmp, uniform": ["--method", "gmp", "--distribution", "uniform"],
    f"gmp, {BUDGET}": ["--method", "gmp"],
    **{f"{line}{TEACHER}": METHODS[line] for line in ("str-exact", "gmp, global")},
    **{
        f"{line}, 16 epochs": [*METHODS[line.partition(TEACHER)[0]], "--epochs", "16"]
        for line in ("dense", "str-exact", f"str-exact{TEACHER}", f"str-exact{LONGER_TEACHER}")
    },
}
LONGER = "dense, 16 epochs"
TAUGHT = ("str-exact, teacher", "str-exact, teacher, 16 epochs", f"str-exact{LONGER_TEACHER}, 16 epochs")
LEADERS = ("str-exact", "gmp, global", "str-exact, FLOP-aware")
THIRD = "0.3333 flops"


class Key(NamedTuple):
    """A run: the line, its target ("0.9", "0.3333 flops"; "" of the dense network), and the seed."""

    line: str
    target: str
    seed: int


def wanted() -> Iterator[Key]:
    """Yield the runs in their order: the leaders at 90 %, a third of the FLOPs, then the rest. Some occur twice."""
    yield Key(DENSE, "", 0)
    yield from (Key(line, "0.9", 0) for line in LEADERS[:2])
    yield from (Key(line, "0.9", 0) for line in TAUGHT)
    yield Key(LONGER, "", 0)
    yield Key("gmp, global, teacher", "0.9", 0)
    yield Key("str-exact, FLOP-aware", THIRD, 0)
    yield from (Key(line, target, 0) for target in ("0.95", "0.75") for line in LEADERS[:2])
    for line in ("str-exact", f"gmp, {BUDGET}"):
        yield Key(line, THIRD, 0)
    for seed in (1, 2):
        yield Key(DENSE, "", seed)
        yield from (Key(line, "0.9", seed) for line in (*LEADERS[:2], THROUGHOUT))
        yield Key(LONGER, "", seed)
        yield from (Key(line, "0.9", seed) for line in TAUGHT)
    yield from (Key(line, "0.9", 0) for line in LINES if not line.startswith(DENSE))
    yield Key(THROUGHOUT, "0.95", 0)
    for target, seed in product(("0.95", "0.75"), (1, 2)):
        yield from (Key(line, target, seed) for line in LEADERS)
    for seed in (1, 2):
        yield from (Key(line, THIRD, seed) for line in ("str-exact, FLOP-aware", "str-exact", f"gmp, {BUDGET}"))


def results() -> RunFile:
    return RunFile(RESULTS / "caltech.jsonl", Key._fields)


def tuning() -> RunFile:
    return RunFile(RESULTS / "caltech_tuning.jsonl", ("line", "lr"))


def best_rate(line: str) -> float:
    """Return the learning rate with the highest accuracy on held-out images, of the tuned line nearest to this one."""
    tuned = next((name for name in ("dense", "str-exact") if line.startswith(name)), "gmp, global")
    return max((run for run in tuning().read() if run["line"] == tuned), key=lambda run: run["accuracy"])["lr"]


def options_of(key: Key) -> list[str]:
    """Return the training program's options for a line. Raise ValueError if it needs a budget that is missing."""
    options = list(LINES[key.line])
    if TEACHER in key.line:
        options += ["--teacher", str(RUNS / _name(_teacher(key)))]
    if not key.target:
        return options
    if key.line.endswith(BUDGET):
        source = Key("str-exact", key.target, key.seed)
        budget = RUNS / f"budget-{_name(source)}.json"
        write_budget(budget, results().read(), source._asdict())
        return [*options, "--budget", str(budget)]
    share, _, flops = key.target.partition(" ")
    return [*options, "--target-flops" if flops else "--target-sparsity", share]


def _teacher(key: Key) -> Key:
    return Key(LONGER if LONGER_TEACHER in key.line else DENSE, "", key.seed)


def _name(key: Key) -> str:
    return "-".join(str(part) for part in key if part != "").replace(", ", "-").replace(" ", "-")


def arguments(key: Key, data: str, pretrained: str, threads: int) -> list[str]:
    """Return the training program's arguments for a line, except for the run's folder."""
    shared = ["--data", data, "--pretrained", pretrained, "--seed", str(key.seed), "--threads", str(threads)]
    shared += ["--epochs", str(EPOCHS), "--lr", str(best_rate(key.line))]
    return ["mobilenetv1-finetune", *shared, *options_of(key)]


def train(key: Key, data: str, pretrained: str, threads: int) -> None:
    """Train one line and append its result; before it the teacher, if its run is not here. Keep the networks."""

    def trained(line: Key) -> dict[str, Any]:
        return finished(RUNS / _name(line), arguments(line, data, pretrained, threads))

    if TEACHER in key.line:
        trained(_teacher(key))
    result = {**key._asdict(), **trained(key), "lr": best_rate(key.line), "threads": threads}
    results().append({**result, "machine": machine()})


def tune(data: str, pretrained: str, threads: int, runs: int | None) -> None:
    """Train with each learning rate, without the test images."""
    file = tuning()
    with without_test_images(data) as held_out, tempfile.TemporaryDirectory() as folder:
        shared = ["mobilenetv1-finetune", "--data", held_out, "--pretrained", pretrained]
        shared += ["--epochs", str(TUNING_EPOCHS), "--threads", str(threads)]
        keys = [{"line": line, "lr": lr} for line in TUNED for lr in LRS]
        for key in list(file.missing(keys))[:runs]:
            target = [] if key["line"] == DENSE else ["--target-sparsity", "0.9"]
            options = [*shared, "--lr", str(key["lr"]), *LINES[key["line"]], *target]
            result = finished(Path(folder) / f"{key['line']}-{key['lr']}", options)
            file.append({**key, **result, "threads": threads, "machine": machine()})


def deploy_all(threads: int) -> None:
    """Pack, compile and time a network with the layers' sparsities of each run of the first seed; append the lines."""
    torch.set_num_threads(threads)
    file = RunFile(RESULTS / "caltech_deploy.jsonl", ("line", "target", "threads"))
    image = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    dense = network({}, image).to(memory_format=torch.channels_last)
    runs = [{**run, "threads": threads} for run in results().read() if run["seed"] == 0]
    for run in file.missing(runs):
        own = {name: run[name] for name in file.key}
        file.append({**own, **measured(network(run["density"], image), dense, image), "machine": machine()})


def network(density: dict[str, float], image: torch.Tensor) -> torch.nn.Module:
    """Return the study's network with random weights, of which each named layer keeps a share."""
    torch.manual_seed(0)
    model = build("tf_mobilenetv1", num_classes=CLASSES)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, std=0.1)  # zeros would be packed as such
    return with_random_zeros(model, {layer: 1 - share for layer, share in density.items()}, image)


def measured(model: torch.nn.Module, dense: torch.nn.Module, image: torch.Tensor) -> dict[str, Any]:
    """Return a network's bytes packed, and the milliseconds of an image compiled and of the dense network."""
    with tempfile.TemporaryDirectory() as folder:
        deploy.pack(model, Path(folder) / "packed.safetensors", plain_zeros=True)
        size = (Path(folder) / "packed.safetensors").stat().st_size
        deploy.pack(model, Path(folder) / "half.safetensors", "float16", plain_zeros=True)
        half = (Path(folder) / "half.safetensors").stat().st_size
    compiled, nhwc = deploy.compile_sparse(model, image), image.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        seconds = alternating({"compiled": lambda: compiled(image), "dense": lambda: dense(nhwc)}, ROUNDS)
    ms = {name: 1000 * median(times) for name, times in seconds.items()}
    return {"bytes": size, "bytes_float16": half, "ms": ms["compiled"], "dense_ms": ms["dense"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="hub:DIR, as for cnn/train.py")
    parser.add_argument("--pretrained", help="the weights of tf_mobilenetv1 for ImageNet")
    parser.add_argument("--runs", type=int, help="end after so many runs; all by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tune", action="store_true", help="compare learning rates on held-out training images")
    parser.add_argument("--deploy", action="store_true", help="pack, compile and time the trained networks")
    parser.add_argument("--list", action="store_true", help="print the missing runs in their order, run nothing")
    options = parser.parse_args()
    if options.deploy:
        return deploy_all(options.threads)
    keys = [Key(**run) for run in results().missing(key._asdict() for key in wanted())][: options.runs]
    if options.list:
        print(*map(_name, keys), sep="\n")
        return None
    if options.data is None or options.pretrained is None:
        parser.error("training needs --data and --pretrained")
    if options.tune:
        return tune(options.data, options.pretrained, options.threads, options.runs)
    for key in keys:
        print(*key)
        train(key, options.data, options.pretrained, options.threads)
    return None


if __name__ == "__main__":
    main()
