"""Finished runs of small networks with random weights, for the tests of the exports."""

from pathlib import Path

import torch

from str_triton.rnn.finished_run import FinishedRun
from str_triton.rnn.models import Architecture, compact
from tests.nn.recurrent.test_streaming import cut

INPUTS, OUTPUTS, HIDDEN = 5, 4, 12


def made_run(cell: str, *, standardised: bool = True, rank: int | None = 3, **options: object) -> FinishedRun:
    """Make a finished run with a random network; `rank` components of each matrix survive (None: dense)."""
    torch.manual_seed(0)
    model = Architecture("classify", cell, INPUTS, OUTPUTS, HIDDEN, **options).build(
        factorize="none" if rank is None else "both"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.uniform_(-1, 1)
            elif name.endswith(".u") or (parameter.dim() == 2 and not name.endswith(".v")):
                parameter.mul_(2)
    cut(model.rnn, rank or 1)
    mean, std = (torch.randn(INPUTS), torch.rand(INPUTS) + 0.5) if standardised else (None, None)
    names = tuple(f"class {i}" for i in range(OUTPUTS))
    return FinishedRun(Path("made"), {"data": "made */ up"}, compact(model).eval(), names, mean, std)


CASES = {
    "gru low-rank": made_run("gru", layers=2),
    "lstm low-rank, mean": made_run("lstm", layers=2, pooling="mean"),
    "fastgrnn low-rank": made_run("fastgrnn", layers=2),
    "gru dense, bidirectional, mean": made_run("gru", rank=None, bidirectional=True, pooling="mean"),
    "lstm dense": made_run("lstm", rank=None, standardised=False),
    "fastgrnn dense": made_run("fastgrnn", rank=None),
    "gru low-rank, bidirectional": made_run("gru", bidirectional=True),
}
