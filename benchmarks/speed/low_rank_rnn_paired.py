"""The low-rank recurrent layers of two checkouts, side by side on the CPU: is the new one as fast as the old one?

    python -m benchmarks.speed.low_rank_rnn_paired OLD [--rounds 15] [--threads 2] [--only gru]

OLD is the folder of another checkout, as `git worktree add OLD COMMIT` makes one. A process for each checkout holds the
layers of benchmarks/speed/low_rank_rnn.py; they take turns, and the first of a round is the second of the next. The
ratio of a round is the new time over the old one: above 1 the new checkout is slower. The exit status is 1 if
the median ratio of all sizes is above --limit.
"""

import argparse
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from statistics import geometric_mean, median

ROOT = Path(__file__).parents[2]


def worker(threads: int) -> None:
    """Obey lines on standard input: the number of a size to make, or "run", which is answered with seconds a call."""
    import torch

    # By its path: both checkouts run this script's sizes. Its imports are the checkout's own.
    names = runpy.run_path(str(Path(__file__).with_name("low_rank_rnn.py")))
    cells, layers = names["CELLS"], names["LAYERS"]
    torch.set_num_threads(threads)
    step, calls = None, 1
    for line in sys.stdin:
        if line == "run\n":
            step()  # Not timed: it meets the caches that the other process left behind.
            begin = time.perf_counter()
            for _ in range(calls):
                step()
            print((time.perf_counter() - begin) / calls, flush=True)
        else:
            torch.manual_seed(0)
            cell = cells[int(line)]
            layer = layers[cell.cell][0](
                names["INPUT_SIZE"], cell.hidden_size, max_rank=cell.rank, factorize="recurrent"
            )
            turn, calls = (names["training_step"], 1) if cell.training else (names["inference"], 10)
            step = turn(layer if cell.training else layer.compact(), cell.batch_size)


class Checkout:
    """A process that runs the layers of a checkout."""

    def __init__(self, folder: Path, threads: int) -> None:
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_WAIT_POLICY": "passive"}
        command = [sys.executable, "-P", Path(__file__).resolve(), "--worker", "--threads", str(threads)]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def tell(self, line: str) -> None:
        """Send a line."""
        print(line, file=self.process.stdin, flush=True)

    def run(self) -> float:
        """Return the seconds of a call."""
        self.tell("run")
        return float(self.process.stdout.readline())

    def end(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, nargs="?", help="the folder of another checkout")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("gru", "lstm", "fastgrnn"), help="this cell alone")
    parser.add_argument("--limit", type=float, default=1.03)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.threads)
        return 0
    if options.old is None or not (options.old / "benchmarks/speed/low_rank_rnn.py").is_file():
        parser.error(f"OLD must be a checkout that has benchmarks/speed/low_rank_rnn.py, got {options.old}")
    from benchmarks.speed.low_rank_rnn import CELLS

    checkouts = {"old": Checkout(options.old.resolve(), options.threads), "new": Checkout(ROOT, options.threads)}
    ratios = []
    for number, cell in enumerate(CELLS):
        if options.only not in (None, cell.cell):
            continue
        for checkout in checkouts.values():
            checkout.tell(str(number))
        seconds: dict[str, list[float]] = {name: [] for name in checkouts}
        for index in range(options.rounds + 1):
            for name in ("old", "new") if index % 2 else ("new", "old"):
                seconds[name].append(checkouts[name].run())
        ratios.append(median(new / old for new, old in zip(seconds["new"][1:], seconds["old"][1:], strict=True)))
        old, new = (1e3 * median(times[1:]) for times in seconds.values())
        kind = "training step" if cell.training else "inference"
        size = f"H {cell.hidden_size:4} r {cell.rank:2} B {cell.batch_size:2}"
        print(
            f"{cell.cell:8} {kind:13} {size}   old {old:8.2f} ms   new {new:8.2f} ms   ratio {ratios[-1]:.3f}",
            flush=True,
        )
    print(f"all: median {median(ratios):.3f}, geometric mean {geometric_mean(ratios):.3f}, largest {max(ratios):.3f}")
    for checkout in checkouts.values():
        checkout.end()
    return int(median(ratios) > options.limit)


if __name__ == "__main__":
    sys.exit(main())
