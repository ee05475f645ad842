"""Learned rank on real speech beside fixed rank, SVD with fine-tuning, smaller dense networks and the whole dense one.

    python -m benchmarks.studies.speech_ranks --data hub:DIR [--cells gru lstm fastgrnn] [--epochs 30]

DIR: five words of Speech Commands and other words, in the hub's format; no speaker is in two parts. Every run is the
recipe speech5-gru with one thread; only the cell, the method, the size, the epochs and the learning rate differ.
Compression is the dense network's number of parameters over that of the run. With seed 0 and the first compression
every method tries the rates of `RATES`; the rate with the highest validation accuracy is the method's rate for all
other seeds and compressions of the cell. The test data choose nothing.

One line per run is appended to benchmarks/results/speech_ranks.jsonl, and runs that are in it are skipped. A run that
was killed goes on from its last checkpoint.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.studies.rank_runs import Job, best_rate, do, params_at, parser
from benchmarks.timing import RESULTS
from str_triton.rnn.models import CELLS, Architecture

METHODS = ("dense", "str-exact", "fixed", "svd-finetune", "small dense")
LEADERS = METHODS[:3]
COMPRESSIONS = (3.0, 6.0, 2.0)
RATES = (1e-2, 5e-3, 2e-2)  # the recipe's first
SEEDS = (0, 1, 2)
HIDDEN = 96
WHOLE = Architecture("classify", "gru", inputs=32, outputs=7, hidden_size=HIDDEN)


def job(cell: str, method: str, compression: float, seed: int, rate: float, epochs: int) -> Job:
    """Return the run of a method; the whole dense network has no compression."""
    hidden = small_hidden_size(cell, compression) if method == "small dense" else HIDDEN
    trained = "dense" if method == "small dense" else method
    arguments = ["speech5-gru", "--cell", cell, "--method", trained, "--hidden-size", str(hidden)]
    arguments += ["--seed", str(seed), "--lr", str(rate), "--epochs", str(epochs)]
    if "dense" not in method:
        arguments += ["--target-compression", str(compression)]
    return {
        "data": "speech5", "cell": cell, "method": method, "compression": None if method == "dense" else compression,
        "hidden_size": hidden, "epochs": epochs, "rate": rate, "seed": seed, "arguments": arguments,
    }  # fmt: skip


def small_hidden_size(cell: str, compression: float) -> int:
    """Return the units of the largest dense network with at most the whole one's parameters over `compression`."""
    whole = replace(WHOLE, cell=cell)
    limit, hidden = params_at(whole) / compression, 1
    while params_at(replace(whole, hidden_size=hidden + 1)) <= limit:
        hidden += 1
    return hidden


def jobs(done: list[dict[str, Any]], cells: list[str], epochs: int) -> Iterator[Job]:
    """Yield all runs, the most informative first: all leaders, the other methods, rates and seeds, compressions."""
    for cell in cells:
        for seed in SEEDS:
            for method in LEADERS:
                yield job(cell, method, COMPRESSIONS[0], seed, RATES[0], epochs)
    for rate in RATES:
        for cell in cells:
            for method in METHODS:
                yield job(cell, method, COMPRESSIONS[0], SEEDS[0], rate, epochs)
    for compression in COMPRESSIONS:
        for cell in cells:
            for seed in SEEDS:
                for method in METHODS:  # dense has no compression: its runs are done by then
                    yield job(cell, method, compression, seed, tuned(cell, method, done, epochs), epochs)


def tuned(cell: str, method: str, done: list[dict[str, Any]], epochs: int) -> float:
    """Return the method's rate, from its runs with seed 0 and the first compression."""
    return best_rate(done, [job(cell, method, COMPRESSIONS[0], SEEDS[0], rate, epochs) for rate in RATES])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    options.add_argument("--epochs", type=int, default=30)
    args = options.parse_args()
    args.out = args.out or RESULTS / "speech_ranks.jsonl"
    do(lambda done: jobs(done, args.cells, args.epochs), args)


if __name__ == "__main__":
    main()
