"""Random networks through `deploy.compile_sparse`, against eager PyTorch in float64.

    python -m benchmarks.studies.sparse_fuzz [--first 0] [--count 2000] [--minutes 60] [--name sparse_fuzz]

Each seed is a network of sparse_fuzz_networks.py, with random zeros; from a million on a recurrent one. The execution
of every layer is drawn at random. The network is compared for the example, for other batches (none, one, many) and for
other sizes, in several memory formats, saved and loaded; results must not change with the next call, nor arguments with
this one. What was run is added to benchmarks/results/NAME.json. Under AddressSanitizer and UBSan, for the part in C:

    CC="gcc -fsanitize=address,undefined -fno-sanitize-recover=undefined -g"
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so.6)" XDG_CACHE_HOME=runs/asan
    python -m benchmarks.studies.sparse_fuzz
"""

import argparse
import copy
import json
import os
import random
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from benchmarks.studies.sparse_fuzz_networks import Case, case, redraw
from benchmarks.studies.sparse_fuzz_rounding import SAMPLES, Noise
from benchmarks.timing import RESULTS, write
from str_triton import deploy
from str_triton.deploy.sparse import compile as compilation
from str_triton.deploy.sparse.executions import EXECUTIONS
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.recurrent import Recurrent, exportable
from str_triton.deploy.sparse.model import CompiledModel

ROUNDS = 10  # weights and executions for each export
TOLERANCE = 1e-4  # of the largest value, at least of 1


@dataclass
class Tally:
    """Counts of what was run.

    Attributes:
        largest: the largest difference, of the largest value or of 1.
        amplified: comparisons beyond the tolerance, where rounding in float32 explains the difference.
        unsaved: networks that a file cannot hold, and said so.
    """

    networks: int = 0
    comparisons: int = 0
    empty_batches: int = 0
    largest: float = 0.0
    amplified: int = 0
    unsaved: int = 0
    layer_by_layer: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    executions: Counter[str] = field(default_factory=Counter)

    def record(self) -> dict[str, Any]:
        """Return it for a JSON file."""
        return {**vars(self), "kinds": dict(sorted(self.kinds.items())), "executions": dict(self.executions)}


class Wrong(Exception):
    """A difference between a compiled network and its model."""


def forced(compiled: deploy.SparseModel, draw: random.Random, tally: Tally | None = None) -> None:
    """Draw the execution of every layer."""
    tally = Tally() if tally is None else tally
    for name in compiled.choices:
        cut = draw.randint(1, 9), draw.randint(1, 9), draw.randint(1, 4)
        # Three quarters by the kernels: an execution that does not fit is theirs, too.
        node = next(node for node in compiled.graph.layers() if node.name == name)
        shapes = dict.fromkeys((*node.inputs, name), (1, 1, 1, 1))
        fitting = [key for key, execution in EXECUTIONS.items() if execution.by_kernels or execution.fits(node, shapes)]
        ours = ["loop", "loop"] if isinstance(node, Recurrent) else ["sparse", "sparse", "sparse"]
        compiled.choices[name] = Choice(draw.choice([*fitting, *ours]), *cut)
        tally.executions[compiled.choices[name].execution] += 1
    compiled._plans.clear()


def check(seed: int, tally: Tally | None = None, rounds: int = 1) -> str | None:
    """Return what is wrong with the compiled network of a seed; None if nothing is.

    Weights and executions are drawn in every round. All rounds share one export, which takes most of the time.
    """
    tally = Tally() if tally is None else tally
    network, draw = case(seed), random.Random(-seed)
    model, example = network.model, network.model.example(*network.sizes)
    try:
        with torch.no_grad():
            copy.deepcopy(model)(*example)
    except (RuntimeError, ValueError, IndexError):  # An image that is too small for its layers.
        return None
    tally.networks += 1
    tally.kinds.update(set(model.kinds))
    compiled, lower_again = _compiled(model, example)
    if not isinstance(compiled, deploy.SparseModel):
        tally.layer_by_layer += 1
        if any("cannot be compiled" in note or "not used" in note for note in compiled.notes):
            return f"it is a {type(compiled).__name__}: {compiled.notes}"
    try:
        for number in range(rounds):
            made: dict[str, CompiledModel] = {"compiled": compiled}
            if isinstance(compiled, deploy.SparseModel):
                if number and lower_again is not None:
                    network, compiled = lower_again(network.sizes, draw)
                    made = {"compiled": compiled}
                forced(compiled, draw, tally)
                compiled.reset(dict(model.named_buffers()))
                made |= _loaded(compiled, tally) if number == 0 else {}
            elif number:
                break
            _compare(network, made, draw, tally)
    except Wrong as wrong:
        return str(wrong)
    return None


Again = Callable[[tuple[int, int, int], random.Random], tuple[Case, deploy.SparseModel]]


def _compiled(model: Any, example: tuple) -> tuple[CompiledModel, Again | None]:
    """Compile a model, and return a function that compiles its last export with other weights; None: there is none."""
    noted: list[tuple] = []
    lowered = compilation._lowered

    def note(*args: Any) -> deploy.SparseModel:
        noted.append(args)
        return lowered(*args)

    with mock.patch.object(compilation, "_lowered", note):
        compiled = deploy.compile_sparse(model, example, tune=False)
    if not noted or exportable(model) is not None:  # Then the export holds other layers than the model.
        return compiled, None

    def again(sizes: tuple[int, int, int], draw: random.Random) -> tuple[Case, deploy.SparseModel]:
        dense = noted[-1][1]
        redraw(dense, draw)
        with compilation.plain_torch():  # as compile_sparse does: some models refuse a call that records gradients
            for name, buffer in model.named_buffers():
                dense.get_buffer(name).copy_(buffer)
            return Case(dense, sizes), lowered(*noted[-1])

    return compiled, again


def _loaded(compiled: deploy.SparseModel, tally: Tally) -> dict[str, CompiledModel]:
    """Return the network saved and loaded, if a file can hold it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled.save(Path(folder) / "net")
        except ValueError as error:
            if "torch.save" not in str(error):
                raise
            tally.unsaved += 1
            return {}
        return {"loaded": deploy.load_sparse(Path(folder) / "net")}


def _sizes(network: Case) -> Iterator[tuple[int, int, int]]:
    batch, height, width = network.sizes
    yield network.sizes
    yield batch + 2, height, width
    yield 1, 31, 17
    yield 0, height, width
    yield 2, 40, 40
    yield network.sizes


def _compare(network: Case, made: dict[str, CompiledModel], draw: random.Random, tally: Tally) -> None:
    exact = copy.deepcopy(network.model).double()
    held: list[tuple[list[Any], list[Any]]] = []  # results of calls before, and copies of them
    for sizes in _sizes(network):
        args = network.model.example(*sizes)
        before = copy.deepcopy(exact)
        try:
            with torch.no_grad():
                wanted = exact(*pytree.tree_map(_double, args))
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError):  # Too small for the layers.
            exact = before
            continue
        for name, compiled in made.items():
            where = f"{name} for {[tuple(t.shape) for t in _tensors(args)]}"
            given = pytree.tree_map(lambda leaf: _laid_out(leaf, draw), args)
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
            if not _equal(given, args):
                raise Wrong(f"{where}: it changes its argument")
            if not all(_equal(*pair) for pair in held):
                raise Wrong(f"{where}: it changes the results of an earlier call")
            leaves = _tensors(found)
            held = [*held[-2:], (leaves, [leaf.clone() for leaf in leaves])]
            _compare_results(where, found, wanted, before, (args, given), tally)
            tally.comparisons += 1
            tally.empty_batches += sizes[0] == 0


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
    ours, theirs = _tensors(found), _tensors(wanted)
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
            raise Wrong(f"{where}: {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}")
    error = max(map(_difference, ours, theirs), default=0.0)
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
            exact = _tensors(copy.deepcopy(before)(*pytree.tree_map(_double, args)))
            noise = max(map(_difference, _tensors(copy.deepcopy(before).float()(*args)), exact))
            for seed in range(SAMPLES):
                with Noise(seed):
                    changed = _tensors(copy.deepcopy(before)(*pytree.tree_map(_double, args)))
                noise = max(noise, *map(_difference, changed, exact))
            if max(map(_difference, found, exact)) <= max(noise, TOLERANCE):
                return True
    return False


def _difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, as a part of the largest value or of 1; infinity where only one is finite."""
    if not b.numel():
        return 0.0
    a, b = a.double(), b.double()
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()):
        return float("inf")
    scale = max(1.0, float(b[finite].abs().max())) if finite.any() else 1.0
    return float((a - b)[finite].abs().max()) / scale if finite.any() else 0.0


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _equal(a: Any, b: Any) -> bool:
    pairs = zip(_tensors(a), _tensors(b), strict=True)
    return all(x.shape == y.shape and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in pairs)


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _laid_out(leaf: Any, draw: random.Random) -> Any:
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


def sanitizers() -> str:
    """Return the sanitizers that the part in C is compiled with."""
    return "address, undefined" if "-fsanitize=address,undefined" in os.environ.get("CC", "") else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=1e6, help="end after so many")
    parser.add_argument("--name", default="sparse_fuzz", help="of the result file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    tally, wrong, begin = Tally(), {}, time.monotonic()
    seed = options.first
    while seed < options.first + options.count and time.monotonic() - begin < 60 * options.minutes:
        try:
            problem = check(seed, tally, rounds=ROUNDS)
        except Exception as error:  # Whatever it is, it is what this looks for.
            problem = f"{type(error).__name__}: {error}"
        if problem:
            wrong[seed] = problem
            print(f"seed {seed}: {problem}", flush=True)
        elif seed % 20 == 19:
            print(f"{tally.networks} networks, {tally.comparisons} comparisons, {len(wrong)} wrong", flush=True)
        seed += 1
    run = {"seeds": [options.first, seed], "sanitizers": sanitizers(), "wrong": wrong, **tally.record()}
    path = RESULTS / f"{options.name}.json"
    content = json.loads(path.read_text()) if path.exists() else {"machine": {}}
    content["runs"] = [*content.get("runs", []), run]
    write(options.name, {name: value for name, value in content.items() if name != "machine"})
    raise SystemExit(len(wrong) > 0)


if __name__ == "__main__":
    main()
