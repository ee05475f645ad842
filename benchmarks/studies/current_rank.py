"""A training step of a layer whose threshold has cut components, beside the same step with all of its columns.

    python -m benchmarks.studies.current_rank [--rounds 9]

One thread. The layers are those of the studies on HAR-2 and on speech: forward and backward of all steps, at full
maximum rank, with thresholds that leave some components. "before": as if Python could not read the thresholds, so that
the loop has all columns. Results: benchmarks/results/current_rank_cpu.json.
"""

import argparse
from collections.abc import Callable
from statistics import median
from unittest import mock

import torch
from torch import nn

from benchmarks.timing import alternating, median_ratio, write
from str_triton import LowRankFastGRNN, LowRankGRU, LowRankLSTM, LowRankWeight
from str_triton.training.memory import keep_freed_memory

# layer, inputs, units, batch, steps; the ranks that the threshold leaves
LAYERS = {
    "FastGRNN, HAR-2": (LowRankFastGRNN, 9, 80, 100, 128, (80, 40, 16, 8)),
    "GRU, speech": (LowRankGRU, 32, 96, 64, 99, (96, 56, 32, 16)),
    "LSTM, speech": (LowRankLSTM, 32, 96, 64, 99, (96, 16)),
}


def cut(layer: nn.Module, rank: int) -> None:
    """Leave `rank` components of the recurrent matrix, and as many of the input matrix as it has."""
    for matrix in layer.factors().values():
        sizes = matrix.singular_values().sort(descending=True).values
        below = sizes[rank] if rank < len(sizes) else sizes[-1] / 2
        kept = sizes[min(rank, len(sizes)) - 1]
        nn.init.constant_(matrix.raw_threshold, ((kept + below) / 2).log().item())


def training_step(layer: nn.Module, x: torch.Tensor, now: bool) -> Callable[[], None]:
    def step() -> None:
        layer.zero_grad()
        layer(x)[0].square().mean().backward()

    def before() -> None:
        with mock.patch.object(LowRankWeight, "_reads_values", return_value=False):
            step()

    return step if now else before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    rows = []
    for name, (kind, inputs, hidden, batch, steps, ranks) in LAYERS.items():
        layer, x = kind(inputs, hidden, batch_first=True), torch.randn(batch, steps, inputs)
        for rank in ranks:
            cut(layer, rank)
            seconds = alternating(
                {"now": training_step(layer, x, True), "before": training_step(layer, x, False)}, args.rounds
            )
            rows.append(
                {
                    "layer": name, "hidden_size": hidden, "batch_size": batch, "steps": steps, "rank": rank,
                    **{f"{which}_ms": 1e3 * median(times) for which, times in seconds.items()},
                    "times_faster": median_ratio(seconds, "before", "now"),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    write("current_rank_cpu", {"rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
