"""Low-rank recurrent layers beside torch's: a training step, and inference of one sequence, on the CPU.

    python -m benchmarks.speed.low_rank_rnn [--rounds 15] [--threads 2] [--only gru]

Both layers take turns in one process. A round's ratio is torch's time over ours: above 1 ours is faster; the median is
over the rounds. A training step is forward and backward from a given gradient of the outputs, input projection and
parameters included, without an optimizer. Inference is of the compact layer. The input has 32 features.
"""

import argparse
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.timing import alternating, median_ratio, write
from str_triton import LowRankFastGRNN, LowRankGRU, LowRankLSTM, low_rank_plan

INPUT_SIZE = 32
STEPS = 99
# FastGRNN has no counterpart in torch. It is compared with nn.GRU, the usual alternative.
LAYERS = {"gru": (LowRankGRU, nn.GRU), "lstm": (LowRankLSTM, nn.LSTM), "fastgrnn": (LowRankFastGRNN, nn.GRU)}


class Cell(NamedTuple):
    """A row of the table. `goal` is the ratio to reach; None: for information only."""

    cell: str
    hidden_size: int
    rank: int
    batch_size: int
    training: bool
    goal: float | None = None


CELLS = (
    Cell("gru", 128, 16, 64, True, 0.9),
    Cell("gru", 256, 16, 64, True),
    Cell("gru", 512, 32, 64, True, 2.0),
    Cell("gru", 1024, 64, 64, True, 2.5),
    Cell("lstm", 128, 16, 64, True),
    Cell("lstm", 256, 16, 64, True),
    Cell("lstm", 512, 32, 64, True, 1.5),
    Cell("lstm", 1024, 64, 64, True, 2.0),
    Cell("fastgrnn", 128, 16, 64, True),
    Cell("fastgrnn", 512, 32, 64, True),
    Cell("gru", 128, 16, 1, False),
    Cell("gru", 512, 32, 1, False, 0.9),
    Cell("gru", 1024, 64, 1, False),
    Cell("lstm", 128, 16, 1, False),
    Cell("lstm", 512, 32, 1, False),
    Cell("lstm", 1024, 64, 1, False),
)


def training_step(layer: nn.Module, batch_size: int) -> Callable[[], None]:
    x = torch.randn(STEPS, batch_size, INPUT_SIZE)
    grad = torch.randn(STEPS, batch_size, layer.hidden_size)

    def step() -> None:
        for parameter in layer.parameters():
            parameter.grad = None
        layer(x)[0].backward(grad)

    return step


def inference(layer: nn.Module, batch_size: int) -> Callable[[], None]:
    x = torch.randn(STEPS, batch_size, INPUT_SIZE)
    layer.eval()

    def step() -> None:
        with torch.no_grad():
            layer(x)

    return step


def measure(cell: Cell, rounds: int) -> dict[str, float | str | None]:
    ours_class, torch_class = LAYERS[cell.cell]
    ours = ours_class(INPUT_SIZE, cell.hidden_size, max_rank=cell.rank, factorize="recurrent")
    theirs = torch_class(INPUT_SIZE, cell.hidden_size)
    if not cell.training:
        ours = ours.compact()
    assert ours.ranks()["weight_hh_l0"] == cell.rank
    turn = training_step if cell.training else inference
    functions = {"ours": turn(ours, cell.batch_size), "torch": turn(theirs, cell.batch_size)}
    seconds = alternating(functions, rounds, calls=1 if cell.training else 10, settle=1)
    sizes = cell.hidden_size, cell.rank, cell.batch_size
    return {
        "plan": low_rank_plan(cell.cell, *sizes, torch.float32, training=cell.training).kind,
        "torch_class": torch_class.__name__,
        **{f"{name}_ms": 1e3 * median(times) for name, times in seconds.items()},
        "torch_over_ours": median_ratio(seconds, "torch", "ours"),
        "goal": cell.goal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=tuple(LAYERS), help="this cell alone; nothing is written then")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for cell in CELLS:
        if args.only in (None, cell.cell):
            figures = measure(cell, args.rounds)
            rows.append({**cell._asdict(), "steps": STEPS, "input_size": INPUT_SIZE, **figures})
            what = "training step" if cell.training else "inference"
            print(
                f"{cell.cell:8} {what:13} H {cell.hidden_size:4} r {cell.rank:2} B {cell.batch_size:2}   "
                f"ours {figures['ours_ms']:7.2f} ms   {figures['torch_class']:4} {figures['torch_ms']:7.2f} ms   "
                f"ratio {figures['torch_over_ours']:.2f}" + (f" (goal {cell.goal})" if cell.goal else ""),
                flush=True,
            )
    if args.only is None:
        write("low_rank_rnn_cpu", {"rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
