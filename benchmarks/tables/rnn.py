"""Tables of the recurrent networks: the demo and the study of learned ranks."""

from statistics import mean

from benchmarks.tables.documents import LEARNED_RANK, NONE, lines, markdown, results, spread, table


@table("rank-demo")
def rank_demo() -> str:
    """Return the results of the low-rank demo by seed, and of the dense network of the same recipe."""
    dense = {run["seed"]: run["accuracy"] for run in results("rank-demo-dense-seed-*.json")}
    rows = [
        [
            str(run["seed"]),
            f"{100 * run['accuracy']:.2f}",
            f"{100 * dense[run['seed']]:.2f}",
            ", ".join(str(rank) for name, rank in run["ranks"].items() if "hh" in name),
            str(sum(run["ranks"].values())),
            f"{run['params']:,} of {run['dense_params']:,}",
            f"{run['seconds']:.0f}",
        ]
        for run in results("rank-demo-seed-*.json")
    ]
    header = ["seed", "accuracy %", "dense %", "recurrent ranks", "all ranks", "parameters", "seconds"]
    return markdown(header, rows)


@table("learned-rank", LEARNED_RANK)
@table("learned-rank")
def learned_rank() -> str:
    """Return the results of methods at equal parameters, by data set and compression, and of the dense network."""
    runs = lines("learned_rank.jsonl")
    rows = []
    for data in dict.fromkeys(run["data"] for run in runs):
        text = data == "text"
        key, scale, digits = ("bits_per_character", 1, 3) if text else ("accuracy", 100, 2)
        own = [run for run in runs if run["data"] == data]
        dense = mean(run[key] for run in own if run["method"] == "dense") * scale
        order = sorted({(run["compression"] or 0, run["method"]): None for run in own}, key=lambda pair: pair[0])
        for compression, method in order:
            chosen = [run for run in own if (run["compression"] or 0, run["method"]) == (compression, method)]
            figures = [run[key] for run in chosen]
            behind = f"{mean(figures) * scale - dense:+.{digits}f}" if compression else ""
            params = f"{mean(run['params'] for run in chosen):,.0f}"
            name = f"{data}, {method}" + (", bits per character" if text else "")
            size = f"{compression:g}" if compression else "1"
            rows.append([name, size, params, spread(figures, scale, digits), behind, str(len(chosen))])
    return markdown(["data, method", "compression", "parameters", "accuracy %", "to dense", "seeds"], rows)


@table("learned-rank-screen", LEARNED_RANK)
def learned_rank_screen() -> str:
    """Return accuracy and loss of every variant at both total ranks, on held-out training utterances."""
    runs = lines("learned_rank_screen.jsonl")
    ranks = sorted({run["total_rank"] for run in runs})
    rows = []
    for variant in dict.fromkeys(run["variant"] for run in runs):
        cells = []
        for rank in ranks:
            chosen = [run for run in runs if (run["variant"], run["total_rank"]) == (variant, rank)]
            accuracy, loss = spread((run["accuracy"] for run in chosen), 100, 1), mean(run["loss"] for run in chosen)
            cells += [accuracy, f"{loss:.3f}", f"{mean(run['params'] for run in chosen):,.0f}"]
        rows.append([variant, *cells])
    header = [f"{rank}: {name}" for rank in ranks for name in ("accuracy %", "loss", "parameters")]
    return markdown(["variant; total rank", *header], rows)


@table("learned-rank-tuning", LEARNED_RANK)
def learned_rank_tuning() -> str:
    """Return the validation loss of every method at every learning rate, on each data set that was tuned."""
    runs = lines("learned_rank_tuning.jsonl")
    rates = sorted({run["rate"] for run in runs})
    losses: dict[tuple[str, str], dict[float, list[float]]] = {}
    for run in runs:
        losses.setdefault((run["data"], run["method"]), {}).setdefault(run["rate"], []).append(run["validation_loss"])
    rows = [
        [f"{data}, {method}", *(spread(found[rate], digits=3) if rate in found else NONE for rate in rates)]
        for (data, method), found in losses.items()
    ]
    return markdown(["data, method; rate", *(f"x {rate:g}" for rate in rates)], rows)


@table("rank-schedules", LEARNED_RANK)
def rank_schedules() -> str:
    """Return the validation loss on text and the ranks of the first seed, by schedule and distribution."""
    runs = lines("rank_schedules.jsonl")
    rows = []
    for schedule, begin, end in dict.fromkeys((run["schedule"], run["begin"], run["end"]) for run in runs):
        cells = []
        for distribution in ("relative", "fixed"):
            key = (schedule, begin, end, distribution)
            own = [r for r in runs if (r["schedule"], r["begin"], r["end"], r["distribution"]) == key]
            ranks = ", ".join(str(rank) for rank in own[0]["ranks"].values()) if own else NONE
            cells += [spread((run["validation_loss"] for run in own), digits=3) if own else NONE, ranks]
        name = f"at once at {end:g}" if schedule == "constant" else f"{schedule}, {begin:g} to {end:g}"
        rows.append([name, *cells])
    return markdown(["ranks fall", "relative: loss", "relative: ranks", "fixed: loss", "fixed: ranks"], rows)
