"""Random networks through `deploy.compile_sparse`, against eager PyTorch in float64.

    python -m benchmarks.studies.sparse_fuzz [--first 0] [--count 2000] [--minutes 60] [--name sparse_fuzz]

Each seed is a network of sparse_fuzz_networks.py, with random zeros; from a million on a recurrent one. The execution
of every layer is drawn at random. The network is compared for the example, for other batches (none, one, many) and for
other sizes, in several memory formats, saved and loaded; results must not change with the next call, nor arguments with
this one. A recurrent network is compared once more with recurrent matrices in int8. What was run is added to
benchmarks/results/NAME.json. Under AddressSanitizer and UBSan, for the part in C:

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
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.studies.sparse_fuzz_codes import compare_codes
from benchmarks.studies.sparse_fuzz_compare import Tally, Wrong, compare
from benchmarks.studies.sparse_fuzz_networks import Case, case, redraw
from benchmarks.timing import RESULTS, write
from str_triton import deploy
from str_triton.deploy.sparse import compile as compilation
from str_triton.deploy.sparse.executions import EXECUTIONS
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.recurrent import Recurrent, exportable
from str_triton.deploy.sparse.model import CompiledModel

ROUNDS = 10  # weights and executions for each export


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
            compare(network, made, draw, tally)
            if isinstance(compiled, deploy.SparseModel) and number < 2:
                compare_codes(network, compiled, lambda changed: forced(changed, draw, tally), tally)
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
