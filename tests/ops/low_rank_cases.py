"""The cases of the low-rank time loops that the CPU, GPU and interpreter tests share, and how results are compared."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature

import torch
from torch import Tensor

import str_triton
from str_triton.ops.low_rank_cell import CELLS
from tests import oracle

LENGTHS = {
    "all": lambda steps, batch: None,
    "equal": lambda steps, batch: torch.full((batch,), steps),
    "shorter": lambda steps, batch: torch.full((batch,), max(1, steps - 2)),
    "falling": lambda steps, batch: torch.linspace(steps, 1, batch).long(),
    "any order": lambda steps, batch: torch.randint(1, steps + 1, (batch,)),
}
OPTIONS = ("lengths", "reverse", "precision", "native")
# Of a result's largest element.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}


@dataclass
class Case:
    """A cell's arguments by name, the options, and the gradients of outputs and final states."""

    cell: str
    tensors: dict[str, Tensor | None]
    lengths: Tensor | None
    reverse: bool
    grads: list[Tensor]

    def call(self, function: Callable) -> list[Tensor]:
        """Return outputs and the final states."""
        outputs, states = function(*self.tensors.values(), self.lengths, reverse=self.reverse)
        return [outputs, *(states if isinstance(states, tuple) else (states,))]

    def to(self, dtype: torch.dtype) -> "Case":
        tensors = {name: None if tensor is None else tensor.to(dtype) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, grads=[grad.to(dtype) for grad in self.grads])


def example(
    cell: str,
    steps: int = 5,
    batch: int = 4,
    hidden: int = 6,
    rank: int = 3,
    *,
    lengths: str = "all",
    reverse: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Case:
    gates = CELLS[cell].gates
    tensors = {
        "gates_x": torch.randn(steps, batch, gates * hidden),
        "u": torch.randn(gates * hidden, rank) / max(1, rank) ** 0.5,
        "m": torch.randn(rank),
        "v": torch.randn(hidden, rank) / hidden**0.5,
    }
    states = [f"{name}0" for name in CELLS[cell].states]
    own = [name for name in list(signature(op(cell)).parameters)[4:] if name not in (*states, *OPTIONS)]
    biases = [name for name in own if name.startswith("bias")]
    width = CELLS[cell].bias_blocks * hidden // len(biases)
    tensors |= {name: torch.randn(width) if bias else None for name in biases}
    tensors |= {name: torch.randn(1) for name in own if name not in biases}
    tensors |= {name: torch.randn(batch, hidden) for name in states}
    grads = [torch.randn(steps, batch, hidden), *(torch.randn(batch, hidden) for _ in states)]
    return Case(cell, tensors, LENGTHS[lengths](steps, batch), reverse, grads).to(dtype)


def op(cell: str) -> Callable:
    return getattr(str_triton, f"low_rank_{cell}")


def differentiate(function: Callable, case: Case) -> dict[str, Tensor]:
    """Return outputs and states, and the gradient of every tensor that is given."""
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in case.tensors.items()}
    results = replace(case, tensors=leaves).call(function)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad(results, list(wanted.values()), case.grads)
    named = dict(zip(("outputs", "h", "c"), (result.detach() for result in results), strict=False))
    return named | {f"grad of {name}": grad for name, grad in zip(wanted, grads, strict=True)}


def expected(case: Case) -> dict[str, Tensor]:
    """Return the result of the literal equations in float64."""
    return differentiate(getattr(oracle, f"low_rank_{case.cell}"), case.to(torch.float64))


def assert_matches(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        error, scale = (got[name].cpu().double() - value).abs(), value.abs().max() if value.numel() else 0
        assert (error <= tolerance * max(scale, 1e-3)).all(), f"{name}: {error.max():.2e} of {scale:.2e}"


def full_rank(weight: Tensor, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return u, m, v with the product weight [gates H, H], differentiable: v is the identity or random orthogonal."""
    size = weight.shape[1]
    if split == "identity":
        return weight, weight.new_ones(size), torch.eye(size, dtype=weight.dtype)
    v, _ = torch.linalg.qr(torch.randn(size, size, dtype=weight.dtype))
    m = weight.new_empty(size).uniform_(0.5, 2)
    return weight @ v / m, m, v


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the largest error relative to the largest element."""
    return float((got - want).detach().abs().max() / want.detach().abs().max())
