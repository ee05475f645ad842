"""The sections about studies of ranks on real data: HAR-2, HAR-6 and speech."""

from statistics import mean

from benchmarks.runs import at_its_rate
from benchmarks.tables.documents import NONE, NotMeasured, Run, behind, lines, markdown, section, seeds, spread, table

# The paper's accuracies at (rank of W, rank of U): Kusupati et al., ICML 2020, table 3.
PAPER = {
    ("dense", None): "96.10",
    ("str-exact", "9,8"): "95.76 (STR)", ("fixed", "9,8"): "94.06",
    ("str-exact", "9,7"): "95.62 (STR)", ("fixed", "9,7"): "93.15",
    ("str-exact", "8,7"): "95.59 (STR)", ("fixed", "8,7"): "94.88",
}  # fmt: skip
SIZES = ("multiply_adds", "int8_weight_bytes")
HAR_DATA = """**The data are a reconstruction** of UCI HAR, made from the raw recordings by the published recipe: 7,415
training and 2,996 test windows (published: 7,352 and 2,947). The epoch and the learning rate ("rate": the best of how
many) are chosen on validation people who are not among the training people."""
HAR_TWO = f"""The recipe `har2-fastgrnn` trains a FastGRNN of 80 units on motion data in two classes, for the paper's
300 epochs and for fewer. {HAR_DATA} Runs of 300 epochs, and runs whose gradients are clipped to the norm 1, take the
rates that were chosen at 60 epochs without clipping. So the paper's figures are a guide, not a comparison. "size of
(9,8)": the network has as many parameters as with rank 9 for the input matrix and rank 8 for the recurrent matrix.
str-exact divides these parameters between the matrices as it learns; fixed and svd-finetune have exactly these ranks.
FastGRNN's own tuned low rank has 96.81 in the paper. `python -m benchmarks.studies.har_ranks --data har:PATH` runs what
is missing."""
HAR_SIX = f"""The recipe `har6-gru` trains networks of 48 units on the six activities, at a third of the dense network's
parameters. {HAR_DATA} `python -m benchmarks.studies.har_ranks --data har:PATH --classes 6` runs what is missing."""
SPEECH = """The recipe `speech5-gru` trains recurrent layers of 96 units on seven classes of Speech Commands: five
words, silence and unknown. There are 3,246 training, 383 validation and 2,474 test clips, and no speaker is in two of
these parts. **This is a part of the published data set**, whose task has ten words. "compression": the number of
parameters of the dense network, divided by that of the run. "multiply-adds": those of the matrices in a time step.
"int8 bytes": the weights in the int8 C export. "rate": the learning rate, and the number of rates from which it was
chosen. Epoch and learning rate are chosen on validation data, the rate with the first seed; where two rates are equal
there, all their seeds decide. `python -m benchmarks.studies.speech_ranks --data hub:DIR` runs what is missing."""


def rates_tried(chosen: list[Run], runs: list[Run]) -> str:
    """Return the learning rate of a row and the number of rates that its method tried among ``runs``, at any size."""
    job = chosen[0]["job"]
    count = len({run["job"]["rate"] for run in runs if run["job"]["method"] == job["method"]})
    return f"{job['rate']:g} of {count}"


def accuracies(method: str, chosen: list[Run], runs: list[Run]) -> list[str]:
    """Return a method's accuracy, its points to the dense networks among ``runs``, and its validation accuracy."""
    dense = [run for run in runs if run["job"]["method"] == "dense"]
    return [
        spread((run["accuracy"] for run in chosen), 100),
        "" if method == "dense" else behind(chosen, at_its_rate(dense) if dense else []),
        spread((run["validation_accuracy"] for run in chosen), 100),
    ]


def variant(run: Run) -> tuple[int, float]:
    """Return the number of epochs, and the norm to which gradients were clipped, 0 for none."""
    return run["job"]["epochs"], run["job"].get("max_norm", 0.0)


def studies(name: str, data: str) -> list[list[Run]]:
    """Return the runs of ``data`` in a result file by their variant, that of most runs first.

    Raise NotMeasured if there are none.
    """
    found: dict[tuple[int, float], list[Run]] = {}
    for run in lines(name):
        if run["job"]["data"] == data:
            found.setdefault(variant(run), []).append(run)
    if not found:
        raise NotMeasured(data)
    first = max(sorted(found), key=lambda of: len(found[of]))
    return [found.pop(first), *(found[of] for of in sorted(found))]


def main_study(name: str, data: str) -> list[Run]:
    """Return the runs of ``data`` in a result file that share the variant of most of them."""
    return studies(name, data)[0]


@table("har-ranks")
def har_ranks() -> str:
    """Return the section about HAR-2: for each variant a table of accuracies by method and ranks."""
    main, *others = studies("har_ranks.jsonl", "har2")
    tables = [har_table(main, complete=True), *(har_table(other, complete=False) for other in others)]
    return section("### Motion data: the paper's HAR-2", HAR_TWO, "\n\n".join(tables))


def har_table(runs: list[Run], complete: bool) -> str:
    """Return the table of the runs of one variant, if complete with rows for what the paper has and they lack."""
    groups = [("dense", None), ("str", None)]
    groups += [(method, pair) for pair in ("9,8", "9,7", "8,7") for method in ("str-exact", "fixed", "svd-finetune")]
    rows = []
    for method, pair in groups:
        own = [run for run in runs if (run["job"]["method"], run["job"]["ranks"]) == (method, pair)]
        name = method if pair is None else f"{method}, size of ({pair})"
        paper = PAPER.get((method, pair), "none")
        if not own and complete and (method, pair) in PAPER:
            rows.append([name, *[NONE] * 6, "0", paper])
        if not own:
            continue
        chosen = at_its_rate(own)
        learned = sorted({f"({','.join(str(rank) for rank in run['ranks'].values())})" for run in chosen})
        rows.append(
            [
                name,
                "full" if method == "dense" else " ".join(learned),
                f"{mean(run['params'] for run in chosen):,.0f}",
                *accuracies(method, chosen, runs),
                rates_tried(chosen, runs) if complete else f"{chosen[0]['job']['rate']:g}",
                seeds(len(chosen)),
                paper,
            ]
        )
    header = ["ranks", "parameters", "accuracy %", "to dense", "validation %", "rate", "seeds", "paper, 300 epochs, %"]
    epochs, max_norm = variant(runs[0])
    return markdown([f"method; {epochs} epochs{', gradients clipped' * (max_norm > 0)}", *header], rows)


@table("har-six")
def har_six() -> str:
    """Return the section about HAR-6: accuracies by cell and method."""
    return section("### Motion data: HAR-6", HAR_SIX, by_cell(main_study("har_ranks.jsonl", "har6"), ("gru", "lstm")))


@table("speech-ranks")
def speech_ranks() -> str:
    """Return the section about speech: accuracies by cell, compression and method, with size and work."""
    runs = main_study("speech_ranks.jsonl", "speech5")
    return section("### Speech", SPEECH, by_cell(runs, ("gru", "lstm", "fastgrnn")))


def by_cell(runs: list[Run], cells: tuple[str, ...]) -> str:
    """Return a table of accuracies by cell, compression and method, with parameters, multiply-adds and bytes in C."""
    rows = []
    for cell in cells:
        of_cell = [run for run in runs if run["job"]["cell"] == cell]
        if not of_cell:
            rows.append([cell, *[NONE] * 8, "0"])
        keys = sorted({(run["job"]["compression"] or 1, run["job"]["method"]) for run in of_cell})
        for compression, method in keys:
            own = [r for r in of_cell if (r["job"]["compression"] or 1, r["job"]["method"]) == (compression, method)]
            chosen = at_its_rate(own)
            rows.append(
                [
                    f"{cell}, {method}",
                    f"{compression:g}",
                    *accuracies(method, chosen, of_cell),
                    *(f"{mean(run[key] for run in chosen):,.0f}" for key in ("params", *SIZES)),
                    rates_tried(chosen, of_cell),
                    seeds(len(chosen)),
                ]
            )
    header = ["compression", "accuracy %", "to dense", "validation %", "parameters", "multiply-adds", "int8 bytes"]
    return markdown([f"cell, method; {runs[0]['job']['epochs']} epochs", *header, "rate", "seeds"], rows)
