"""The executions of a low-rank recurrent layer on the CPU, and the cost of the choice between them.

    python -m benchmarks.speed.recurrent_execution [--rounds 5] [--threads 1] [--name NAME]

"loop" is the low-rank op, "native" the op with its steps in C, "dense" torch's own layer with the product of factors
formed once; torch has no FastGRNN. All take turns; a row holds the fastest of each, because a busy machine only ever
adds time. The "regret" of a choice is its time over the time of the fastest one: of the rules in `low_rank_plan`, and
of the measurement that layers use. A training step is forward and backward; inference is without gradients. The input
has 32 features and 24 steps.
"""

import argparse
import itertools
from functools import partial
from unittest import mock

import torch

from benchmarks.timing import alternating, write
from str_triton import LowRankFastGRNN, LowRankGRU, LowRankLSTM, low_rank_plan
from str_triton.nn.recurrent.execution import KINDS
from str_triton.nn.recurrent.execution import fastest as choose

INPUT_SIZE, STEPS = 32, 24
LAYERS = {"gru": LowRankGRU, "lstm": LowRankLSTM, "fastgrnn": LowRankFastGRNN}
HIDDEN, SHARES, BATCHES = (32, 64, 128, 256, 512), (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1), (1, 4, 16, 64)


def fastest(layer: torch.nn.Module, batch: int, training: bool, rounds: int) -> dict[str, float]:
    """Return the milliseconds of each execution."""
    x, grad = torch.randn(STEPS, batch, INPUT_SIZE), torch.randn(STEPS, batch, layer.hidden_size)

    def run(kind: str) -> None:
        with mock.patch.object(layer, "_execution", return_value=kind), torch.set_grad_enabled(training):
            output = layer(x)[0]
            if training:
                output.backward(grad)

    kinds = KINDS if hasattr(torch.nn, layer.cell.upper()) else KINDS[:2]
    turns = {kind: partial(run, kind) for kind in kinds}
    return {kind: 1e3 * min(seconds) for kind, seconds in alternating(turns, rounds, warmup=1).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="recurrent_execution", help="of the result file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for cell, hidden, share, batch, training in itertools.product(LAYERS, HIDDEN, SHARES, BATCHES, (True, False)):
        rank = max(1, int(share * hidden))
        layer = LAYERS[cell](INPUT_SIZE, hidden, max_rank=rank, factorize="recurrent").train(training)
        times = fastest(layer, batch, training, options.rounds)
        plan = low_rank_plan(cell, hidden, rank, batch, torch.float32, training=training).kind
        measured = choose(cell, hidden, rank, batch, STEPS, training=training)
        choices = {"rules": plan, "measured": measured}
        regret = {f"{name}_regret": times[kind] / min(times.values()) for name, kind in choices.items()}
        sizes = {"cell": cell, "hidden_size": hidden, "rank": rank, "batch_size": batch, "training": training}
        rows.append({**sizes, **times, **choices, **regret})
        print(*sizes.values(), *(f"{name} {value:.2f}" for name, value in (times | regret).items()), flush=True)
    write(options.name, {"threads": options.threads, "rounds": options.rounds, "rows": rows})


if __name__ == "__main__":
    main()
