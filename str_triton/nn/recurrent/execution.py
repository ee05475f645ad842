"""The execution of a recurrent layer on the CPU.

"loop" is the low-rank op, "native" the op with its steps in C, "dense" torch's own layer with the matrix formed once.
The fastest one depends on the processor. All are timed on this machine when a layer of a new size first runs, and the
times are kept in the user's cache folder: every later process decides in the same way.
"""

import functools
import hashlib
import math
import os
import re
import threading
import time
from collections.abc import Callable
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from str_triton.files import beside, write_atomically
from str_triton.machine import cache_folder, own_folder, processor_features
from str_triton.native.recurrent import kernels
from str_triton.nn.low_rank import LowRankWeight
from str_triton.nn.recurrent.dense_kernel import dense_layer
from str_triton.ops.low_rank_cell import CELLS
from str_triton.ops.low_rank_plan import low_rank_plan
from str_triton.ops.low_rank_rnn import run

RANKS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)  # of the hidden size
LARGEST_BATCH, LARGEST_HIDDEN = 64, 2048  # A measurement above them would take too long.
SHORT, LONG, FEATURES = 2, 24, 32  # steps and features of the inputs that are timed
KINDS, NEVER = ("loop", "native", "dense"), 9e9
ROUNDS, SECONDS = 50, 0.3  # the largest number of rounds, and the time after which no further round begins


class Sizes(NamedTuple):
    """The sizes that are timed: for other ranks and batches the next larger ones count."""

    cell: str
    hidden: int
    rank: int
    batch: int
    training: bool
    threads: int

    @classmethod
    def near(cls, cell: str, hidden: int, rank: int, batch: int, training: bool) -> "Sizes":
        """Return the timed sizes that a layer and batch of these sizes share with others, for torch's threads."""
        timed = next((near for share in RANKS if (near := max(1, int(share * hidden))) >= rank), hidden)
        batch = min(LARGEST_BATCH, 1 << (batch - 1).bit_length())
        return cls(cell, hidden, timed, batch, training, torch.get_num_threads())


class Times(NamedTuple):
    """Seconds of a short and a long sequence (`SHORT`, `LONG`) by each execution; in training forward and backward.

    Each includes what is prepared once for a sequence: the factors that the threshold leaves, or their product. An
    execution that cannot run takes `NEVER`.
    """

    short_loop: float
    short_native: float
    short_dense: float
    long_loop: float
    long_native: float
    long_dense: float

    def fastest(self, steps: int) -> str:
        """Return the execution that takes the least time for so many steps, if each step adds the same time."""
        share = (steps - SHORT) / (LONG - SHORT)
        times = [short + (long - short) * share for short, long in zip(self[:3], self[3:], strict=True)]
        return KINDS[times.index(min(times))]


def fastest(cell: str, hidden: int, rank: int, batch: int, steps: int, *, training: bool) -> str:
    """Return the execution that is fastest for float32 on the CPU, by times of this machine: one of KINDS.

    Rules take the place of times (`low_rank_plan`) where all machines or processes must decide alike: under
    `torch.use_deterministic_algorithms`, in a process group, and if the environment variable STR_TRITON_MEASURE is 0.
    They do so too without a cache folder of the user's own, and for layers of more than 2,048 hidden units.
    """
    times = None
    if _may_measure() and hidden <= LARGEST_HIDDEN:
        times = _times(Sizes.near(cell, hidden, rank, batch, training))
    if times is None:
        return low_rank_plan(cell, hidden, rank, batch, torch.float32, training=training).kind
    return times.fastest(steps)


def _may_measure() -> bool:
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return alone and not torch.are_deterministic_algorithms_enabled() and os.environ.get("STR_TRITON_MEASURE") != "0"


@functools.cache
def _times(sizes: Sizes) -> Times | None:
    """Return the stored times, after measuring them if there are none; None where no file can keep them."""
    try:
        folder = own_folder(own_folder(cache_folder()) / f"recurrent-{_machine()}")
        path = folder / "-".join(map(str, (*sizes[:4], "training" if sizes.training else "inference", sizes.threads)))
        if (stored := _read(path)) is not None:
            return stored
        _keep(path, measured(sizes))
        return _read(path)
    except OSError:
        return None


@functools.cache
def _machine() -> str:
    """Return a short name of what the times depend on besides the sizes."""
    return hashlib.sha256(f"{processor_features()}\n{torch.__version__}".encode()).hexdigest()[:20]


def _read(path: Path) -> Times | None:
    """Return the times in a file; None if there is no such file, or if its content is something else."""
    try:
        content = path.read_text("ascii")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    if not re.fullmatch(r"(\d\.\d{3}e[+-]\d\d ?){6}", content):
        return None
    return Times(*map(float, content.split()))


def _keep(path: Path, times: Times) -> None:
    """Write the file if there is none with times: of several processes that measure at once, the first one decides."""
    draft = beside(path)
    write_atomically(draft, " ".join(f"{value:.3e}" for value in times))
    try:
        if path.exists() and _read(path) is None:
            os.replace(draft, path)
        else:
            os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink(missing_ok=True)


def measured(sizes: Sizes) -> Times:
    """Time the executions in a thread of its own: autocast, grad mode, modes and default devices belong to a thread."""
    found: list[Times] = []

    def measure() -> None:
        torch.set_num_threads(sizes.threads)  # OpenMP's number belongs to a thread, too.
        found.append(_measure(sizes))

    thread = threading.Thread(target=measure, daemon=True)
    thread.start()
    thread.join()
    if not found:
        raise OSError("the measurement failed")  # for instance without enough memory
    return found[0]


def _measure(sizes: Sizes) -> Times:
    cell, hidden = CELLS[sizes.cell], sizes.hidden
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return values.mul_(hidden**-0.5).requires_grad_(sizes.training)

    matrix = _matrix(cell.gates * hidden, hidden, sizes.rank, draw)
    w_x, b_x, b_h = draw(cell.gates * hidden, FEATURES), draw(cell.gates * hidden), draw(cell.gates * hidden)
    state = draw(sizes.batch, hidden).detach()
    scalars = {name: draw(1) for name in ("zeta", "nu")[: cell.scalars]}
    biases: dict[str, Tensor | None] = {"bias": b_h} if cell.biases is None else {"gate": b_x, "update": b_h}

    def loop(x: Tensor, native: bool = False) -> Tensor:
        gates_x, states = F.linear(x, w_x, b_x), dict.fromkeys(cell.states, state)
        return run(cell, gates_x, *matrix.surviving(), biases, scalars, states, None, False, None, native)[0]

    def dense(x: Tensor) -> Tensor:
        states, weights = [state[None]] * len(cell.states), (w_x, matrix.weight(), b_x, b_h)
        return dense_layer(cell.name, x, states, weights, bias=True, bidirectional=False)[0]

    can_run = True, kernels(cell.name) is not None, cell.has_dense
    forwards: list[Callable[[Tensor], Tensor]] = list(
        compress((loop, functools.partial(loop, native=True), dense), can_run)
    )

    def seconds(forward: Callable[[Tensor], Tensor], x: Tensor, grad_output: Tensor) -> float:
        before = time.perf_counter()
        output = forward(x)
        if sizes.training:
            torch.autograd.grad(output, (w_x, b_x, b_h, *matrix.parameters()), grad_output)
        return time.perf_counter() - before

    turns = []
    for steps in (SHORT, LONG):
        x, grad_output = draw(steps, sizes.batch, FEATURES).detach(), draw(steps, sizes.batch, hidden).detach()
        turns += [(forward, x, grad_output) for forward in forwards]
    best, begin = [math.inf] * len(turns), time.perf_counter()
    with torch.set_grad_enabled(sizes.training):
        for number in range(ROUNDS + 1):
            if number > 1 and time.perf_counter() - begin > SECONDS:
                break
            times = [seconds(*turn) for turn in turns]
            if number:  # The first round meets cold caches.
                best = list(map(min, best, times))
    found = iter(best)
    return Times(*(next(found) if can else NEVER for can in can_run * 2))


def _matrix(rows: int, columns: int, rank: int, draw: Callable[..., Tensor]) -> LowRankWeight:
    """Return a matrix whose components all survive, with values of `draw`, so that the caller's generator is kept."""
    matrix = LowRankWeight(rows, columns, rank, raw_threshold_init=-50.0, device="meta", dtype=torch.float32)
    matrix.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in matrix.parameters():
            parameter.copy_(draw(*parameter.shape))
        matrix.reset_threshold()
    return matrix
