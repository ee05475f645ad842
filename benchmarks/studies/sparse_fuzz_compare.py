"""Comparisons of compiled networks with their models in float64, for benchmarks/studies/sparse_fuzz.py."""

import copy
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from benchmarks.studies.sparse_fuzz_networks import Case
from benchmarks.studies.sparse_fuzz_rounding import SAMPLES, Noise
from str_triton.deploy.sparse.model import CompiledModel

TOLERANCE = 1e-4  # of the largest value, at least of 1


@dataclass
class Tally:
    """Counts of what was run.

    Attributes:
        largest: the largest difference, of the largest value or of 1.
        amplified: comparisons beyond the tolerance, where rounding in float32 explains the difference.
        unsaved: networks that a file cannot hold, and said so.
        int8: comparisons of recurrent networks with matrices in int8.
        largest_int8: the largest difference among them.
    """

    networks: int = 0
    comparisons: int = 0
    empty_batches: int = 0
    largest: float = 0.0
    amplified: int = 0
    unsaved: int = 0
    int8: int = 0
    largest_int8: float = 0.0
    layer_by_layer: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    executions: Counter[str] = field(default_factory=Counter)

    def record(self) -> dict[str, Any]:
        """Return it for a JSON file."""
        return {**vars(self), "kinds": dict(sorted(self.kinds.items())), "executions": dict(self.executions)}


class Wrong(Exception):
    """A difference between a compiled network and its model."""


def sizes(network: Case) -> Iterator[tuple[int, int, int]]:
    batch, height, width = network.sizes
    yield network.sizes
    yield batch + 2, height, width
    yield 1, 31, 17
    yield 0, height, width
    yield 2, 40, 40
    yield network.sizes


def compare(network: Case, made: dict[str, CompiledModel], draw: random.Random, tally: Tally) -> None:
    exact = copy.deepcopy(network.model).double()
    held: list[tuple[list[Any], list[Any]]] = []  # results of calls before, and copies of them
    for size in sizes(network):
        args = network.model.example(*size)
        before = copy.deepcopy(exact)
        try:
            with torch.no_grad():
                wanted = exact(*pytree.tree_map(_double, args))
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError):  # Too small for the layers.
            exact = before
            continue
        for name, compiled in made.items():
            where = f"{name} for {[tuple(t.shape) for t in tensors(args)]}"
            given = pytree.tree_map(lambda leaf: laid_out(leaf, draw), args)
            try:
                found = compiled(*given)
            except ValueError as error:
                if name == "loaded" and "compiled for" in str(error):  # It holds one branch alone.
                    compiled.reset(made["compiled"].state())
                    continue
                raise
            except RuntimeError:
                if _takes(before, given):
                    raise
                return  # The model does not take this memory format either, and its state may be any.
            if not equal(given, args):
                raise Wrong(f"{where}: it changes its argument")
            if not all(equal(*pair) for pair in held):
                raise Wrong(f"{where}: it changes the results of an earlier call")
            leaves = tensors(found)
            held = [*held[-2:], (leaves, [leaf.clone() for leaf in leaves])]
            _compare_results(where, found, wanted, before, (args, given), tally)
            tally.comparisons += 1
            tally.empty_batches += size[0] == 0


def _takes(exact: torch.nn.Module, args: tuple) -> bool:
    try:
        with torch.no_grad():
            copy.deepcopy(exact).float()(*args)
    except RuntimeError:
        return False
    return True


def _compare_results(
    where: str, found: Any, wanted: Any, before: Any, calls: tuple[tuple, tuple], tally: Tally
) -> None:
    structures = [pytree.tree_structure(result) for result in (found, wanted)]
    if structures[0] != structures[1]:
        raise Wrong(f"{where}: {structures[0]}, not {structures[1]}")
    ours, theirs = tensors(found), tensors(wanted)
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
            raise Wrong(f"{where}: {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}")
    error = max(map(difference, ours, theirs), default=0.0)
    if not error <= TOLERANCE:
        if not _is_rounding(ours, before, calls):
            raise Wrong(f"{where}: off by {error:.2g} of the largest value")
        tally.amplified += 1
        return
    tally.largest = max(tally.largest, error)


def _is_rounding(found: list[Tensor], before: torch.nn.Module, calls: tuple[tuple, tuple]) -> bool:
    """Check whether rounding in float32 explains a difference from the model in float64, for one of some equal calls.

    It does where the model itself is as far from it in float32. Memory formats may matter: torch's norms round
    differently in channels_last, and a change of what `flatten` or `reshape` gives is lost where these have to copy.
    """
    with torch.no_grad():
        for args in calls:
            exact = tensors(copy.deepcopy(before)(*pytree.tree_map(_double, args)))
            noise = max(map(difference, tensors(copy.deepcopy(before).float()(*args)), exact))
            for seed in range(SAMPLES):
                with Noise(seed):
                    changed = tensors(copy.deepcopy(before)(*pytree.tree_map(_double, args)))
                noise = max(noise, *map(difference, changed, exact))
            if max(map(difference, found, exact)) <= max(noise, TOLERANCE):
                return True
    return False


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, as a part of the largest value or of 1; infinity where only one is finite."""
    if not b.numel():
        return 0.0
    a, b = a.double(), b.double()
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()):
        return float("inf")
    scale = max(1.0, float(b[finite].abs().max())) if finite.any() else 1.0
    return float((a - b)[finite].abs().max()) / scale if finite.any() else 0.0


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def equal(a: Any, b: Any) -> bool:
    pairs = zip(tensors(a), tensors(b), strict=True)
    return all(x.shape == y.shape and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in pairs)


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def laid_out(leaf: Any, draw: random.Random) -> Any:
    """Return a tensor of the same values that lies in memory in another way, or wants a gradient."""
    match draw.choice(("plain", "plain", "transposed", "channels_last", "sliced", "gradient")):
        case "transposed" if leaf.dim() > 1:
            return leaf.transpose(0, -1).contiguous().transpose(0, -1)
        case "channels_last" if leaf.dim() == 4:
            return leaf.contiguous(memory_format=torch.channels_last)
        case "sliced" if leaf.dim():
            return torch.cat([leaf, leaf], -1)[..., : leaf.shape[-1]]
        case "gradient" if leaf.is_floating_point():
            return leaf.clone().requires_grad_()
    return leaf.clone()
