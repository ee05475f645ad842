"""The sections about studies of networks on photographs: CIFAR-10 and Caltech-101."""

from statistics import mean
from typing import Any

from benchmarks.runs import RunFile
from benchmarks.tables.documents import (
    NONE,
    Run,
    behind,
    counted,
    lines,
    markdown,
    paragraph,
    section,
    seeds,
    spread,
    table,
)
from benchmarks.timing import RESULTS

CALTECH = """The recipe `mobilenetv1-finetune` fine-tunes Google's MobileNetV1 for ImageNet on a public copy of
Caltech-101: 3,530 training and 1,763 test photographs of 101 classes at 128x128 pixels. **The data are a part of
Caltech-101**: at most 40 training and 20 test photographs a class, and no background class. So do not compare with
figures from elsewhere. A run has {epochs} epochs unless its name gives another number. "to dense" compares with the
dense network of {epochs} epochs. "teacher": the network also learned the scores of the dense network with the same seed
(`--teacher`), which has {epochs} epochs unless the row says otherwise. "straight-through": pruned weights are trained
for the whole run (`--gradient straight_through`), not for its first half. "MB": the packed file in float32, and in
brackets in float16. "ms": milliseconds of `compile_sparse` for one image, and in brackets how many times as fast that
is as the dense network in plain PyTorch. MB and ms{threads} are those of a network with random weights and as many
zeros in each layer as the run of the first seed has. "rate" is the learning rate. `python -m
benchmarks.studies.caltech` runs what is missing; with `--deploy` it measures MB and ms."""
CIFAR = """The recipe `cifar10` trains on a public copy of CIFAR-10 whose images were stored as JPEG of quality 75.
**That loses detail**: the published ResNet20 has 91.8 % on the original images and about 82 % on these, so compare only
the rows of this table. Each run has {epochs} epochs; the usual recipes have 200. "from dense": the run starts from the
trained dense network of the same seed, with half the learning rate. "teacher": the run also learns the scores of that
network. "str, lambda": the paper's method, whose weight decay decides on the sparsity. "budget of": every layer has the
sparsity that it has in that run. "weight decay": that in place of the recipe's 0.0005. "straight-through": pruned
weights are trained for the whole run (`--gradient straight_through`), not for its first half. "to dense" compares with
the dense network that was trained for the same number of epochs in all. The minutes are those of one thread on a
machine that did other work. `python -m benchmarks.studies.cifar` runs what is missing."""


def grouped(runs: list[Run], *names: str) -> list[tuple[tuple[Any, ...], list[Run]]]:
    """Return the runs grouped by the fields ``names``, which end with target and line. Targets in FLOPs come last."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run[name] for name in names), []).append(run)
    return sorted(groups.items(), key=lambda group: ["flops" in str(group[0][-2]), *group[0][:-1]])


def epochs_of(runs: list[Run]) -> str:
    """Return the numbers of epochs of the runs."""
    return " or ".join(map(str, sorted({run["epochs"] for run in runs})))


@table("cifar")
def cifar() -> str:
    """Return the section about CIFAR-10: accuracy and FLOPs at each sparsity, the dense network of each model first."""
    runs, rows = lines("cifar.jsonl"), []
    for (model, target, line), chosen in grouped(runs, "model", "target", "line"):
        peer = "dense, from dense" if "from dense" in line else "dense"
        dense = [run for run in runs if (run["model"], run["line"]) == (model, peer)]
        rows.append(
            [
                f"{model}, {line}",
                f"{100 * target:g}" if target else ("0" if line.startswith("dense") else "none"),
                f"{100 * mean(run['sparsity'] for run in chosen):.2f}",
                spread((run["accuracy"] for run in chosen), 100),
                "" if line.startswith("dense") else behind(chosen, dense),
                spread((run["flops"] for run in chosen), 100),
                seeds(len(chosen)),
                f"{mean(run['seconds'] for run in chosen) / 60:.0f}",
            ]
        )
    header = ["network, method", "target %", "sparsity %", "accuracy %", "to dense", "FLOPs, % of dense", "seeds"]
    return (
        section("### CIFAR-10 as JPEG", CIFAR.format(epochs=epochs_of(runs)), markdown([*header, "minutes"], rows))
        + cifar_tuning()
    )


def cifar_tuning() -> str:
    """Return the validation accuracy of the dense networks by learning rate, "" if there is none."""
    runs = sorted(RunFile(RESULTS / "cifar_tuning.jsonl").read(), key=lambda run: (run["model"], run["lr"]))
    rows = [[run["model"], f"{run['lr']:g}", f"{100 * run['accuracy']:.2f}"] for run in runs]
    return tuning(
        """Each network's learning rate was chosen for its dense form by two epochs on four fifths of the training
        images, with the last fifth as validation data, one seed. All methods take it, and half of it from the dense
        network on.""",
        ["network", "learning rate", "validation accuracy %"],
        rows,
    )


def tuning(text: str, header: list[str], rows: list[list[str]]) -> str:
    """Return a paragraph and a table about learning rates, to append to a section; "" if there are no rows."""
    return f"\n\n{paragraph(text)}\n\n{markdown(header, rows)}" if rows else ""


def deployed(runs: list[Run]) -> dict[tuple[str, str], Run]:
    """Return the measurements of size and speed by target and line, at the number of threads that most of them have."""
    threads = [run["threads"] for run in runs]
    most = max(sorted(set(threads)), key=threads.count, default=0)
    return {(run["target"], run["line"]): run for run in runs if run["threads"] == most}


@table("caltech")
def caltech() -> str:
    """Return the section about Caltech-101: accuracy, size and speed."""
    runs = lines("caltech.jsonl")
    uses, rows = deployed(RunFile(RESULTS / "caltech_deploy.jsonl").read()), []
    dense = [run for run in runs if run["line"] == "dense"]
    usual = [run for run in runs if "epochs" not in run["line"]]
    for (target, line), chosen in grouped(runs, "target", "line"):
        use = uses.get((target, line))
        rows.append(
            [
                f"{line}, target in FLOPs" if "flops" in target else line,
                f"{100 * mean(run['sparsity'] for run in chosen):.2f}",
                spread((run["accuracy"] for run in chosen), 100),
                "" if line == "dense" else behind(chosen, dense),
                f"{use['bytes'] / 1e6:.2f} ({use['bytes_float16'] / 1e6:.2f})" if use else NONE,
                f"{use['ms']:.2f} ({use['dense_ms'] / use['ms']:.2f}x)" if use else NONE,
                spread((run["flops"] for run in chosen), 100),
                " ".join(f"{rate:g}" for rate in sorted({run["lr"] for run in chosen})),
                seeds(len(chosen)),
            ]
        )
    use = next(iter(uses.values()), None)
    text = f" (on {counted(use['threads'])} of {use['machine']['processor']})" if use else ""
    header = ["method", "sparsity %", "accuracy %", "to dense", "MB", "ms", "FLOPs, % of dense", "rate", "seeds"]
    heading = "### Fine-tuning on Caltech-101: accuracy, MB, ms"
    return (
        section(heading, CALTECH.format(epochs=epochs_of(usual), threads=text), markdown(header, rows))
        + caltech_tuning()
    )


def caltech_tuning() -> str:
    """Return the accuracy of each learning rate on the held-out training images, "" if there is none."""
    rows = [
        [run["line"], f"{run['lr']:g}", f"{100 * run['accuracy']:.2f}", f"{100 * run['sparsity']:.0f}"]
        for run in sorted(RunFile(RESULTS / "caltech_tuning.jsonl").read(), key=lambda run: (run["line"], run["lr"]))
    ]
    return tuning(
        """Two epochs on four fifths of the training photographs, with the last fifth as validation data and one seed,
        compare learning rates:""",
        ["method", "learning rate", "validation accuracy %", "sparsity %"],
        rows,
    )
