"""Learned rank on HAR-2 beside fixed rank, SVD with fine-tuning and the dense network: the paper's table 3. And HAR-6.

    python -m benchmarks.studies.har_ranks --data har:PATH [--epochs 300] [--max-norm 1]
    python -m benchmarks.studies.har_ranks --data har:PATH --classes 6 [--cells gru lstm] [--epochs 30]

PATH: UCI HAR as rnn/train.py takes it. Every run is the recipe har2-fastgrnn with one thread; only the number of epochs
(the paper: 300), the method and the learning rate differ. The epoch is chosen on the validation people, who are not
among the training people. The target of str-exact is the number of parameters of the fixed ranks; str has no target.
With seed 0 and the first pair of ranks every method tries the rates of `RATES`; the rate with the highest validation
accuracy is the method's rate for all other seeds and ranks. The test data choose nothing. With another number of epochs
than 60, or with clipped gradients (--max-norm), every method takes the rate that was chosen at 60 epochs without.

With `--classes 6` the runs are the recipe har6-gru with each cell, at a third of the dense network's parameters.

One line per run is appended to benchmarks/results/har_ranks.jsonl, and runs that are in it are skipped. A run that was
killed goes on from its last checkpoint.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.studies.rank_runs import Job, best_rate, do, params_at, parser
from benchmarks.timing import RESULTS
from str_triton.rnn.models import Architecture

RANKS = ((9, 8), (9, 7), (8, 7))  # of the input matrix and of the recurrent matrix, in the paper
METHODS = ("str-exact", "fixed", "dense", "svd-finetune", "str")
METHODS_OF_SIX = METHODS[:4]
LEADERS = METHODS[:3]
RATES = (1e-2, 3e-3, 2e-2)  # the recipe's first
SEEDS = (0, 1, 2)
CELLS = ("gru", "lstm")  # of HAR-6
COMPRESSION = 3.0  # of HAR-6
EPOCHS = {2: 60, 6: 30}  # by the number of classes
ARCHITECTURE = Architecture("classify", "fastgrnn", inputs=9, outputs=2, hidden_size=80)


def job(method: str, ranks: tuple[int, int], seed: int, rate: float, epochs: int, max_norm: float = 0.0) -> Job:
    """Return the run of a method; dense and str do not depend on the ranks. Gradients are clipped to `max_norm` > 0."""
    arguments = ["har2-fastgrnn", "--method", method, "--seed", str(seed), "--lr", str(rate), "--epochs", str(epochs)]
    pair = None if method in ("dense", "str") else ",".join(map(str, ranks))
    if method == "str-exact":
        params = params_at(ARCHITECTURE, weight_ih_l0=ranks[0], weight_hh_l0=ranks[1])
        arguments += ["--target-params", str(params)]
    elif pair:
        arguments += ["--ranks", pair]
    clipped = {"max_norm": max_norm} if max_norm else {}
    if clipped:
        arguments += ["--max-norm", str(max_norm)]
    return {
        "data": "har2", "method": method, "ranks": pair, "epochs": epochs, "rate": rate, "seed": seed,
        **clipped, "arguments": arguments,
    }  # fmt: skip


def jobs(done: list[dict[str, Any]], epochs: int, max_norm: float = 0.0) -> Iterator[Job]:
    """Yield all runs, the most informative first: all methods and rates, the leaders' seeds, other ranks, all seeds."""
    first, *others = RANKS
    if epochs == EPOCHS[2] and not max_norm:
        for rate in RATES:
            for method in METHODS:
                yield job(method, first, SEEDS[0], rate, epochs)

    def runs(methods: tuple[str, ...], ranks: tuple[int, int], seeds: tuple[int, ...]) -> Iterator[Job]:
        return (job(method, ranks, seed, tuned(method, done), epochs, max_norm) for seed in seeds for method in methods)

    yield from runs(LEADERS, first, SEEDS)
    for ranks in others:
        yield from runs(LEADERS, ranks, SEEDS[:1])
    for ranks in RANKS:
        yield from runs(METHODS, ranks, SEEDS)


def tuned(method: str, done: list[dict[str, Any]]) -> float:
    """Return the method's rate, from its runs of 60 epochs with seed 0, the first ranks and no clipping."""
    return best_rate(done, [job(method, RANKS[0], SEEDS[0], rate, EPOCHS[2]) for rate in RATES])


def job_of_six(cell: str, method: str, seed: int, rate: float, epochs: int) -> Job:
    """Return the run of a method on HAR-6; the dense network has no compression."""
    compression = None if method == "dense" else COMPRESSION
    arguments = ["har6-gru", "--cell", cell, "--method", method]
    arguments += ["--seed", str(seed), "--lr", str(rate), "--epochs", str(epochs)]
    if compression:
        arguments += ["--target-compression", str(compression)]
    return {
        "data": "har6", "cell": cell, "method": method, "compression": compression, "epochs": epochs, "rate": rate,
        "seed": seed, "arguments": arguments,
    }  # fmt: skip


def jobs_of_six(done: list[dict[str, Any]], cells: list[str], epochs: int) -> Iterator[Job]:
    """Yield the runs on HAR-6, the most informative first: every method with each cell, the rates, the seeds."""
    for rate in RATES:
        for cell in cells:
            for method in METHODS_OF_SIX:
                yield job_of_six(cell, method, SEEDS[0], rate, epochs)
    for seed in SEEDS[1:]:
        for cell in cells:
            for method in METHODS_OF_SIX:
                candidates = [job_of_six(cell, method, SEEDS[0], rate, epochs) for rate in RATES]
                yield job_of_six(cell, method, seed, best_rate(done, candidates), epochs)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--classes", type=int, choices=EPOCHS, default=2, help="2: HAR-2, 6: HAR-6")
    options.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="the cells of HAR-6")
    options.add_argument("--epochs", type=int, help="by default 60 for HAR-2 and 30 for HAR-6")
    options.add_argument(
        "--max-norm", type=float, default=0.0, help="clip the gradients of HAR-2 to this norm; 0: do not"
    )
    args = options.parse_args()
    args.out = args.out or RESULTS / "har_ranks.jsonl"
    epochs = args.epochs or EPOCHS[args.classes]
    two = args.classes == 2
    do(lambda done: jobs(done, epochs, args.max_norm) if two else jobs_of_six(done, args.cells, epochs), args)


if __name__ == "__main__":
    main()
